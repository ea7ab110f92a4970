"""A call's request: what the caller asked for, read and compared with what the artifact has.

`RequestReader` has the arguments of a pipeline's call come in and gives a `Request`, which nothing changes any more. Whoever draws it
(`drawing.py`) finds nothing left to refuse but what only the prompts, the pictures and the noise show.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..artifact import Artifact
from ..call.arguments import (
    real_number,
    real_number_or_none,
    truth_value,
    unknown_argument_error,
    whole_number,
    whole_number_or_none,
)
from ..call.sizes import refuse_other_size
from ..errors import RequestError
from ..families import Family
from ..finite import refuse_nonfinite
from ..noise import Generators
from ..plan import Plan
from ..process.default_device import CPU, default_device
from ..replay import PlanTables
from ..start import StartRequest, steps_to_skip, tables_until

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Request:
    """A call's arguments, checked. `given` are those that say what to draw, `plan` is the part that the call takes of the
    artifact's plan of that name, without its first `skipped` steps, and `count` how many pictures to make for each prompt."""

    family: Family
    plan_name: str
    skipped: int
    plan: Plan
    given: dict[str, Any]
    guidance_scale: float
    start: StartRequest
    count: int
    seed: int | None = None
    generator: Generators = None
    output_type: str = "pil"

    def tables(self, artifact: Artifact, batch: int) -> PlanTables:
        """The plan's numbers for that many pictures together."""
        return plan_tables(artifact, self.plan_name, self.skipped, self.start, batch)


class RequestReader:
    """Reads the arguments of calls of one artifact. `known` are the arguments that every call takes, beside its family's."""

    def __init__(self, artifact: Artifact, families: Sequence[Family], known: Collection[str]):
        self._artifact = artifact
        self._families = families
        self._rules = families[0]
        self._known = known
        self._told_plans: set[str] = set()

    def read(
        self,
        given: dict[str, Any],
        *,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        num_videos_per_prompt: int | None = None,
        generator: Generators = None,
        seed: int | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        max_sequence_length: int | None = None,
        cache: bool = True,
    ) -> Request:
        """The request of a call with these arguments, `given` being prompts and what else its family takes. Raises RequestError for
        what the artifact was not exported for, naming what it has."""
        cache = truth_value("cache", cache)
        steps = whole_number_or_none("num_inference_steps", num_inference_steps)
        family = self._choose_size(height, width)
        self._check_length(num_frames, max_sequence_length)
        if output_type not in OUTPUT_TYPES:
            raise RequestError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        count = self._count(num_images_per_prompt, num_videos_per_prompt)
        given = self._check_given(given)
        strength = real_number_or_none("strength", strength)
        start = StartRequest(image, mask_image, strength, latents, family.window(given))
        plan_name, skipped = self._choose_plan(family, steps, cache, steps_to_skip(family, start))
        plan = plan_tables(self._artifact, plan_name, skipped, start, 1).plan
        if guidance_scale is None:
            guidance_scale = self._artifact.manifest.defaults.guidance_scale
        guidance_scale = real_number("guidance_scale", guidance_scale)
        for name, value in {
            **given,
            "guidance_scale": guidance_scale,
            "latents": latents,
            "image": image,
            "mask_image": mask_image,
        }.items():
            refuse_nonfinite(name, value)
        return Request(
            family, plan_name, skipped, plan, given, guidance_scale, start, count, seed, generator, output_type
        )

    def read_all(self, arguments: dict[str, Any]) -> Request:
        """The same of all arguments in one."""
        said = {name: value for name, value in arguments.items() if name in REQUEST_ARGUMENTS}
        return self.read({name: value for name, value in arguments.items() if name not in said}, **said)

    def _choose_size(self, height: int | None, width: int | None) -> Family:
        """The rules of that size; what is not given is the default's. Raises RequestError with the nearest two sizes."""
        defaults = self._artifact.manifest.defaults
        height, width = whole_number_or_none("height", height), whole_number_or_none("width", width)
        size = (defaults.height if height is None else height, defaults.width if width is None else width)
        sizes, legal = [(family.height, family.width) for family in self._families], self._artifact.manifest.range
        refuse_other_size(size, sizes, legal, self._rules.output_kind)
        return self._rules.at(*size) if legal else self._families[sizes.index(size)]

    def _check_length(self, num_frames: int | None, max_sequence_length: int | None) -> None:
        defaults, length = self._artifact.manifest.defaults, self._rules.max_sequence_length
        num_frames = whole_number_or_none("num_frames", num_frames)
        max_sequence_length = whole_number_or_none("max_sequence_length", max_sequence_length)
        if num_frames not in (None, defaults.num_frames):
            only = "makes pictures" if defaults.num_frames is None else f"makes {defaults.num_frames} frames only"
            raise RequestError(f"num_frames={num_frames}: the artifact {only}; export again for another number")
        if max_sequence_length not in (None, length):
            raise RequestError(
                f"max_sequence_length={max_sequence_length}: the artifact was exported for {length} tokens"
            )

    def _count(self, images: int, videos: int | None) -> int:
        """How many to make for each prompt, by either of diffusers' names."""
        if videos is not None and (images != 1 or self._rules.output_kind == "images"):
            raise RequestError(
                f"num_videos_per_prompt={videos}: expected num_images_per_prompt alone, which every artifact takes"
            )
        name, count = ("images", images) if videos is None else ("videos", videos)
        count = whole_number(f"num_{name}_per_prompt", count)
        if count < 1:
            raise RequestError(f"num_{name}_per_prompt={count}: expected 1 or more")
        return count

    def _check_given(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the caller said of what to draw. Raises RequestError for what the family does not know."""
        given = {name: value for name, value in arguments.items() if value is not None}
        if foreign := [name for name in given if name not in self._rules.arguments]:
            known = dict.fromkeys((*self._rules.arguments, *self._known))
            raise unknown_argument_error(foreign[0], f"an artifact of {self._artifact.manifest.source.pipeline}", known)
        return given

    def _choose_plan(
        self, family: Family, steps: int | None, cache: bool, skipped: Callable[[Plan], int]
    ) -> tuple[str, int]:
        """The plan for that number of steps, with its cache or without, and how many of them the call leaves out."""
        artifact = self._artifact
        usual = artifact.manifest.defaults.num_inference_steps
        name = artifact.plan_name(usual if steps is None else steps, cache, family.size)
        if name in artifact.manifest.unverified and name not in self._told_plans:
            self._told_plans.add(name)
            warnings.warn(
                f"plan {name} of {artifact.folder} was added since its export, and never compared with the pipeline; "
                f"`prebake verify {artifact.folder} --source` does that",
                stacklevel=4,  # where the pipeline is called
            )
        name = artifact.plan_at(name, family.height, family.width)
        return name, skipped(artifact.find_plan(name))


REQUEST_ARGUMENTS = tuple(
    name
    for name, parameter in inspect.signature(RequestReader.read).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)
"""What `RequestReader.read` takes by name: all but what the family's own arguments say."""


def plan_tables(artifact: Artifact, name: str, skipped: int, start: StartRequest, batch: int) -> PlanTables:
    """The numbers of the plan of that name for that many pictures, over the part of it that a call takes."""
    with default_device(CPU):
        return tables_until(artifact.tables_from(name, skipped, batch), start.window.end)
