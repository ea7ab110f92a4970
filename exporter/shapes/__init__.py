"""Two small, really trained text-to-image pipelines, their world, its checker and their training scripts."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
SD_MODEL = FOLDER / "model_sd"
PROMPTS = FOLDER / "prompts"


def prompts(name: str) -> list[str]:
    """The lines of a committed prompt set, `full` (256) or `underspecified` (64); a line's seed is its index."""
    return (PROMPTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
