"""The command `inspect`: what is in an artifact, without opening its machine code; no torch."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bounds import MAX_PLAN_BYTES, parse_json
from ..errors import ArtifactError, first_line
from ..manifest import Manifest, read_manifest
from ..plan import Plan
from ..text import (
    align_columns,
    block_signs,
    folder_bytes,
    format_bytes,
    format_count,
    step_strip,
    variant_signs,
    weights_bytes,
    weights_text,
    wrap_entries,
)
from .streams import json_text, print_lines

SITES_SHOWN = 4  # of the values that outlive a step
UNVERIFIED_NOTE = "added since, and not compared with the pipeline: {}; `prebake verify --source` does that"


def add_inspect(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help="say what is in an artifact",
        description="Says what is in an artifact, without opening its machine code. With --machine: the rates of this machine that "
        "forecasts go by.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("artifact", nargs="?", metavar="ARTIFACT", help="an artifact's folder")
    what.add_argument(
        "--machine",
        action="store_true",
        help="show the rates that `prebake export --dry-run` has measured here, and where they are kept; takes no artifact",
    )
    parser.add_argument(
        "--layers",
        action="store_true",
        help="list every layer: quantized or not, and why; and where kernels are called",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of text")
    parser.set_defaults(run=inspect)


def inspect(args: argparse.Namespace) -> int:
    """Prints what the manifest and the plans say, or with --machine the rates of this machine. Raises ArtifactError when manifest
    or plans cannot be read."""
    if args.machine:
        from .machine import print_rates

        print_rates(in_json=args.json)
        return 0
    folder = Path(args.artifact)
    manifest = read_manifest(folder)
    plans = {name: _read_plan(folder, path) for name, path in manifest.plans.items()}
    if args.json:
        print(json_text(inspection_json(manifest, plans), indent=2))
    else:
        print_lines(*inspection_lines(folder, manifest, plans, layers=args.layers))
    return 0


def _read_plan(folder: Path, path: str) -> Plan:
    from ..check.artifact import is_plain_name
    from ..storage.files import open_plain_file

    if not is_plain_name(path):
        raise ArtifactError(f"{folder}: manifest.json [plans]: {path!r} is not a plain name inside the folder")
    with open(open_plain_file(folder, path), "rb") as file:
        data = file.read(MAX_PLAN_BYTES + 1)
    try:
        if len(data) > MAX_PLAN_BYTES:
            raise ValueError(f"it has more than {MAX_PLAN_BYTES} bytes")
        return Plan.model_validate(parse_json(data))
    except ValueError as e:
        raise ArtifactError(
            f"{folder / path}: expected a plan, but {first_line(e)}; restore the file or export again"
        ) from e


def inspection_json(manifest: Manifest, plans: Mapping[str, Plan]) -> dict[str, Any]:
    """The manifest without its list of constants, and the plans as step strips, with sizes and shares."""
    graphs = [
        g.model_dump(mode="json", exclude={"constants"}) | {"share": share}
        for g, share in _flops_shares(manifest, plans)
    ]
    rest = manifest.model_dump(mode="json", exclude={"graphs", "plans", "files"})
    strips = {
        name: {
            "steps": plan.steps,
            "cache": plan.cache,
            "scheduler": plan.scheduler,
            "strip": step_strip(plan, variant_signs(manifest, plans.values())),
            "verified": manifest.status == "verified" and name not in manifest.unverified,
        }
        for name, plan in plans.items()
    }
    return rest | {
        "graphs": graphs,
        "plans": strips,
        "variants": variant_signs(manifest, plans.values()),
        "sizes": folder_bytes(manifest),
        "weights": weights_bytes(manifest),
    }


def inspection_lines(folder: Path, manifest: Manifest, plans: Mapping[str, Plan], *, layers: bool) -> list[str]:
    """The lines of `prebake inspect`."""
    needs, defaults = manifest.requires, manifest.defaults
    versions = {"torch": needs.torch, "glibc": needs.glibc, **needs.packages}
    packages = "".join(f", {name} {version}" for name, version in versions.items() if version)
    frames = "" if defaults.num_frames is None else f"{defaults.num_frames} frames of "
    lines = wrap_entries(
        [
            ("artifact", f"{folder} ({manifest.family}, {manifest.status_line})"),
            *([("compared", manifest.verification.describe())] if manifest.verification else []),
            ("source", f"{manifest.source.title} ({manifest.source.pipeline}, sha256 {manifest.source.sha256[:12]}..)"),
            ("needs", f"{needs.system} {needs.machine}, {needs.device}, {needs.isa_level}{packages}"),
            (
                "defaults",
                f"{defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}, {frames}{defaults.width} x {defaults.height} pixels",
            ),
            *([("further", "; ".join(further_calls(manifest)))] if further_calls(manifest) else []),
            ("files", ", ".join(f"{name} {format_bytes(size)}" for name, size in folder_bytes(manifest).items())),
            ("weights", weights_text(weights_bytes(manifest), manifest.unquantized_bytes)),
        ]
    )
    rows = [("graph", "FLOPs", "share", "ops", "constants", "bytes", "package")]
    for graph, share in _flops_shares(manifest, plans):
        cost = graph.cost
        rows.append(
            (
                graph.name,
                format_count(cost.flops),
                f"{share:.1%}",
                str(cost.ops),
                str(cost.constants),
                format_bytes(cost.constants_bytes),
                graph.package,
            )
        )
    lines += ["", *align_columns(rows, right=range(1, 6)), "", *_plan_lines(manifest, plans), ""]
    return [*lines, *_layer_lines(manifest, layers)]


def further_calls(manifest: Manifest) -> list[str]:
    """What calls may ask for besides the defaults: sizes, and pictures together."""
    sizes = ", ".join(f"{size.width} x {size.height}" for size in manifest.sizes) or str(manifest.range or "")
    together = ", ".join(map(str, manifest.batches[1:]))
    return [*([f"{sizes} pixels"] if sizes else []), *([f"{together} pictures together"] if together else [])]


def _plan_lines(manifest: Manifest, plans: Mapping[str, Plan]) -> list[str]:
    """Every plan as a step strip, what the signs mean, and which plans nobody has verified."""
    signs = block_signs(variant_signs(manifest, plans.values()), sys.stdout.encoding)
    entries = [("plan", "")]
    for name, plan in plans.items():
        note = ", unverified" if name in manifest.unverified else ""
        entries.append((name, f"{step_strip(plan, signs)}  cache {plan.cache}, {plan.scheduler}{note}"))
    entries.append(("", ", ".join(f"{sign} = {name}" for name, sign in signs.items())))
    if manifest.sites:
        more = f" and {len(manifest.sites) - SITES_SHOWN} more" if len(manifest.sites) > SITES_SHOWN else ""
        entries.append(("stored", ", ".join(site.name for site in manifest.sites[:SITES_SHOWN]) + more))
    lines = wrap_entries(entries)
    if manifest.unverified:
        lines.append(UNVERIFIED_NOTE.format(", ".join(manifest.unverified)))
    return lines


def _layer_lines(manifest: Manifest, every: bool) -> list[str]:
    if every:
        layers = align_columns(
            [("layer", "treatment", "reason"), *((name, *said) for name, said in manifest.layers.items())]
        )
        return [*layers, *_kernel_lines(manifest)]
    counts = Counter(said[0] for said in manifest.layers.values())
    summary = ", ".join(f"{count} {treatment}" for treatment, count in sorted(counts.items())) or "none listed"
    return [f"layers  {summary} (--layers says why)" if counts else f"layers  {summary}"]


def _kernel_lines(manifest: Manifest) -> list[str]:
    """How often each graph calls which of prebake's own kernels, and why one does not take a place that it is for; nothing
    where no graph could call any."""
    rows = [("graph", "kernel", "places", "")]
    for graph in manifest.graphs:
        rows += ((graph.name, kernel, str(count), "called") for kernel, count in graph.kernels.items())
        rows += ((graph.name, r.kernel, str(r.places), f"not: {r.reason}, {r.first}") for r in graph.refusals)
    if len(rows) == 1:
        return []
    left = sum(2 + max(len(row[i]) for row in rows) for i in range(3))
    lines = [""]
    for line in align_columns(rows, right=(2,)):
        lines += [line[:left].rstrip()] if len(line) <= left else _wrap_last_column(line, left)
    return lines


def _wrap_last_column(line: str, left: int) -> list[str]:
    """The line in as many of 80 columns as what follows its first `left` columns takes."""
    first, *rest = textwrap.wrap(line[left:], max(80 - left, 20))
    return [line[:left] + first, *(" " * left + more for more in rest)]


def _flops_shares(manifest: Manifest, plans: Mapping[str, Plan]) -> list[tuple[Any, float]]:
    """(graph, its share of one image's FLOPs at the default size): every graph once, denoiser variants as often as the default plan
    says."""
    others = tuple(f".{size.name}" for size in manifest.sizes) + tuple(f".b{batch}" for batch in manifest.batches[1:])
    calls = Counter({graph.name: int(not graph.name.endswith(others)) for graph in manifest.graphs})
    for name in {variant for plan in plans.values() for variant in plan.variants()}:
        calls[name] = 0
    if default := plans.get(str(manifest.defaults.num_inference_steps)):
        calls.update(evaluation.variant for evaluation in default.evaluations)
    total = sum(calls[graph.name] * graph.cost.flops for graph in manifest.graphs) or 1
    return [(graph, calls[graph.name] * graph.cost.flops / total) for graph in manifest.graphs]
