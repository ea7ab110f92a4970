"""What diffusers' pipelines have and a replayed one has not: `pipe.scheduler = ...`, `pipe.load_lora_weights(...)`, `pipe.to(...)`.

Each would change nothing here, so reading or setting it raises, with the way to have it. The error is an AttributeError too, as
`hasattr` and `getattr` want it.
"""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

import torch

from ..errors import RequestError

WAYS_OUT = (
    (
        ("scheduler",),
        "its schedules were tabulated at export; `prebake plan` adds a number of steps, a recipe's sampler.scheduler another scheduler",
    ),
    (
        [
            "components",
            "transformer",
            "unet",
            "vae",
            "image_processor",
            "video_processor",
            "text_encoder",
            "text_encoder_2",
            "text_encoder_3",
            "tokenizer",
            "tokenizer_2",
            "tokenizer_3",
            "image_encoder",
            "feature_extractor",
        ],
        "an artifact holds compiled graphs, not modules; change the diffusers pipeline, and export that",
    ),
    (
        [
            "load_lora_weights",
            "fuse_lora",
            "unfuse_lora",
            "unload_lora_weights",
            "set_adapters",
            "delete_adapters",
            "enable_lora",
            "disable_lora",
            "load_textual_inversion",
            "load_ip_adapter",
            "set_ip_adapter_scale",
            "unload_ip_adapter",
            "load_adapter",
            "add_adapter",
        ],
        "its weights were fixed at export; load it into the diffusers pipeline, call fuse_lora() there, and export that",
    ),
    (
        [
            "enable_model_cpu_offload",
            "enable_sequential_cpu_offload",
            "enable_group_offload",
            "maybe_free_model_hooks",
            "remove_all_hooks",
            "reset_device_map",
        ],
        "give load() offload=True, which keeps what runs once for a prompt in the host's memory",
    ),
    (
        [
            "enable_vae_slicing",
            "disable_vae_slicing",
            "enable_vae_tiling",
            "disable_vae_tiling",
            "enable_attention_slicing",
            "disable_attention_slicing",
            "enable_xformers_memory_efficient_attention",
            "enable_freeu",
            "disable_freeu",
            "fuse_qkv_projections",
            "unfuse_qkv_projections",
            "upcast_vae",
            "enable_parallelism",
        ],
        "what it computes was fixed at export; a recipe says how (docs/reference/recipe.md)",
    ),
    (("encode_prompt",), "give the call its prompts, or prompt_embeds"),
    (("prepare_latents",), "give the call latents, or a seed"),
    (("check_inputs",), "the call checks its arguments itself"),
    (("from_pretrained", "from_single_file", "from_pipe", "download"), "prebake.runtime.load opens an artifact"),
    (("save_pretrained", "push_to_hub"), "an artifact is a folder already; copy it, or run `prebake push`"),
    (
        ("safety_checker", "run_safety_checker", "watermark"),
        "an artifact has none; look at the pictures after the call",
    ),
    (("progress_bar",), "pipe.set_progress_bar_config says how the call shows its own"),
    (
        ("_num_timesteps", "_clip_skip", "_cross_attention_kwargs", "_joint_attention_kwargs", "_attention_kwargs"),
        "in a callback, _interrupt, _guidance_scale and _guidance_rescale may be set, and latents be returned",
    ),
)
"""Names of diffusers' pipelines, and how what they do is had here."""


class AbsentAttributeError(RequestError, AttributeError):
    """An attribute that a pipeline has not."""


def absent_attribute_error(kind: str, name: str, known: Collection[str]) -> AbsentAttributeError:
    """The error for reading or setting an attribute that a pipeline of class `kind` has not; `known` are those that it has."""
    for names, way_out in WAYS_OUT:
        if name in names:
            return AbsentAttributeError(f"{name}: {kind} has no such attribute, for {way_out}")
    near = get_close_matches(name, known, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    return AbsentAttributeError(f"{name}: {kind} has no such attribute, and setting one would change nothing{meant}")


def refuse_move(asked: tuple[Any, ...], device: torch.device, precision: str) -> None:
    """Raises RequestError for a device or dtype, as `pipe.to` takes them, that is not the artifact's own."""
    for each in asked:
        if isinstance(each, torch.dtype):
            if str(each) != f"torch.{precision}":
                raise RequestError(
                    f"to({each}): the artifact was compiled with a denoiser in {precision or 'a precision of its own'}; export again "
                    f"with precision.denoiser={str(each).removeprefix('torch.')}"
                )
            continue
        try:
            place = torch.device(each)
        except (RuntimeError, TypeError) as e:
            raise RequestError(f"to({each!r}): expected a device or a dtype of torch") from e
        if place.type != device.type or place.index not in (None, device.index):
            raise RequestError(
                f"to({str(place)!r}): the artifact was compiled for {device}, where it is; export again with compile.device={place.type}"
                if place.type != device.type
                else f"to({str(place)!r}): it is on {device}; load it there, inside torch.cuda.device({place.index})"
            )
