"""Measures the model cards' figures: `python -m prebake.exporter.shapes.evaluate [--model DIR] [--out figures.json]`.

Reads the committed prompt sets, a line's index being its seed, and calls the pipeline with the defaults of
`prebake.toml`; for a pipeline that is guided by a second evaluation, also with other scales. About three minutes on one
core for `model`, six for `model_sd`.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from . import MODEL_FOLDER, SHAPES_FOLDER, read_prompt_set
from .checker import accuracy, parse_prompt
from .world import Caption, loosen_caption, place_scene, render_scene, sample_caption

SHORTER_STEPS = {"FluxPipeline": (20, 14, 8, 4), "StableDiffusionPipeline": (21, 14, 10, 8)}  # than the default's steps
GUIDANCE_SCALES = {"FluxPipeline": (), "StableDiffusionPipeline": (1.0, 2.0, 5.0)}  # of guidance, beside the default's


def read_call_defaults(model: Path) -> dict:
    """The pipeline's call arguments from `model`/prebake.toml."""
    return tomllib.loads((model / "prebake.toml").read_text(encoding="utf-8"))["defaults"]


def draw_prompts(pipeline: DiffusionPipeline, texts: list[str], call: dict, batch: int = 32) -> np.ndarray:
    """Pictures of the prompts, [N, 64, 64, 3] float32 in 0..1; the seed of a picture is its prompt's index."""
    pictures = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        seeds = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        pictures.append(pipeline(part, generator=seeds, output_type="np", **call).images)
    return np.concatenate(pictures)


def mean_psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over pictures of the peak signal-to-noise ratio in dB, peak 1."""
    return float(np.mean(-10 * np.log10(np.maximum(((a - b) ** 2).mean((1, 2, 3)), 1e-12))))


def draw_prompt_sets() -> dict[str, list[str]]:
    """The two committed sets, drawn anew: 256 full prompts, and 64 in which at least three attributes are open."""
    rng = np.random.default_rng(20261122)
    full: list[str] = []
    while len(full) < 256:
        prompt = str(sample_caption(rng))
        if prompt not in full:
            full.append(prompt)
    loose: list[str] = []
    while len(loose) < 64:
        caption = loosen_caption(sample_caption(rng), rng, keep=0.4)
        if str(caption) not in loose and count_open_attributes(caption) >= 3:
            loose.append(str(caption))
    return {"full": full, "underspecified": loose}


def count_open_attributes(caption: Caption) -> int:
    """How many attributes the caption leaves open, of 5 for one object and 8 for two."""
    values = [v for t in caption.things for v in (t.shape, t.size, t.colour)]
    values += [caption.ground, caption.relation if len(caption.things) == 2 else caption.place]
    return sum(v is None for v in values)


def evaluate_model(model: Path) -> dict[str, float]:
    """The figures by name: shares in 0..1, PSNR in dB."""
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    call = read_call_defaults(model)
    full, open_ = read_prompt_set("full"), read_prompt_set("underspecified")
    figures = {}

    rng = np.random.default_rng(0)
    true = np.stack([render_scene(place_scene(parse_prompt(p), rng)) for p in full])
    figures |= _prefix_shares("ground_truth", accuracy(true, full))
    rebuilt = _rebuild_pictures(pipeline.vae, true)
    figures["vae_psnr_db"] = mean_psnr_db(rebuilt, true)
    figures |= _prefix_shares("vae", accuracy(rebuilt, full))

    reference = draw_prompts(pipeline, full, call)
    figures |= _prefix_shares(f"full_{call['num_inference_steps']}_steps", accuracy(reference, full))
    for steps in (14, 8):
        pictures = draw_prompts(pipeline, full, call | {"num_inference_steps": steps})
        figures |= _prefix_shares(f"full_{steps}_steps", accuracy(pictures, full))
        figures[f"full_{steps}_steps_psnr_db"] = mean_psnr_db(pictures, reference)

    reference = draw_prompts(pipeline, open_, call)
    figures |= _prefix_shares("underspecified", accuracy(reference, open_))
    for steps in SHORTER_STEPS[type(pipeline).__name__]:
        pictures = draw_prompts(pipeline, open_, call | {"num_inference_steps": steps})
        figures[f"underspecified_{steps}_steps_psnr_db"] = mean_psnr_db(pictures, reference)
    for scale in GUIDANCE_SCALES[type(pipeline).__name__]:
        pictures = draw_prompts(pipeline, full, call | {"guidance_scale": scale, "num_inference_steps": 14})
        figures[f"full_14_steps_guidance_{scale}_exact"] = accuracy(pictures, full)["exact"]
    return figures


def _prefix_shares(prefix: str, shares: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": share for name, share in shares.items()}


def _rebuild_pictures(vae, pictures: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1
    with torch.inference_mode():
        y = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in x.split(32)])
    return (y / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--out", type=Path, default=SHAPES_FOLDER / "figures.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {name: round(value, 4) for name, value in evaluate_model(args.model).items()}
    args.out.write_text(json.dumps(figures, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
