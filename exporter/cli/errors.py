"""What a command says on stderr."""

from __future__ import annotations

import sys

from ...runtime.cli.streams import print_lines

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
)


def missing_extra(error: Exception, command: str) -> str | None:
    """What to install, where that is what the error is about."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in EXPORT_EXTRA:
        return None
    return f"`prebake {command}` needs {package}: pip install 'prebake[export]'"


def print_errors(message: str) -> None:
    print_lines(*(f"prebake: error: {line}" for line in message.split("\n")), file=sys.stderr)
