"""Run as a process of its own: `python export_faults.py WORK WHAT` exports a tiny pipeline, by the backend of `tests/backends`, which
needs no compiler, while something goes wrong. Prints what came of it, as JSON.

    killed    a child dies at every line of progress that an export has, and at every end of a stage
    full      the disk, WORK/disk, has room for ever more of the artifact, and in the end for all of it
    nan       one weight is not a number
    two       two exports to one output, without --force and with it
    once      nothing goes wrong
"""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from prebake.exporter import lower
from prebake.exporter.load import source
from prebake.exporter.pipeline import ExportOptions, export
from prebake.exporter.progress import Progress
from prebake.exporter.recipe.resolve import resolve
from prebake.runtime import backends
from prebake.runtime.check.artifact import check_artifact
from prebake.runtime.errors import PrebakeError
from prebake.runtime.manifest import read_manifest
from support.family_parity import PLAIN
from support.kill_points import killed
from support.paths import ROOT

TESTS = ROOT / "tests"
lower.__path__.append(str(TESTS / "support" / "backends" / "lower"))
backends.__path__.append(str(TESTS / "support" / "backends" / "opens"))
CHANGES = ("compile.backend=eager", "sampler.steps=2", "verify.seeds=1", 'verify.prompts=["a red circle"]')


class Moments(Progress):
    """Keeps every line of progress and every end of a stage, and kills this process at one of them."""

    def __init__(self, deadly: str | None = None):
        super().__init__()
        self.seen: list[str] = []
        self.deadly, self.current = deadly, ""

    @contextlib.contextmanager
    def stage(self, name: str, total: int = 1):
        self.current = name
        with super().stage(name, total):
            yield
        self.reached(f"{name} is done")

    def announce(self, what: str) -> None:
        self.reached(f"{self.current}: {what}")

    def reached(self, moment: str) -> None:
        self.seen.append(moment)
        if moment == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)


def run(output: Path, progress: Progress | None = None, *, force: bool = False) -> None:
    recipe = resolve("flux-fast", (*PLAIN, *CHANGES), "tiny:flux")
    export(recipe, output, ExportOptions(force=force), progress or Progress())


def said(work: Callable[[], object]) -> str:
    """The error, or nothing."""
    try:
        work()
    except PrebakeError as e:
        return f"{type(e).__name__}: {e}"
    return ""


def digests(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def once(work: Path) -> dict:
    """What is the same in every export."""
    run(work / "out")
    return {
        p: d for p, d in digests(work / "out").items() if not p.startswith(("reports/", "graphs/", "manifest.json"))
    }


def dying(work: Path) -> dict:
    progress = Moments()
    run(work / "old", progress)
    before, found = digests(work / "old"), {}
    for i, moment in enumerate(dict.fromkeys(progress.seen)):
        name = ("old", "new")[i % 2]  # an artifact that is replaced, and a name that nothing has
        ended = killed(partial(run, work / name, Moments(moment), force=True), lambda: None)
        changed = digests(work / "old") != before
        found[moment] = {"signal": ended, "old": "changed" if changed else "as it was", "new": left(work / "new")}
    leftovers = [p.name for p in work.iterdir() if p.name.startswith(".")]
    for name in ("old", "new"):
        run(work / name, force=True)
    return {
        "deaths": found,
        "leftovers": len(leftovers),
        "next": [left(work / "old"), left(work / "new")],
        "after that": sorted(p.name for p in work.iterdir()),
    }


def left(folder: Path) -> str:
    if not folder.exists():
        return "nothing"
    return "the whole" if not said(lambda: check_artifact(folder, read_manifest(folder))) else "a part"


def full(work: Path) -> list[dict]:
    disk, found = work / "disk", []
    for size in (0, 8, 64, 256, 1024, 2048, 4096, 65536):  # KiB
        subprocess.run(["mount", "-o", f"remount,size={max(size, 4)}k", disk], check=True)
        if not size:
            (disk / "ballast").write_bytes(bytes(4096))
        else:
            (disk / "ballast").unlink(missing_ok=True)
        error = said(lambda: run(disk / "out"))
        found.append(
            {"KiB": size, "said": error.replace(str(work), "WORK"), "left": sorted(p.name for p in disk.iterdir())}
        )
        if not error:
            break
    return found


def nan(work: Path) -> dict:
    load = source.load_model

    def poisoned(*args):
        loaded = load(*args)
        with torch.no_grad():
            loaded.pipe.transformer.proj_out.bias[3] = float("nan")
        return loaded

    source.load_model = poisoned
    return {"said": said(lambda: run(work / "out")), "left": [p.name for p in work.iterdir()]}


def two(work: Path) -> dict:
    found = {}
    for force in (False, True):
        children = []
        for _ in range(2):
            if (child := os.fork()) == 0:
                error = said(partial(run, work / f"out-{force}", force=force))
                (work / f"said-{force}-{os.getpid()}").write_text(error)
                os._exit(0)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        errors = sorted((work / f"said-{force}-{child}").read_text().replace(str(work), "WORK") for child in children)
        hidden = [p.name for p in work.iterdir() if p.name.startswith(".")]
        found[f"force {force}"] = {
            "codes": codes,
            "said": errors,
            "left": left(work / f"out-{force}"),
            "hidden": hidden,
        }
    return found


if __name__ == "__main__":
    what = {"killed": dying, "full": full, "nan": nan, "two": two, "once": once}[sys.argv[2]]
    print(json.dumps(what(Path(sys.argv[1]))))
