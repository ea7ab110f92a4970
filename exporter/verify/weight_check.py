"""Weight check: every stored weight against the model's own.

One number among a billion that is wrong changes an evaluation by less than rounding does, at large sizes by much less. Beside the model's own
number it is plain to see. It takes no evaluation. What the exporter makes of weights is undone here as far as names tell it: a fused
projection is its parts below each other, eight bits with a scale are the numbers that they stand for, and what is packed for kernels is unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...runtime.artifact import Artifact
from ...runtime.manifest import PROLOGUE, STEP
from ..lower.aoti.kernels.operators import PANEL, gated_order, pack_columns, pack_taps, unpack_columns, unpack_taps
from .outcome import Verdict

ROUNDING = 2.0**-8  # relative: bfloat16's, and a little more
LEAST_WEIGHT = 1e-7  # of a tensor's largest
HALF_CODE = 0.51  # of a scale: eight bits are the nearest of 255 numbers
FUSED_PARTS: Mapping[str, Sequence[str]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
CODES, SCALES = ".parametrizations.weight.original0", ".parametrizations.weight.original1"
PACKED, PACKED_SCALES = ".weight_packed", ".scale"
NAMED_GAPS = 3


def judge_weights(artifact: Artifact, source: Mapping[str, Tensor]) -> tuple[tuple[Verdict, ...], tuple[str, ...]]:
    """A verdict on all weights that `source` has, by component and name, and a sentence on those that it has not."""
    errors, unknown = weight_errors(artifact, source)
    gaps = ()
    if unknown:
        named = ", ".join(unknown[:NAMED_GAPS]) + (" and others" if len(unknown) > NAMED_GAPS else "")
        total = len(unknown) + len(errors)
        gaps = (
            f"{len(unknown)} of {total} weights were not held against the model's, which has none of the name: {named}",
        )
    if not errors:
        return (), gaps
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    over, way_out = (
        f"largest of {len(errors)} weights",
        f"{worst} is not the model's: restore weights/, or export again",
    )
    return (Verdict("", "weight_error", errors[worst], 1.0, False, over, way_out),), gaps


def weight_errors(artifact: Artifact, source: Mapping[str, Tensor]) -> tuple[dict[str, float], list[str]]:
    """Stored tensor -> its error, where rounding explains 1; and those that nothing in `source` explains."""
    errors: dict[str, float] = {}
    unknown = []
    for key, places in sorted(stored_places(artifact).items()):
        if places[0].endswith(SCALES) or key.removesuffix(PACKED_SCALES) + PACKED in artifact.weights:
            continue  # judged with its codes
        stored, scale = artifact.weights[key], None
        if places[0].endswith(PACKED):
            scale = artifact.weights.get(key.removesuffix(PACKED) + PACKED_SCALES)
            exact = next(
                (t for p in places if (t := find_weight(source, p.replace(PACKED, ".weight"))) is not None), None
            )
            if exact is None or scale is None or exact.dim() not in (2, 4):
                unknown.append(key)
            else:
                errors[key] = packed_error(stored, scale, exact)
            continue
        if places[0].endswith(CODES):
            scale = artifact.weights.get(key.removesuffix(CODES) + SCALES)
        exact = next(
            (t for place in places if (t := find_weight(source, place.replace(CODES, ".weight"))) is not None), None
        )
        if exact is None or exact.shape != stored.shape or (stored.dtype == torch.int8) != (scale is not None):
            unknown.append(key)
        else:
            errors[key] = weight_error(stored, scale, exact)
    return errors, unknown


def packed_error(packed: Tensor, scale: Tensor, exact: Tensor) -> float:
    """The error of a weight [N, K], or [N, C, H, W], that was packed for a kernel with a scale for each of N; inf where it is no packed
    weight."""
    by_row = scale.reshape(-1, *(1,) * (exact.dim() - 1))
    return min((weight_error(codes, by_row, exact) for codes in unpack_codes(packed, exact)), default=math.inf)


def unpack_codes(packed: Tensor, exact: Tensor) -> Iterator[Tensor]:
    """int8 as the model's weight lies, in each order that a kernel may read it; none where packing them again gives something else."""
    n, k = exact.shape[:2]
    if exact.dim() == 4:
        taps = exact[0, 0].numel()
        codes = unpack_taps(packed, taps, k, n)
        if torch.equal(pack_taps(codes, taps), packed):
            yield codes.reshape(taps, k, n).permute(2, 1, 0).reshape(exact.shape)
        return
    columns = unpack_columns(packed, k, n)
    if torch.equal(pack_columns(columns), packed):
        yield columns.t()
        if n % PANEL == 0:
            yield columns[:, gated_order(n).argsort()].t()


def stored_places(artifact: Artifact) -> dict[str, list[str]]:
    """Stored tensor -> where it stands: the component and the name there. Equal tensors of several places are stored once."""
    places: dict[str, list[str]] = {}
    parts = {PROLOGUE, STEP, *(name.partition(".")[0] for plan in artifact.plans.values() for name in plan.variants())}
    for graph in artifact.manifest.graphs:
        plain = graph.name.partition(".")[0]
        component = "denoiser" if plain in parts else plain
        for name, key in graph.constants.items():
            places.setdefault(key, []).append(f"{component}.{name.removeprefix('denoiser.')}")
    return places


def find_weight(source: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The model's weight of that name, or its parts below each other."""
    if name in source:
        return source[name]
    for fused, parts in FUSED_PARTS.items():
        if f".{fused}." in name:
            found = [source.get(name.replace(f".{fused}.", f".{part}.")) for part in parts]
            known = [t for t in found if t is not None]
            return torch.cat(known) if len(known) == len(parts) else None
    return None


def weight_error(stored: Tensor, scale: Tensor | None, exact: Tensor) -> float:
    """The largest error of a number, where 1 is what rounding to its dtype does; NaN where one is none."""
    worst = 0.0
    rows = (scale,) if scale is not None else ()
    for part, wanted, *scales in zip(*(split_rows(t, len(exact)) for t in (stored, exact, *rows)), strict=True):
        if not scales and torch.equal(part.to(wanted.dtype), wanted):
            continue  # as in most models, which are published in what they are exported in
        ours, theirs = part.double(), wanted.double()
        allowed = ROUNDING * theirs.abs() + LEAST_WEIGHT * max(theirs.abs().max().item(), LEAST_WEIGHT)
        if scales:
            ours, allowed = ours * scales[0].double(), allowed + HALF_CODE * scales[0].double().abs()
        error = ((ours - theirs).abs() / allowed).max().item()
        worst = error if math.isnan(error) else max(worst, error)
        if math.isnan(worst):
            break
    return worst


def split_rows(tensor: Tensor, rows: int) -> Iterator[Tensor]:
    """The tensor in parts of 1,024 rows, so that no copy of a large one is made; a vector whole."""
    matrix = tensor.dim() > 1 and len(tensor) == rows
    return iter(tensor.split(1024) if matrix else (tensor,))
