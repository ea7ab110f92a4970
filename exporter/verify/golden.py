"""Golden vectors: the first steps of one picture for each plan, tensor by tensor, so that any machine can see whether it computes the same.

In: a staged artifact; out: `golden/<plan>.safetensors`. Later, in: an artifact; out: a
`GoldenReplay` for each plan, which fails where the difference is more than other kernels explain. Equal is not good: that
is for `verify.py` to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ...runtime.artifact import Artifact
from ...runtime.check.machine import cpu_flags
from ...runtime.errors import ArtifactError, ExportError
from ...runtime.finite import NonfiniteError
from ...runtime.manifest import Manifest
from ...runtime.plan import Plan
from ...runtime.storage.files import read_listed_file, read_plain_file
from ..families.picture import VAE_ENCODER
from ..families.text import TEXT_ENCODER
from ..load.prompts import picture_prompts
from ..recipe.resolve import Recipe
from .budget import count_opening_steps
from .closeness import largest_error, psnr_db, relative_error
from .replayer import DrawnPicture, GraphCall, Replayer, image_array

GOLDEN_BYTES = 64 << 20  # of one plan's denoiser outputs
MAX_GOLDEN_BYTES = (
    1 << 30
)  # of a golden file: at least one evaluation, embeddings and a picture, or a video, lie in it too
NONFINITE_WAY_OUT = "set precision.denoiser to float32 or quantize.method to none to find out where they come from"
GOLDEN_TENSORS = {"prompt", "seed", "evaluations", "initial_latents", "outputs", "final_latents", "image"}


@dataclass(frozen=True)
class Tolerance:
    """How far a replay may be from its golden vectors, why it may be at all, and what to do when it is farther."""

    relative_error: float
    image_psnr_db: float
    reason: str
    way_out: str = "export again on this machine"


# The same machine gives the same bits, with any number of threads seen so far. The room is for another CPU.
TOLERANCES = {
    "int8": Tolerance(0.05, 30.0, "another CPU rounds elsewhere, which moves int8 activations to a neighbouring code"),
    "fp8": Tolerance(0.05, 30.0, "another GPU rounds elsewhere, which moves fp8 activations to a neighbouring number"),
    "bfloat16": Tolerance(0.05, 30.0, "another CPU takes other bfloat16 kernels, which round elsewhere"),
    "float16": Tolerance(0.02, 35.0, "another CPU takes other float16 kernels, which round elsewhere"),
    "float32": Tolerance(1e-3, 60.0, "another CPU takes other float32 kernels, which add in another order"),
}
# Seen with torch 2.13, oneDNN held to AVX-512 without VNNI: float32 model, int8 layers, error 0.001 against eager
# becomes 0.02. There, pairs of 8-bit products are added in 16 bits.
NO_VNNI_HINT = "this CPU has no VNNI, so sums of int8 products saturate at 16 bits; take a CPU that has it, or export with quantize.method=none"


def write_plan_golden(replayer: Replayer, recipe: Recipe, name: str) -> None:
    """The golden vectors of one plan, in the folder of the replayer's artifact."""
    plan, prompt = replayer.artifact.find_plan(name), picture_prompts(recipe)[0]
    try:
        drawn = replayer.draw(prompt, 0, plan, count_opening_steps(plan))
    except NonfiniteError as e:
        raise ExportError(f"{str(e).partition(';')[0]}; {NONFINITE_WAY_OUT}") from e
    check_finite(replayer.evaluations(drawn), name)
    kept, dtype = golden_evaluations(replayer, drawn)
    tensors = golden_tensors(replayer, drawn, prompt, 0, kept, dtype)
    save_golden(replayer.artifact.folder, name, {**tensors, "steps": torch.tensor([count_opening_steps(plan)])})


def save_golden(folder: Path, plan: str, tensors: dict[str, Tensor]) -> None:
    """Writes the golden file of a plan; equal tensors give equal bytes."""
    path = folder / golden_path(plan)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)


def golden_path(plan: str) -> str:
    return f"golden/{plan}.safetensors"


def plans_without_golden(folder: Path, plans: Iterable[str]) -> tuple[str, ...]:
    """The plans without golden vectors: all, where the artifact was exported on a machine that cannot run it."""
    return tuple(name for name in plans if not (folder / golden_path(name)).is_file())


def check_finite(evaluations: Sequence[GraphCall], plan: str) -> None:
    """Raises ExportError where the denoiser gave NaN or infinity."""
    for e, call in enumerate(evaluations):
        if not all(t.isfinite().all() for t in call.outputs.values()):
            raise ExportError(
                f"plan {plan!r}, evaluation {e} (variant {call.graph!r}): the compiled denoiser gives values that are not finite; "
                f"{NONFINITE_WAY_OUT}"
            )


