"""Trains the embedded model: `python -m prebake.exporter.shapes.train --out DIR`.

One command, one core, seeded. DIR/work keeps a checkpoint for each stage, so the same command goes on after a stop;
DIR/model is the finished `FluxPipeline.save_pretrained` folder, with `prebake.toml` for its defaults.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from . import flow, text, vae

DEFAULTS = """\
# What this pipeline is called with unless the caller says otherwise.
[defaults]
height = 64
width = 64
max_sequence_length = 16
num_inference_steps = 28
guidance_scale = 3.5
"""


def train_flux_pipeline(out: Path) -> FluxPipeline:
    """The trained pipeline in float32; also saved to `out`/model in bfloat16."""
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    codec = vae.train_vae(work)
    encoders = text.train_encoders(work)
    pool = flow.make_flux_pool(work, codec, encoders)
    flux = flow.train_transformer(work, pool)
    pipeline = assemble_flux_pipeline(codec, encoders, flux)
    save_flux_pipeline(pipeline, out / "model")
    return pipeline


def assemble_flux_pipeline(codec, encoders, flux) -> FluxPipeline:
    """The parts as an ordinary pipeline; the scheduler is FLUX.1-dev's, with dynamic shifting."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=3.0,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=codec,
        text_encoder=encoders.clip,
        tokenizer=encoders.clip_tokenizer,
        text_encoder_2=encoders.t5,
        tokenizer_2=encoders.t5_tokenizer,
        transformer=flux,
    )


def save_flux_pipeline(pipeline: FluxPipeline, folder: Path) -> None:
    """Writes the folder that `FluxPipeline.from_pretrained` reads: transformer and VAE in bfloat16.

    The text encoders stay in float32: transformers loads what is stored, diffusers loads float32, and they must agree.
    """
    halved = {name: copy.deepcopy(part) for name, part in pipeline.components.items() if part is not None}
    for name in ("transformer", "vae"):
        halved[name].to(torch.bfloat16)
    FluxPipeline(**halved).save_pretrained(folder)
    (folder / "prebake.toml").write_text(DEFAULTS, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the finished model")
    torch.set_num_threads(1)
    train_flux_pipeline(parser.parse_args().out)


if __name__ == "__main__":
    main()
