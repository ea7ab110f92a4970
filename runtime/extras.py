"""What to install where a package is missing: prebake's own metadata says which of its extras brings it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires

BUILD_SUFFIX = r"(-gpu|-cu\d+)?"
"""How distributions that are the same package, built for other devices, are named after it."""
EXTRA_PATTERN = re.compile(r"""^(?P<name>[A-Za-z0-9._-]+).*;.*\bextra\s*==\s*["'](?P<extra>[^"']+)["']""")


def install_command(module: str) -> str:
    """The command that brings a module: `pip install 'prebake[ort]'`, one for each extra that has a build of it, and of a
    module of none of them, or where prebake is not installed, the module's own name."""
    package = module.partition(".")[0].replace("_", "-")
    try:
        found = [match for line in requires("prebake") or () if (match := EXTRA_PATTERN.match(line))]
    except PackageNotFoundError:
        found = []
    named = re.compile(re.escape(package) + BUILD_SUFFIX, re.IGNORECASE)
    extras = [m["extra"] for m in found if named.fullmatch(re.sub(r"[._-]+", "-", m["name"]))]
    return " or ".join(f"pip install 'prebake[{extra}]'" for extra in extras) or f"pip install {package}"