def golden_evaluations(replayer: Replayer, drawn: DrawnPicture) -> tuple[list[int], torch.dtype]:
    """Which evaluations' outputs a golden file keeps, and in what: all in float32 or float16 if they fit, else as many as do."""
    outputs = [c.outputs["sample"] for c in replayer.evaluations(drawn)]
    n, one = len(outputs), outputs[0].numel()
    if n * one * 4 <= GOLDEN_BYTES:
        return list(range(n)), torch.float32
    fit = max(1, min(n, GOLDEN_BYTES // (one * 2)))
    return [i * (n - 1) // max(1, fit - 1) for i in range(fit)], torch.float16


def golden_tensors(
    replayer: Replayer, drawn: DrawnPicture, prompt: str, seed: int, kept: Sequence[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What is kept of one picture. Not safetensors' metadata, which it writes in any order: prompt and seed are tensors too.

    `outputs` are [K, ...] of the evaluations in `evaluations` [K]; `initial_latents` are as the first evaluation gets
    them, `final_latents` as the decoder does; `image` is uint8 [H, W, 3], of a video [T, H, W, 3].
    """
    evaluations = replayer.evaluations(drawn)
    tensors = {
        "prompt": torch.tensor(list(prompt.encode()), dtype=torch.uint8),
        "seed": torch.tensor([seed]),
        "evaluations": torch.tensor(list(kept)),
        "initial_latents": evaluations[0].inputs["hidden_states"],
        "outputs": torch.cat([evaluations[e].outputs["sample"] for e in kept]).to(dtype),
        "final_latents": drawn.latents,
        "image": torch.from_numpy((image_array(drawn.image) * 255).round().astype("uint8")),
    }
    encoded = 0  # how often the text encoder was called: a negative prompt is a call more
    for call in drawn.calls:
        if call.graph == TEXT_ENCODER:
            tensors |= {f"input_ids.{encoded}.{name}": t for name, t in call.inputs.items()}
            tensors |= {f"embeddings.{encoded}.{name}": t for name, t in call.outputs.items()}
            encoded += 1
        if call.graph == VAE_ENCODER:
            tensors |= {f"embeddings.image.{name}": t for name, t in call.outputs.items()}
    return {name: t.contiguous().clone() for name, t in tensors.items()}


@dataclass(frozen=True)
class GoldenReplay:
    """One plan's golden vectors against their replay here. `bitwise` is whether every tensor is the same to the bit. Latents
    and picture are None of a denoiser alone."""

    plan: str
    evaluations: tuple[int, ...]
    evaluation_errors: tuple[float, ...]
    embeddings_relative_error: float
    initial_latents_equal: bool
    input_ids_equal: bool
    final_latents_relative_error: float | None
    image_psnr_db: float | None
    bitwise: bool
    tolerance: Tolerance

    @property
    def problems(self) -> tuple[str, ...]:
        """What is not as it was at export, one sentence each; none if the replay passes."""
        allowed = self.tolerance.relative_error
        found = []
        if not self.input_ids_equal:
            found.append(
                "the tokenizers give other ids than at export; restore tokenizers/, or install the exporter's version of tokenizers"
            )
        if not self.initial_latents_equal:
            found.append(
                "torch draws other noise from seed 0 than at export, so the rest cannot be compared; use the exporter's torch"
            )
        for what, error in (
            ("embeddings", self.embeddings_relative_error),
            ("denoiser outputs", largest_error(self.evaluation_errors)),
            ("final latents", self.final_latents_relative_error),
        ):
            if error is not None and not error <= allowed:
                found.append(
                    f"{what} are off by {error:.3g} (relative, L2), {allowed:g} is allowed; {self.tolerance.way_out}"
                )
        if self.image_psnr_db is not None and not self.image_psnr_db >= self.tolerance.image_psnr_db:
            found.append(
                f"the picture has {self.image_psnr_db:.1f} dB against the stored one, {self.tolerance.image_psnr_db:g} are asked for; {self.tolerance.way_out}"
            )
        return tuple(f"golden replay of plan {self.plan!r}: {sentence}" for sentence in found)


def replay_golden(replayer: Replayer, plan: Plan) -> GoldenReplay:
    """The stored prompt and seed drawn again."""
    artifact = replayer.artifact
    stored = read_golden(artifact, plan.name)
    prompt, seed, kept = read_golden_request(stored, plan)
    dtype = torch.float16 if stored["outputs"].dtype == torch.float16 else torch.float32
    drawn = replayer.draw(prompt, seed, plan, read_golden_steps(stored, plan))
    if kept[-1] >= len(replayer.evaluations(drawn)):
        raise golden_error(plan, "'evaluations' are not of its 'steps'")
    fresh = golden_tensors(replayer, drawn, prompt, seed, kept, dtype)
    if "steps" in stored:
        fresh["steps"] = stored["steps"]
    refuse_other_tensors(plan, stored, fresh)
    embeddings = [name for name in stored if name.startswith("embeddings.")]
    starts = fresh["initial_latents"], stored["initial_latents"]
    tolerance = tolerance_of(artifact.manifest)
    # latents that begin from a picture went through a graph, and are as close as graphs are
    encoded = any(name.startswith("embeddings.image.") for name in stored)
    room = tolerance.relative_error if encoded else 0.0
    return GoldenReplay(
        plan=plan.name,
        evaluations=tuple(kept),
        evaluation_errors=tuple(map(relative_error, fresh["outputs"], stored["outputs"])),
        embeddings_relative_error=largest_error(relative_error(fresh[name], stored[name]) for name in embeddings),
        initial_latents_equal=relative_error(*starts) <= room,
        input_ids_equal=all(torch.equal(fresh[name], stored[name]) for name in stored if name.startswith("input_ids.")),
        final_latents_relative_error=relative_error(fresh["final_latents"], stored["final_latents"]),
        image_psnr_db=psnr_db(fresh["image"] / 255, stored["image"] / 255),
        bitwise=all(torch.equal(fresh[name], stored[name]) for name in stored),
        tolerance=tolerance,
    )


def read_golden(artifact: Artifact, plan: str) -> dict[str, Tensor]:
    """The tensors of a plan's golden file. Raises ArtifactError for what is no such file, or not the listed one."""
    path, folder = golden_path(plan), artifact.folder
    listed = path in {entry.path for entry in artifact.manifest.files}
    try:
        if listed:
            return load(read_listed_file(folder, artifact.manifest, path, MAX_GOLDEN_BYTES))
        return load(
            read_plain_file(folder, path, MAX_GOLDEN_BYTES)
        )  # written just now: nothing opens with unlisted files
    except SafetensorError as e:
        raise ArtifactError(f"{artifact.folder / path}: expected safetensors, but {e}; export again") from e


def read_golden_request(stored: Mapping[str, Tensor], plan: Plan) -> tuple[str, int, list[int]]:
    """Prompt, seed, and which evaluations' outputs are kept. Raises ArtifactError for vectors that are not of this plan."""
    if lacking := sorted(GOLDEN_TENSORS - stored.keys()):
        raise golden_error(plan, f"has no {lacking[0]!r}")
    prompt, seed, kept = (stored[name] for name in ("prompt", "seed", "evaluations"))
    count = len(plan.evaluations)
    if prompt.dtype != torch.uint8 or prompt.dim() != 1:
        raise golden_error(plan, "'prompt' is no text")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise golden_error(plan, "'seed' is no whole number")
    if kept.dtype != torch.int64 or kept.dim() != 1 or not 1 <= len(kept) <= count:
        raise golden_error(plan, f"'evaluations' are not 1 to {count} numbers")
    numbers = kept.tolist()
    if numbers != sorted(set(numbers)) or not 0 <= numbers[0] <= numbers[-1] < count:
        raise golden_error(plan, f"'evaluations' are not some of the plan's {count}")
    try:
        return bytes(prompt.tolist()).decode(), int(seed), numbers
    except UnicodeDecodeError as e:
        raise golden_error(plan, "'prompt' is no text") from e


def read_golden_steps(stored: Mapping[str, Tensor], plan: Plan) -> int:
    """How many of the plan's steps were drawn: all, where the file does not say. Raises ArtifactError for what cannot be."""
    if "steps" not in stored:
        return plan.steps
    steps = stored["steps"]
    if steps.dtype != torch.int64 or steps.numel() != 1 or not 1 <= int(steps) <= plan.steps:
        raise golden_error(plan, f"'steps' is not one of 1 to {plan.steps}")
    return int(steps)


def refuse_other_tensors(plan: Plan, stored: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> None:
    """Raises ArtifactError unless both have the same names, shapes and dtypes."""
    for name in sorted(stored.keys() | fresh.keys()):
        if name not in stored or name not in fresh:
            raise golden_error(plan, f"has no {name!r}" if name in fresh else f"has {name!r}, which no replay gives")
        if (stored[name].shape, stored[name].dtype) != (fresh[name].shape, fresh[name].dtype):
            (a, b), (c, d) = ((list(t[name].shape), t[name].dtype) for t in (stored, fresh))
            raise golden_error(plan, f"{name!r} is {b} {a}, the replay's is {d} {c}".replace("torch.", ""))


def golden_error(plan: Plan, what: str) -> ArtifactError:
    return ArtifactError(f"{golden_path(plan.name)}: {what}; restore the file, or export again")


def tolerance_of(manifest: Manifest) -> Tolerance:
    """The tolerance of the coarsest arithmetic in the graphs."""
    treatments = {treatment for treatment, _ in manifest.layers.values()}
    if "fp8" in treatments:
        return TOLERANCES["fp8"]
    if "int8" in treatments:
        exact = any("w8a8" in kernel for graph in manifest.graphs for kernel in graph.kernels)  # on every CPU
        lacking = manifest.requires.machine == "x86_64" and not exact and not {"avx512_vnni", "avx_vnni"} & cpu_flags()
        return replace(TOLERANCES["int8"], way_out=NO_VNNI_HINT) if lacking else TOLERANCES["int8"]
    used = set(manifest.recipe.get("precision", {}).values())
    return next(t for dtype, t in TOLERANCES.items() if dtype in used or dtype == "float32")
