"""Trains the second embedded model, `shapes-sd`: `python -m prebake.exporter.shapes.train_sd --out DIR`.

The VAE and CLIP are those of the committed `model`, frozen; only the UNet is trained, on one core, seeded. DIR/work keeps
the checkpoint, so the same command goes on after a stop; DIR/model_sd is the finished
`StableDiffusionPipeline.save_pretrained` folder, with `prebake.toml` for its defaults.
"""

from __future__ import annotations

import argparse
import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from . import MODEL_FOLDER, unet

DEFAULTS = """\
# What this pipeline is called with unless the caller says otherwise.
[defaults]
height = 64
width = 64
num_inference_steps = 28
guidance_scale = 3.0
"""


def train_sd_pipeline(out: Path, *, stop_at: int | None = None) -> StableDiffusionPipeline:
    """The trained pipeline in float32; also saved to `out`/model_sd in bfloat16. `stop_at` ends early, without decay."""
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    codec = AutoencoderKL.from_pretrained(MODEL_FOLDER / "vae").eval().requires_grad_(False)
    clip = CLIPTextModel.from_pretrained(MODEL_FOLDER / "text_encoder").eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(MODEL_FOLDER / "tokenizer")
    pool = unet.make_unet_pool(work, codec, tokenizer)
    denoiser = unet.train_unet(work, pool, clip, stop_at=stop_at)
    pipeline = assemble_sd_pipeline(codec, clip, tokenizer, denoiser)
    save_sd_pipeline(pipeline, out / "model_sd")
    return pipeline


def assemble_sd_pipeline(codec, clip, tokenizer, denoiser) -> StableDiffusionPipeline:
    """The parts as an ordinary pipeline, without a safety checker."""
    return StableDiffusionPipeline(
        vae=fold_shift(codec),
        text_encoder=clip,
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=unet.build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def fold_shift(codec: AutoencoderKL) -> AutoencoderKL:
    """The codec with its `shift_factor` s in 1x1 convolutions, as StableDiffusionPipeline scales latents and never shifts.

    `quant_conv` is the identity less s on the mean, `post_quant_conv` the identity plus s, which padding does not see.
    """
    shift = torch.tensor(codec.config.shift_factor).bfloat16().float()  # as it will be stored
    config = {k: v for k, v in codec.config.items() if k != "_name_or_path"}  # it says where the codec lay here
    config |= {"shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True}
    folded = AutoencoderKL.from_config(config)
    n = codec.config.latent_channels
    quant = {"weight": torch.eye(2 * n)[..., None, None], "bias": torch.cat([-shift.expand(n), torch.zeros(n)])}
    post_quant = {"weight": torch.eye(n)[..., None, None], "bias": shift.expand(n)}
    folded.load_state_dict(
        codec.state_dict()
        | {f"quant_conv.{name}": value for name, value in quant.items()}
        | {f"post_quant_conv.{name}": value for name, value in post_quant.items()}
    )
    return folded.eval().requires_grad_(False)


def save_sd_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Writes the folder that `StableDiffusionPipeline.from_pretrained` reads: UNet and VAE in bfloat16, CLIP in float32."""
    halved = {name: copy.deepcopy(part) for name, part in pipeline.components.items()}
    for name in ("unet", "vae"):
        halved[name].to(torch.bfloat16)
    StableDiffusionPipeline(**halved, requires_safety_checker=False).save_pretrained(folder)
    shutil.copytree(
        MODEL_FOLDER / "tokenizer", folder / "tokenizer", dirs_exist_ok=True
    )  # without how it was loaded here
    (folder / "prebake.toml").write_text(DEFAULTS, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the finished model")
    parser.add_argument(
        "--stop-at", type=int, help="stop after this many steps, to look at a model that is half trained"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    train_sd_pipeline(args.out, stop_at=args.stop_at)


if __name__ == "__main__":
    main()
