"""Run as a process of its own: `python unpack_kills.py PACKAGE CACHE STATE` unpacks into a cache that is `fresh` or `damaged`,
again and again, each time in a child that is killed a step later than the one before, and then in the middle of a file.
Prints what each has left, and what the next unpacking makes of it, as JSON."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from prebake.runtime.storage import unpack
from support.kill_points import die_after, die_at, killed

SHA256 = "c0de"  # any name, for this purpose
Members = dict[str, dict[str, bytes]]


def main(package: Path, cache: Path, state: str) -> list[dict]:
    members = unpack.read_members(str(package), package.read_bytes())
    largest = max(len(data) for files in members.values() for data in files.values())
    found = []
    while not found or found[-1]["signal"]:
        found.append(one(members, cache, state, lambda: die_at(len(found) + 1, cache)))
    return found + [one(members, cache, state, lambda size=size: die_after(size)) for size in (0, largest // 2)]


def one(members: Members, cache: Path, state: str, deadly: Callable[[], None]) -> dict:
    """What a child that dies has left in the cache, and what one that lives finds and leaves."""
    shutil.rmtree(cache, ignore_errors=True)
    if state == "damaged":
        with unpack.unpack_members(members, SHA256, cache) as libraries:
            next(iter(libraries.values())).write_bytes(b"half")
    ended, entry = killed(lambda: unpack_once(members, cache), deadly), cache / SHA256
    left = "nothing" if not entry.exists() else "the whole" if unpack._has_members(entry, members) else "a part"
    right = unpack_once(members, cache)
    return {
        "signal": ended,
        "left": left,
        "next is right": right,
        "after that": sorted(p.name for p in cache.iterdir()),
    }


def unpack_once(members: Members, cache: Path) -> bool:
    """Whether every library lies in the cache, with its own bytes."""
    with unpack.unpack_members(members, SHA256, cache) as libraries:
        return all(so.is_relative_to(cache) and so.read_bytes() == members[m][so.name] for m, so in libraries.items())


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
