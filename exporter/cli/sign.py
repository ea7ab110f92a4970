"""`prebake sign`, and what `prebake verify --signature` does."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .options import print_json

if TYPE_CHECKING:
    from ...runtime.check.signature import Identity

TOKEN_VARIABLE = "SIGSTORE_ID_TOKEN"


def add_sign(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "sign",
        help="sign an artifact, for those who have your public key",
        description="Hashes every file of an artifact against its manifest, and writes signature.json beside it. The signature "
        "is an OpenSSF model signature, which `model_signing verify` reads too. Needs pip install 'prebake[sign]'.",
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="an artifact folder")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument(
        "--key", type=Path, metavar="FILE", help="a private elliptic curve key in PEM, P-256, P-384 or P-521"
    )
    who.add_argument(
        "--sigstore",
        action="store_true",
        help=f"sign as the person or workflow that you are to sigstore: ${TOKEN_VARIABLE}, or what the CI gives, or a browser",
    )
    parser.add_argument(
        "--release",
        type=int,
        metavar="N",
        help="the number that this one gets, 1 or more and counted up, for those who load it with a minimum_release",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(run=_sign)


def _sign(args: argparse.Namespace) -> int:
    from ...runtime.check.signature import SIGNATURE_FILE
    from ..package.sign import SigstoreSigner, sign_artifact

    signer = SigstoreSigner(os.environ.get(TOKEN_VARIABLE)) if args.sigstore else args.key
    files = sign_artifact(args.artifact, signer, args.release)
    if args.json:
        print_json({"signature": str(args.artifact / SIGNATURE_FILE), "files": files})
    else:
        print(f"{args.artifact / SIGNATURE_FILE}: {files} files signed")
    return 0


def add_key(parser: argparse.ArgumentParser) -> None:
    """The option of commands that may change a signed artifact."""
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="sign the artifact again if it changes, see `prebake sign`"
    )


def note_on_stderr(text: str) -> None:
    print(f"prebake: note: {text}", file=sys.stderr)


def add_signature(parser: argparse.ArgumentParser) -> None:
    """The options of `prebake verify --signature`."""
    parser.add_argument(
        "--signature",
        action="store_true",
        help="check who signed it and that every file is as signed, and open no code; with --public-key or --identity",
    )
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument("--public-key", type=Path, metavar="FILE", help="the public key of whom you trust, in PEM")
    whose.add_argument(
        "--identity",
        metavar="NAME",
        help="who signed by sigstore: an e-mail address, or a workflow's URL; needs a network",
    )
    parser.add_argument(
        "--issuer",
        metavar="URL",
        help="who vouches for that identity, such as https://token.actions.githubusercontent.com",
    )


def verify_signature(args: argparse.Namespace) -> int:
    """Raises ArtifactError with what is wrong, and RecipeError for options that do not fit."""
    from ..package.sign import verify_signed_artifact

    whose = _expected_signer(args)
    files = verify_signed_artifact(args.artifact, whose)
    if args.json:
        print_json({"artifact": str(args.artifact), "signed_by": str(whose), "files": files})
    elif not args.quiet:
        print(f"{args.artifact}: signed by {whose}, {files} files are as signed")
    return 0


def refuse_signature_choices(args: argparse.Namespace) -> None:
    """Raises RecipeError for options that would have no effect without --signature."""
    from ...runtime.errors import RecipeError

    for name in ("public_key", "identity", "issuer"):
        if getattr(args, name) is not None:
            raise RecipeError(
                f"--{name.replace('_', '-')}: says who must have signed the artifact; add --signature, or leave it out"
            )


def _expected_signer(args: argparse.Namespace) -> Path | Identity:
    from ...runtime.check.signature import Identity
    from ...runtime.errors import RecipeError

    if args.source or args.model or args.prompts or args.seeds or args.limit or args.output or args.prompt_set != "all":
        raise RecipeError("--signature: opens no code, so nothing can be drawn; verify once more without it")
    if args.public_key is None and args.identity is None:
        raise RecipeError("--signature: expected --public-key FILE, or --identity NAME with --issuer URL, got neither")
    if (args.identity is None) != (args.issuer is None):
        raise RecipeError("--identity and --issuer: expected both or none, since anyone can vouch for a name")
    return args.public_key or Identity(args.identity, args.issuer)
