"""A GPU's memory that ran out, told in a sentence: what needed it, how much the manifest says, how much there is, and the
ways out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..contract import torch_dtype
from ..errors import ArtifactError
from ..manifest import Manifest

GPU_MEMORY_MESSAGES = ("out of memory", "aoti_torch_empty_strided(")
"""Of torch and CUDA; and of AOTInductor's code (torch 2.11 to 2.13), which says no more than which call of its own has failed."""


@contextmanager
def explain_gpu_memory(
    what: object, doing: str, manifest: Manifest, device: torch.device, able: Sequence[str] = ()
) -> Iterator[None]:
    """Raises ArtifactError, naming `what` and that it ran out while `doing`, in place of an error that comes of the GPU's
    memory. `able` are graphs that could be offloaded, and are not."""
    try:
        yield
    except Exception as e:
        if device.type != "cuda" or not is_gpu_out_of_memory(e):
            raise
        free, total = torch.cuda.mem_get_info(device)
        raise ArtifactError(
            f"{what}: the GPU's memory ran out while {doing}: {describe_gpu_needs(manifest)}, and it has {format_gib(total)}, {format_gib(free)} of them "
            f"free; {gpu_memory_ways_out(manifest, able)}"
        ) from e


def is_gpu_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or what it came of, is about the GPU's memory and is not a sentence of ours already."""
    if isinstance(error, ArtifactError) and "its compiled code failed" not in str(error):
        return False
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in GPU_MEMORY_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_gpu_needs(manifest: Manifest) -> str:
    """A clause that says how much weights and stored values take between two steps; the steps' own need is not in the manifest."""
    weights = sum(entry.size for entry in manifest.files if entry.path.startswith("weights/"))
    stored = stored_bytes(manifest)
    values = f" and stored values of {format_gib(stored)}" if stored else ""
    return f"by the manifest it holds weights of {format_gib(weights)}{values}, besides what the code itself needs"


def stored_bytes(manifest: Manifest) -> int:
    """Bytes of all the sites' values, in every slot."""
    sizes: dict[str, int] = {}
    for spec in (spec for graph in manifest.graphs for spec in graph.outputs):
        sizes[spec.name] = torch.Size(spec.shape).numel() * torch_dtype(spec.dtype).itemsize
    return sum(site.slots * sizes.get(name, 0) for site in manifest.sites for name in site.tensors)


def gpu_memory_ways_out(manifest: Manifest, able: Sequence[str]) -> str:
    offload = ""
    if able:
        away = sum(graph.cost.constants_bytes for graph in manifest.graphs if graph.name in able)
        offload = (
            f"load it with offload=True, which keeps {' and '.join(able)} ({format_gib(away)}) off it between prompts, "
        )
    quantize = manifest.recipe.get("quantize", {})
    steps = {"method": "int8_dynamic"}
    if any(graph.name == "text_encoder" for graph in manifest.graphs):
        steps["text_encoders"] = "int8_weight_only"
    left = [f"quantize.{key}={value}" for key, value in steps.items() if quantize.get(key, "none") == "none"]
    smaller = " or ".join([*left, "smaller shapes"])
    return f"{offload}export again with {smaller}, or free what other programs hold of it"


def format_gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
