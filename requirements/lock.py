"""What `make lock` runs: writes lock.txt, the newest version of everything that pyproject.toml's `dev` allows, as constraints for pip.

    python requirements/lock.py TORCH

pip resolves without installing, first for the oldest Python, which is the one that runs this, then for each newer one, held to what
the older ones took: one file is right for all. For a newer one it takes wheels alone, so it is not asked again for what has none.
It judges `python_version` in other packages' requirements by the Python that it runs on, whichever it resolves for.

TORCH is the version of torch that it resolves with. torch itself is not locked, nor what only some of its builds need: which build
there is depends on the machine, and the Makefile's TORCH says which version.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LOCK = FOLDER / "lock.txt"
PYTHONS = ("3.11", "3.12", "3.13")
OLDEST = (3, 11)
TOOLS = ("pip", "setuptools")
"""What installs the rest, and builds prebake."""
OF_A_BUILD = re.compile(r"torch|triton|(nvidia|cuda)-.*")
NAME = re.compile(r"[A-Za-z0-9._-]+")
HEAD = f"""\
# Written by `make lock`: what `make` installs, as constraints for pip. For Python {PYTHONS[0]} to {PYTHONS[-1]} on Linux, x86-64.
# torch is not among it: its version is the Makefile's TORCH.
"""


def requirements(extra: str) -> Iterator[str]:
    """What prebake requires with an extra, as pyproject.toml has it; its extras of its own followed."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text("utf-8"))["project"]
    yield from project["dependencies"]
    ahead = [extra]
    while ahead:
        for requirement in project["optional-dependencies"][ahead.pop()]:
            if own := re.fullmatch(r"prebake\[([\w,-]+)\]", requirement):
                ahead += own[1].split(",")
            else:
                yield requirement


def resolved(wanted: list[str], held: dict[str, str], *options: str) -> dict[str, Any]:
    """Distribution -> what pip's report says of it, for all that pip would install. Raises CalledProcessError where it finds no way."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints.txt"), Path(folder, "report.json")
        constraints.write_text(lines(held), "utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", folder]
        files = ["--constraint", str(constraints), "--report", str(report)]
        subprocess.run([*pip, "--dry-run", "--ignore-installed", *files, *options, *wanted], check=True)
        found = json.loads(report.read_text("utf-8"))["install"]
    named = {canonical(each["metadata"]["name"]): each for each in found}
    return {name: each for name, each in named.items() if not OF_A_BUILD.fullmatch(name)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(found: dict[str, Any]) -> dict[str, str]:
    return {name: each["metadata"]["version"] for name, each in found.items()}


def lines(locked: dict[str, str]) -> str:
    return "".join(f"{name}=={version}\n" for name, version in sorted(locked.items()))


def main(torch: str) -> None:
    if sys.version_info[:2] != OLDEST:
        sys.exit(
            f"run it with Python {PYTHONS[0]}, whose choice of versions is the smallest: make lock PYTHON=python{PYTHONS[0]}"
        )
    wanted = [*TOOLS, f"torch=={torch}", *requirements("dev")]
    print(f"resolving for Python {PYTHONS[0]}", flush=True)
    found = resolved(wanted, {})
    locked = versions(found)
    built = {name for name, each in found.items() if not each["download_info"]["url"].endswith(".whl")}
    wheels = [each for each in wanted if canonical(NAME.match(each)[0]) not in built]
    for python in PYTHONS[1:]:
        print(f"{len(locked)} versions; whether Python {python} has them", flush=True)
        locked |= versions(resolved(wheels, locked, "--python-version", python, "--only-binary", ":all:"))
    LOCK.write_text(HEAD + lines(locked), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
