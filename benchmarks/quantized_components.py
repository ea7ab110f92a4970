"""What int8 in text encoders and VAE costs the picture, and what it saves: artifacts of one model, with it and without.

    python benchmarks/quantized_components.py --model shapes --backend onnxruntime

Everything else is float32, without a cache, so that nothing else differs. Each artifact draws the model's own prompts with the same
seeds; PSNR is against the pictures of the artifact without int8, mean and worst, and bytes are those of the component's weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import figures
import numpy as np

from prebake.exporter.load.prompts import picture_prompts
from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.progress import open_progress
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime import load
from prebake.runtime.manifest import read_manifest
from prebake.runtime.text import align_columns, format_bytes, weights_bytes

PLAIN = (
    "precision.denoiser=float32",
    "precision.text_encoders=float32",
    "precision.vae=float32",
    "cache.method=none",
    "quantize.method=none",
)
TRIED = (
    ("text_encoder", "quantize.text_encoders=int8_weight_only"),
    ("text_encoder", "quantize.text_encoders=int8_dynamic"),
    ("vae_decoder", "quantize.vae=int8_weight_only"),
)


def export_artifact(model: str, backend: str, setting: str, folder: Path) -> Path:
    """The artifact with this setting, made where it is not there."""
    artifact = folder / setting.replace("=", "-")
    if not artifact.exists():
        recipe = resolve(
            "flux-fast", (*PLAIN, f"compile.backend={backend}", *([setting] if "=" in setting else [])), model
        )
        with open_progress("quiet") as quiet:
            export(recipe, artifact, ExportOptions(verify=False), quiet)
    return artifact


def draw_pictures(artifact: Path, prompts: Sequence[str], seeds: int) -> list[np.ndarray]:
    pipe = load(artifact)
    return [np.asarray(pipe(p, seed=s, output_type="np").images[0]) for p in prompts for s in range(seeds)]


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    """Of pictures in 0 .. 1; 120 where they are equal."""
    return float(-10 * np.log10(max(np.mean((a.astype(np.float64) - b) ** 2), 1e-12)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--backend", default="aoti", choices=("aoti", "onnxruntime"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where artifacts are kept, and found again")
    parser.add_argument("--output", type=Path, help="a JSON file of the figures")
    args = parser.parse_args()
    prompts = picture_prompts(resolve("flux-fast", PLAIN, args.model))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        plain = export_artifact(args.model, args.backend, "none", folder)
        expected, before = draw_pictures(plain, prompts, args.seeds), weights_bytes(read_manifest(plain))
        found = {}
        for component, setting in TRIED:
            artifact = export_artifact(args.model, args.backend, setting, folder)
            db = [psnr_db(*pair) for pair in zip(draw_pictures(artifact, prompts, args.seeds), expected, strict=True)]
            after = weights_bytes(read_manifest(artifact))
            found[setting] = {
                "psnr_db": float(np.mean(db)),
                "psnr_db_median": float(np.median(db)),
                "psnr_db_min": min(db),
                "pictures": len(db),
                "bytes": [before[component], after[component]],
            }
    rows = [
        (
            setting,
            *(f"{told[key]:.1f} dB" for key in ("psnr_db", "psnr_db_median", "psnr_db_min")),
            *map(format_bytes, told["bytes"]),
        )
        for setting, told in found.items()
    ]
    print(
        *align_columns([("", "mean", "median", "worst", "bytes before", "after"), *rows], right=range(1, 6)), sep="\n"
    )
    figures.save_figures({"settings": found}, args.output)


if __name__ == "__main__":
    main()
