"""The command `serve`: artifacts behind OpenAI's Images API."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import RequestError
from ..extras import install_command

KEYS_VARIABLE = "PREBAKE_API_KEYS"


def add_serve(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="serve artifacts by HTTP",
        description="Serves artifacts by OpenAI's Images API, until SIGTERM or Ctrl-C. SIGHUP opens artifacts whose folders were replaced.",
    )
    parser.add_argument(
        "artifacts", nargs="+", metavar="ARTIFACT", help="an artifact's folder; its name is the model's"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"refuse requests without it; may be given several times. Others on the machine see options, not the variable {KEYS_VARIABLE}, "
        "keys between commas",
    )
    parser.add_argument(
        "--runners",
        type=int,
        metavar="N",
        help="entries that are computed at once, by artifact (default: as load has it)",
    )
    parser.add_argument(
        "--max-queue-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="answer 429 while more work is queued (default: 60)",
    )
    parser.add_argument(
        "--max-body-mib", type=int, default=32, metavar="N", help="answer 413 to larger requests (default: 32)"
    )
    parser.add_argument(
        "--memory-mib",
        type=int,
        metavar="N",
        help="what requests may hold between evaluations, by artifact; others wait (default: a quarter of the device's memory)",
    )
    parser.add_argument(
        "--trust",
        choices=("hash", "signature", "size"),
        default="hash",
        help="what is compared before code is opened: every file's hash (default), a signature too, or of weights the size alone",
    )
    parser.add_argument("--public-key", metavar="FILE", help="of whoever signed the artifacts, with --trust signature")
    parser.add_argument(
        "--minimum-release", type=int, metavar="N", help="refuse what was signed with a lower --release, or with none"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serves. Raises RequestError for what is not installed, and ArtifactError for an artifact that is damaged."""
    for name, least in (("max_queue_seconds", 0), ("max_body_mib", 1), ("memory_mib", 1)):
        if (value := getattr(args, name)) is not None and not value >= least:
            raise RequestError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    try:
        import python_multipart  # noqa: F401  (FastAPI needs it for forms, and imports it late)

        from ..serve.models import ServeOptions
        from ..serve.server import serve
    except ModuleNotFoundError as e:
        if not e.name or e.name.startswith("prebake"):
            raise
        raise RequestError(f"serve: needs {e.name}, which is not installed; {install_command(e.name)}") from e
    keys = (*args.api_key, *filter(None, os.environ.get(KEYS_VARIABLE, "").split(",")))
    options = ServeOptions(
        trust=args.trust,
        public_key=args.public_key,
        minimum_release=args.minimum_release,
        runners=args.runners,
        memory_bytes=None if args.memory_mib is None else args.memory_mib << 20,
        max_queue_s=args.max_queue_seconds,
        max_body_bytes=args.max_body_mib << 20,
        api_keys=keys,
    )
    serve([Path(artifact) for artifact in args.artifacts], options, args.host, args.port)
    return 0
