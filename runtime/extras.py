"""What to install where a package is missing, and which versions of it were tried: prebake's own metadata says which of its
extras brings it, and in which range. That range stands in `pyproject.toml` and nowhere else."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

BUILD_SUFFIX = r"(-gpu|-cu\d+)?"
"""How distributions that are the same package, built for other devices, are named after it."""
EXTRA_PATTERN = re.compile(r"""^(?P<name>[A-Za-z0-9._-]+)(?P<range>[^;]*);.*\bextra\s*==\s*["'](?P<extra>[^"']+)["']""")


def install_command(module: str) -> str:
    """The command that brings a module: `pip install 'prebake[ort]'`, one for each extra that has a build of it, and of a
    module of none of them, or where prebake is not installed, the module's own name."""
    package = module.partition(".")[0].replace("_", "-")
    named = re.compile(re.escape(package) + BUILD_SUFFIX, re.IGNORECASE)
    extras = [m["extra"] for m in extra_requirements() if named.fullmatch(re.sub(r"[._-]+", "-", m["name"]))]
    return " or ".join(f"pip install 'prebake[{extra}]'" for extra in extras) or f"pip install {package}"


def first_untried_version(distribution: str) -> str | None:
    """The first version that is past what was tried: `1.33` where an extra has `onnxruntime>=1.31,<1.33`. None where prebake is
    not installed, so that nothing is known of it."""
    ranges = [m["range"] for m in extra_requirements() if m["name"] == distribution]
    return next((end[1] for text in ranges if (end := re.search(r"<\s*([\w.]+)", text))), None)


def extra_requirements() -> list[re.Match[str]]:
    """What the extras require; nothing where prebake is not installed."""
    try:
        return [match for line in requires("prebake") or () if (match := EXTRA_PATTERN.match(line))]
    except PackageNotFoundError:
        return []
