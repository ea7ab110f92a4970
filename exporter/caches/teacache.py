"""TeaCache (Liu et al. 2024, arXiv:2411.19108): the block stack is skipped until a cheap signal has moved far enough.

The signal's relative L1 change since the evaluation before, through a polynomial that was fitted to a model, is added up;
the blocks run when the sum reaches `rel_l1_thresh`, which sets it back to 0. A skipped evaluation adds the residual that
the stack last added. Per branch (ali-vilab/TeaCache, `TeaCache4FLUX/teacache_flux.py` and its siblings).

A modulated input is data: its decisions are calibrated and frozen. The timestep's embedding is not: what TeaCache decides
from it follows from the weights and the timesteps alone, is computed at export, and needs no calibration (`ExactDecisions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...runtime.errors import ExportError
from ..sites.layout import Layout
from ..sites.marks import Mark
from ..tables import ConflictError
from .common.calibration import FrozenCache, freeze_decisions
from .common.schedule import Decision, Schedule, Trajectory

POLYNOMIALS: Mapping[str, tuple[float, ...]] = {
    "flux": (4.98651651e02, -2.83781631e02, 5.58554382e01, -3.82021401e00, 2.64230861e-01),
    "hunyuanvideo": (7.33226126e02, -4.01131952e02, 6.75869174e01, -3.14987800e00, 9.61237896e-02),
    "ltx-video": (2.14700694e01, -1.28016453e01, 2.31279151e00, 7.92487521e-01, 9.69274326e-03),
    "lumina": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "mochi": (-3.51241319e03, 8.11675948e02, -6.09400215e01, 2.42429681e00, 3.05291719e-03),
    "cosmos": (2.71156237e02, -9.19775607e01, 2.24437250e00, 2.08355751e00, 1.41776330e-01),
    "hidream-i1": (-3.13605009e04, -7.12425503e02, 4.91363285e01, 8.26515490e00, 1.08053901e-01),
    "cogvideox-2b": (-3.10658903e01, 2.54732368e01, -5.92380459e00, 1.75769064e00, -3.61568434e-03),
    "cogvideox-5b": (-1.53880483e03, 8.43202495e02, -1.34363087e02, 7.97131516e00, -5.23162339e-02),
    "cogvideox1.5-5b": (2.50210439e02, -1.65061612e02, 3.57804877e01, -7.81551492e-01, 3.58559703e-02),
    "cogvideox1.5-5b-i2v": (1.22842302e02, -1.04088754e02, 2.62981677e01, -3.06009921e-01, 3.71213220e-02),
    "wan2.1-t2v-1.3b": (2.39676752e03, -1.31110545e03, 2.01331979e02, -8.29855975e00, 1.37887774e-01),
    "wan2.1-t2v-14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1-i2v-480p": (-3.02331670e02, 2.23948934e02, -5.25463970e01, 5.87348440e00, -2.01973289e-01),
    "wan2.1-i2v-720p": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    "wan2.1-t2v-1.3b-ret": (-5.21862437e04, 9.23041404e03, -5.28275948e02, 1.36987616e01, -4.99875664e-02),
    "wan2.1-t2v-14b-ret": (-3.03318725e05, 4.90537029e04, -2.65530556e03, 5.87365115e01, -3.15583525e-01),
    "wan2.1-i2v-480p-ret": (2.57151496e05, -3.54229917e04, 1.40286849e03, -1.35890334e01, 1.32517977e-01),
    "wan2.1-i2v-720p-ret": (8.10705460e03, 2.13393892e03, -3.72934672e02, 1.66203073e01, -4.17769401e-02),
}
"""Highest power first, as the authors fitted them. Those of Wan named `-ret` are for the output of its time projection."""


class TeaCache(FrozenCache):
    """The block stack runs when the polynomial of the signal's change, summed up, reaches `rel_l1_thresh`. arXiv:2411.19108.

    `signal` "modulated" is the first block's modulated input, "time_embedding" the embedding of the timestep alone.
    `module` names the module of the model whose first output is the signal, where that is not the usual
    `transformer_blocks.0.norm1` or `time_embedding`. `coefficients` is a name or a polynomial, highest power first. The
    first `ret_steps` and the last `cutoff` evaluations always compute (Wan counts both branches, and `cutoff_steps`
    from the start).
    """

    method: Literal["teacache"] = "teacache"
    rel_l1_thresh: float = Field(default=0.6, gt=0)
    coefficients: str | Annotated[tuple[float, ...], Field(strict=False, min_length=1)] = "flux"
    signal: Literal["modulated", "time_embedding"] = "modulated"
    module: str | None = Field(default=None, min_length=1)
    ret_steps: int = Field(default=1, ge=1)
    cutoff: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _name_exists(self) -> TeaCache:
        if isinstance(self.coefficients, str) and self.coefficients not in POLYNOMIALS:
            raise ConflictError(
                (
                    ("coefficients",),
                    f"key 'coefficients': no polynomial is called {self.coefficients!r}; give numbers, or one of "
                    f"{', '.join(POLYNOMIALS)}",
                )
            )
        return self

    @property
    def polynomial(self) -> tuple[float, ...]:
        return POLYNOMIALS[self.coefficients] if isinstance(self.coefficients, str) else self.coefficients

    @property
    def exact(self) -> bool:
        """Whether the decisions follow from the weights and the timesteps, with no calibration."""
        return self.signal == "time_embedding"


@dataclass(frozen=True)
class ExactDecisions:
    """Decisions that no data can change, by the timesteps of the trajectory that they are for."""

    computed: Mapping[tuple[float, ...], tuple[bool, ...]]


def marks(cache: TeaCache, layout: Layout) -> tuple[Mark, ...]:
    """One site for each branch: what the whole stack of blocks adds. Raises ExportError where there are no blocks."""
    if not layout.of("block"):
        raise ExportError(
            "cache.method 'teacache' skips a model's transformer blocks, and this model has none of its own"
        )
    return tuple(layout.residual(branch, 0, len(layout.blocks(branch))) for branch in layout.branches)


def decision(cache: TeaCache, layout: Layout, history: Sequence[Mapping[str, bool]]) -> Decision:
    """The last entry of `history` says which branches compute; the others add their last residual again."""
    pairs = zip(layout.branches, marks(cache, layout), strict=True)
    return Decision.reuse(*(mark for branch, mark in pairs if not history[-1].get(branch, True)))


def schedule(cache: TeaCache, layout: Layout, trajectory: Trajectory, calibration: Any) -> Schedule:
    """The decisions made exactly, or by at least `cache.quorum` of the calibration's runs.

    Raises ExportError where neither is there for these timesteps.
    """
    history = decision_history(cache, layout, trajectory, calibration)
    decisions = tuple(decision(cache, layout, history[: e + 1]) for e in range(len(history)))
    return Schedule(marks(cache, layout), decisions)


def decision_history(
    cache: TeaCache, layout: Layout, trajectory: Trajectory, calibration: Any
) -> tuple[dict[str, bool], ...]:
    """The branches that compute, evaluation by evaluation."""
    if not isinstance(calibration, ExactDecisions):
        return freeze_decisions(calibration, cache, layout.branches, trajectory.timesteps)
    if trajectory.timesteps not in calibration.computed:
        raise ExportError(
            f"cache.signal 'time_embedding': decided from the model's weights at export, for other timesteps than these "
            f"{len(trajectory.timesteps)}; export again with these steps"
        )
    return tuple(dict.fromkeys(layout.branches, c) for c in calibration.computed[trajectory.timesteps])
