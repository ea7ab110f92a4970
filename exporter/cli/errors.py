"""The packages that a command may lack."""

from __future__ import annotations

EXPORT_EXTRA = (
    "diffusers",
    "transformers",
    "torchao",
    "accelerate",
    "sentencepiece",
    "google",
    "rich",
    "skimage",
    "matplotlib",
    "jinja2",
    "setuptools",
    "shtab",
)


def missing_extra(error: Exception, command: str) -> str | None:
    """What to install, where that is what the error is about."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXPORT_EXTRA:
        return None
    return f"`prebake {command}` needs {package}: pip install 'prebake[export]'"
