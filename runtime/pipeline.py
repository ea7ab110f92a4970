"""The callable that an artifact becomes: `load("artifacts/x")("a red circle", seed=7).images[0]`.

It has diffusers' calling conventions, and its order: prompts to embeddings, noise, the loop, the decoder. Graphs are
compiled for a batch of one, so a batch is a loop over images; its noise is drawn at once all the same, and equals
what diffusers draws from the same generator.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from .artifact import Artifact, open_artifact
from .errors import ArtifactError
from .families import family_of
from .noise import Generators, chosen, draw
from .replay import StopReplay, Tables, ends_step, replay

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
Callback = Callable[["Pipeline", int, float, dict[str, torch.Tensor]], dict[str, torch.Tensor] | None]


def load(folder: str | Path, *, cache_dir: str | Path | None = None, hash_weights: bool = True) -> Pipeline:
    """The artifact in `folder`, checked, opened, and ready to be called.

    An artifact holds machine code: take it only from someone you trust. `cache_dir` is where that code is unpacked
    (default: `$XDG_CACHE_HOME/prebake`, private to the user). `hash_weights=False` skips hashing `weights/`, which is
    most of the time for large models. Raises ArtifactError with everything that is wrong, or does not fit this machine.
    """
    artifact = open_artifact(folder, cache_dir=cache_dir, hash_weights=hash_weights)
    if artifact.manifest.status == "failed":
        raise ArtifactError(
            f"{folder}: its verification failed, see reports/; export again, or use `prebake verify` to look closer"
        )
    return Pipeline(artifact)


class PipelineOutput(NamedTuple):
    """`images`: a list of PIL images, or an array or tensor over all images, as `output_type` says.

    It is also the plain tuple that diffusers gives for `return_dict=False`.
    """

    images: Any


class Pipeline:
    """An open artifact. One may be called from many threads: nothing of a call is kept here.

    A callback stops its own call by `pipe._interrupt = True`, as in diffusers.
    """

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self.family = family_of(artifact)
        self._decoder = artifact.graph("vae_decoder")
        self._variants, self._sites = artifact.variants, artifact.sites
        self._request = threading.local()

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        seed: int | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int | None = None,
        cache: bool = True,
    ) -> PipelineOutput:
        """Images for the prompt or prompts, `num_images_per_prompt` of each, prompt after prompt.

        `num_inference_steps` picks one of the artifact's plans, `cache=False` that plan without its cache. `seed` is
        short for `generator=torch.Generator().manual_seed(seed)`. `guidance_scale` has no effect where the model takes
        none, as in diffusers. The arguments that say what to draw are those of the artifact's family, `family.arguments`;
        one `negative_prompt` may stand for all. `latents` are as the family's pipeline has them, FLUX's packed, and so is
        the output of `output_type="latent"`. What changes the text encoder or the scheduler (`clip_skip`, `eta`,
        `guidance_rescale`, ...) is no argument here: that was fixed at export.
        `callback_on_step_end(pipe, step, timestep, {"latents": [1, ...]})` is called after each step of each image; the
        latents that it returns replace the loop's. An interrupted call gives the images up to the interrupted one.
        `return_dict` may be given and changes nothing: the output is a tuple either way.

        Raises ArtifactError for what the artifact was not exported for, naming what it has.
        """
        tables = self._tables(num_inference_steps, cache)
        self._check_size(height, width, max_sequence_length)
        self._check_choices(output_type, num_images_per_prompt, callback_on_step_end_tensor_inputs)

        given = self._given(
            prompt=prompt,
            prompt_2=prompt_2,
            negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled_prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
        )
        if guidance_scale is None:
            guidance_scale = self.artifact.manifest.defaults.guidance_scale
        conditions = self.family.conditions(given, guidance_scale)
        conditions = [c for c in conditions for _ in range(num_images_per_prompt)]
        generator = chosen(seed, generator, len(conditions))
        start = self._start(latents, len(conditions), generator, tables)
        noise = self._noise(tables, start.shape, generator)

        self._interrupt = False
        after = self._after_evaluation(tables, callback_on_step_end, callback_on_step_end_tensor_inputs)
        finals = []
        for i, condition in enumerate(conditions):
            draws = [z[i : i + 1] for z in noise]
            x = start[i : i + 1]
            finals.append(replay(tables, self._variants, self._sites, condition, x, noise=draws, on_evaluation=after))
            if self._interrupt:
                break
        return PipelineOutput(self._decode(finals, output_type))

    @property
    def interrupt(self) -> bool:
        """Whether the call that this thread is in has been told to stop."""
        return self._interrupt

    @property
    def _interrupt(self) -> bool:
        return getattr(self._request, "interrupt", False)

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._request.interrupt = value

    # --- what the caller asked for, against what the artifact has -----------------------------------------------

    def _tables(self, steps: int | None, cache: bool) -> Tables:
        """The plan for that number of steps, with its cache or without."""
        plans = self.artifact.tables
        steps = self.artifact.manifest.defaults.num_inference_steps if steps is None else steps
        name = str(steps)
        if not cache and name in plans and plans[name].plan.cache != "none":
            name += "-uncached"
        if name not in plans:
            asked = f"num_inference_steps={steps}" + ("" if cache else ", cache=False")
            raise ArtifactError(
                f"{asked}: the artifact has the plans {', '.join(plans)}; export again with another one"
            )
        return plans[name]

    def _check_size(self, height: int | None, width: int | None, max_sequence_length: int | None) -> None:
        defaults, length = self.artifact.manifest.defaults, self.family.max_sequence_length
        if (height or defaults.height, width or defaults.width) != (defaults.height, defaults.width):
            raise ArtifactError(
                f"height={height}, width={width}: the artifact makes images of height {defaults.height}, "
                f"width {defaults.width} only; export again for another size"
            )
        if max_sequence_length not in (None, length):
            raise ArtifactError(
                f"max_sequence_length={max_sequence_length}: the artifact was exported for {length} tokens"
            )

    def _check_choices(self, output_type: str, images: int, callback_inputs: Sequence[str]) -> None:
        if output_type not in OUTPUT_TYPES:
            raise ArtifactError(f"output_type={output_type!r}: expected one of {', '.join(OUTPUT_TYPES)}")
        if images < 1:
            raise ArtifactError(f"num_images_per_prompt={images}: expected 1 or more")
        if unknown := [name for name in callback_inputs if name != "latents"]:
            raise ArtifactError(
                f"callback_on_step_end_tensor_inputs: {unknown[0]!r} is not a tensor of the loop; it has latents"
            )

    def _given(self, **arguments: Any) -> dict[str, Any]:
        """What the caller said of what to draw. Raises ArtifactError for what the family does not know."""
        given = {name: value for name, value in arguments.items() if value is not None}
        if foreign := [name for name in given if name not in self.family.arguments]:
            raise ArtifactError(
                f"{foreign[0]}: an artifact of {self.artifact.manifest.source.pipeline} does not take it; "
                f"it takes {', '.join(self.family.arguments)}"
            )
        return given

    # --- noise and images ---------------------------------------------------------------------------------------

    def _start(self, latents: torch.Tensor | None, batch: int, generator: Generators, tables: Tables) -> torch.Tensor:
        """The latents before the first step, float32 [B, ...] on the artifact's device."""
        shape = (batch, *self.family.latents_shape)
        if latents is None:
            latents = self.family.draw_latents(batch, generator)
        elif tuple(latents.shape) != shape:
            raise ArtifactError(
                f"latents: expected {self.family.latents_name} {list(shape)}, got {list(latents.shape)}"
            )
        latents = latents.to(self.artifact.device, torch.float32).contiguous()
        return latents if tables.plan.init_noise_sigma == 1.0 else latents * tables.plan.init_noise_sigma

    def _noise(self, tables: Tables, shape: torch.Size, generator: Generators) -> list[torch.Tensor]:
        """A draw [B, ...] for each evaluation that adds noise, in the order in which diffusers draws them."""
        noisy = [e for e in tables.plan.evaluations if e.update.noise]
        return [draw(tuple(shape), generator).to(self.artifact.device) for _ in noisy]

    def _decode(self, finals: list[torch.Tensor], output_type: str) -> Any:
        if output_type == "latent":
            return torch.cat(finals)
        images = torch.cat(
            [self._decoder({"latents": x.contiguous()})["image"] for x in finals]
        )  # [B, 3, H, W] in [0, 1]
        if output_type == "pt":
            return images
        array = images.permute(0, 2, 3, 1).float().cpu().numpy()  # [B, H, W, 3]
        if output_type == "np":
            return array
        return [Image.fromarray(x) for x in (array * 255).round().astype(np.uint8)]

    def _after_evaluation(
        self, tables: Tables, callback: Callback | None, callback_inputs: Sequence[str]
    ) -> Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None] | None:
        """The caller's callback as `replay` wants it, or None."""
        if callback is None:
            return None

        def after_evaluation(e: int, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
            if not ends_step(tables.plan, e):
                return None
            evaluation = tables.plan.evaluations[e]
            returned = (
                callback(self, evaluation.step, evaluation.timestep, dict.fromkeys(callback_inputs, latents)) or {}
            )
            if unknown := sorted(returned.keys() - {"latents"}):
                raise ArtifactError(f"callback_on_step_end returned {unknown[0]!r}; only latents can be replaced")
            latents = returned.get("latents", latents)
            if self._interrupt:
                raise StopReplay(latents)
            return latents

        return after_evaluation
