"""Two small, really trained text-to-image pipelines, their world, its checker and their training scripts."""

from pathlib import Path

SHAPES_FOLDER = Path(__file__).parent
MODEL_FOLDER = SHAPES_FOLDER / "model"
SD_MODEL_FOLDER = SHAPES_FOLDER / "model_sd"
PROMPTS_FOLDER = SHAPES_FOLDER / "prompts"


def read_prompt_set(name: str) -> list[str]:
    """The lines of a committed prompt set, `full` (256) or `underspecified` (64); a line's seed is its index."""
    return (PROMPTS_FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
