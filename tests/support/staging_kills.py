"""Run as a process of its own: `python staging_kills.py WORK` writes an artifact's folder as an export does, again and again, each
time in a child that is killed a step later than the one before.

What lies at the output is `nothing`, or an artifact that is replaced, `old`; the file system can `exchange` two names, or not.
Prints for each of the four what each death has left, and what the next run makes of it, as JSON; and the same of a `naive`
export, which writes where the artifact will be. Last, exports that end in the same moment: the exit codes of each round.
"""

import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from prebake.exporter.package import folder as package
from prebake.runtime.errors import RequestError
from prebake.runtime.storage import rename as place
from support.kill_points import die_at, killed

LISTED = {"weights/a": "a" * 100, "graphs/b": "b" * 100}
MANIFEST = {
    "schema_version": 2,
    "graphs": [],
    "plans": {},
    "files": [{"path": p, "size": 100, "sha256": ""} for p in LISTED],
}
FILES = {"manifest.json": json.dumps(MANIFEST), **LISTED}


def main(work: Path) -> dict[str, list[dict]]:
    found = {f"{before} exchange": deaths(work, before, export) for before in ("nothing", "old")}
    found["naive"] = deaths(work, "nothing", lambda output: write(output, "new"))
    found["at once"] = [at_once(work, force=False) for _ in range(8)]
    found["at once, by force"] = [at_once(work, force=True) for _ in range(8)]
    place.exchange_folders = lambda a, b: False
    return found | {f"{before} renames": deaths(work, before, export) for before in ("nothing", "old")}


def deaths(work: Path, before: str, export: Callable[[Path], None]) -> list[dict]:
    found = []
    while not found or found[-1]["signal"]:
        found.append(one(work, before, export, len(found) + 1))
    return found


def one(work: Path, before: str, export: Callable[[Path], None], step: int) -> dict:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    output = work / "out"
    if before == "old":
        write(output, "old")
    ended = killed(lambda: export(output), lambda: die_at(step, work))
    left = content(output)
    export(output)
    return {
        "signal": ended,
        "left": left,
        "next": content(output),
        "after that": sorted(p.name for p in work.iterdir()),
    }


def export(output: Path, *, force: bool = True) -> None:
    with package.stage_folder(output, force=force) as folder:
        write(folder, "new")


def at_once(work: Path, *, force: bool) -> dict:
    """Six exports to one output, which all begin before the first of them ends. Code 3 is a RequestError."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    barrier, children = multiprocessing.get_context("fork").Barrier(6), []
    for _ in range(6):
        if (child := os.fork()) == 0:
            code = 1
            try:
                with package.stage_folder(work / "out", force=force) as folder:
                    write(folder, "new")
                    barrier.wait()
                code = 0
            except RequestError as e:
                code = 3 if str(e).startswith(f"{work}/out: already exists since this export began") else 1
            finally:
                os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    return {"codes": codes, "left": content(work / "out"), "after that": sorted(p.name for p in work.iterdir())}


def write(folder: Path, which: str) -> None:
    for path, text in FILES.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text.replace("a", which) if "/" in path else text)


def content(folder: Path) -> str:
    """Which of the two artifacts a folder is, whole; else `nothing`, or `a part`."""
    if not folder.exists():
        return "nothing"
    have = {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}
    for which in ("old", "new"):
        if have == {path: text.replace("a", which) if "/" in path else text for path, text in FILES.items()}:
            return which
    return "a part"


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
