"""The export cache: what is kept comes back whole or not at all, whoever else writes there, and however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from prebake.exporter.capture.capture import capture_graph
from prebake.exporter.cli import main as cli
from prebake.exporter.export_cache.compilation import COMPILED, FROM_CACHE, CompileOrReuse
from prebake.exporter.export_cache.store import DamagedEntryError, Store
from prebake.exporter.passes.captured_graph import CapturedGraph
from prebake.exporter.progress import Progress

FILES = {"model.so": bytes(range(256)) * 40, "model.json": b"{}", "empty": b""}
ABOUT = {"model": "tiny", "graph": "full", "backend": "aoti", "seconds": 12.3}
KEY, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "kept")


def test_what_is_kept_comes_back(store):
    assert store.get(KEY) is None
    store.put(KEY, FILES, ABOUT)
    assert store.get(KEY) == FILES
    assert store.get(OTHER) is None
    (entry,) = store.entries()
    assert (dict(entry.about), entry.size) == (ABOUT, store.path(KEY).stat().st_size)
    assert os.stat(store.folder).st_mode & 0o777 == 0o700
    assert [p.name for p in store.folder.iterdir()] == [store.path(KEY).name]


def changed_at(at: int):
    return lambda data: data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        changed_at(0),  # of the hash
        changed_at(64),  # its line's end
        changed_at(70),  # of the head
        changed_at(-1),  # of a file
        lambda data: data[:-1],
        lambda data: data[:64],
        lambda data: data + b"\0",
        lambda data: b"",
    ],
)
def test_damage_is_noticed(store, damage):
    store.put(KEY, FILES, ABOUT)
    path = store.path(KEY)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedEntryError):
        store.get(KEY)
    store.put(KEY, FILES, ABOUT)
    assert store.get(KEY) == FILES


def test_an_entry_under_another_name_is_not_taken_for_it(store):
    store.put(KEY, FILES, ABOUT)
    store.path(KEY).rename(store.path(OTHER))
    with pytest.raises(DamagedEntryError, match="another key"):
        store.get(OTHER)


def test_what_was_used_longest_ago_goes_first(store):
    for age, key in enumerate("abc"):
        store.put(key, FILES, ABOUT)
        os.utime(store.path(key), (100 - age, 100 - age))
    store.get("c")  # now the newest
    size = store.path("a").stat().st_size
    assert [e.path.stem for e in store.entries()] == ["c", "a", "b"]
    assert [e.path.stem for e in store.prune(2 * size)] == ["b"]
    assert [e.path.stem for e in store.prune(2 * size - 1)] == ["a"]
    Store(store.folder, limit_bytes=0).put("d", FILES, ABOUT)
    assert store.entries() == []


def test_a_folder_that_others_can_write_is_not_used(store):
    store.put(KEY, FILES, ABOUT)
    store.folder.chmod(0o777)
    assert store.get(KEY) is None
    with pytest.raises(PermissionError, match="can be written by other users"):
        store.put(OTHER, FILES, ABOUT)


KILLED = """
import os, signal, sys
from pathlib import Path
from prebake.exporter.export_cache.store import Store
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
Store(Path(sys.argv[1])).put("k", {"model.so": b"x" * 1_000_000}, {})
"""


def test_a_killed_writer_leaves_no_entry_and_what_it_left_is_cleared_away(store):
    done = subprocess.run([sys.executable, "-c", KILLED, store.folder], check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.entries() == []
    assert [p.is_dir() for p in store.folder.iterdir()] == [True]
    store.put(KEY, FILES, ABOUT)
    assert [p.name for p in store.folder.iterdir()] == [store.path(KEY).name]


def test_many_at_once_see_whole_entries_or_none(store):
    """Writers, readers and one that removes: an entry that is half, or of another key, would be Damaged."""
    seen, wrong = [], []

    def work(i: int) -> None:
        try:
            for n in range(40):
                key = f"{(i + n) % 3}"
                if i == 0:
                    store.prune(0)
                elif i % 2:
                    store.put(key, {"model.so": key.encode() * 50_000}, ABOUT)
                elif files := store.get(key):
                    assert files == {"model.so": key.encode() * 50_000}
                    seen.append(key)
        except Exception as e:
            wrong.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert seen


# --- while graphs are lowered ---------------------------------------------------------------------------------------


class Notes(Progress):
    def __init__(self) -> None:
        super().__init__()
        self.did: list[str] = []
        self.notes: list[str] = []

    def announce(self, what: str) -> None:
        self.did.append(what)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Compiler:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, graph: CapturedGraph):
        self.asked += 1
        return FILES


@pytest.fixture(scope="module")
def graph() -> CapturedGraph:
    return capture_graph("full", nn.Linear(4, 4), (torch.ones(2, 4),), ("x",), ("y",))


def made(
    graph: CapturedGraph, store: Store | None, compiler: Compiler, component: str = "denoiser", tools: str = ""
) -> Notes:
    notes = Notes()
    assert CompileOrReuse(notes, store, tools, ABOUT)(component, graph, compiler) == FILES
    return notes


def test_a_graph_is_compiled_once(store, graph):
    compiler = Compiler()
    first, second = (made(graph, store, compiler) for _ in range(2))
    assert compiler.asked == 1
    assert (first.did, first.graphs) == (["denoiser: full"], {"full": COMPILED})
    assert (second.did, second.graphs) == (["denoiser: full, from the cache"], {"full": FROM_CACHE})
    assert made(graph, store, compiler, component="full").did == ["full, from the cache"]
    assert made(graph, store, compiler, tools="newer").graphs == {"full": COMPILED}
    assert made(graph, None, compiler).graphs == {"full": COMPILED}
    assert compiler.asked == 3


def test_a_damaged_entry_is_replaced_and_that_is_said(store, graph):
    compiler = Compiler()
    made(graph, store, compiler)
    (entry,) = store.entries()
    entry.path.write_bytes(entry.path.read_bytes()[:-1])
    notes = made(graph, store, compiler)
    assert notes.notes == [f"{entry.path}: cannot be used (its hash is another one), so the graph is compiled anew"]
    assert notes.graphs == {"full": COMPILED}
    assert made(graph, store, compiler).graphs == {"full": FROM_CACHE}
    assert compiler.asked == 2


def test_a_cache_that_cannot_be_written_costs_a_note(store, graph):
    store.folder.parent.mkdir(exist_ok=True)
    store.folder.write_text("a file")
    notes = made(graph, store, Compiler())
    assert notes.graphs == {"full": COMPILED}
    assert [n for n in notes.notes if "nothing can be kept there" in n]


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_lists_and_removes(store, capsys):
    store.put(KEY, FILES, ABOUT)
    store.put(OTHER, FILES, {})
    os.utime(store.path(OTHER), (1, 1))
    assert cli.main(["cache", "--cache-dir", str(store.folder)]) == 0
    head, first, second, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "graph", "backend", "MB", "compiled", "in", "used"]
    assert first.split()[:6] == ["tiny", "full", "aoti", "0.0", "12.3", "s"]
    assert second.split()[:5] == ["?", "?", "?", "0.0", "?"]
    assert total == f"{store.folder}: 2 graphs, 0.00 GiB"
    size = store.path(KEY).stat().st_size
    assert cli.main(["cache", "--cache-dir", str(store.folder), "--prune", str(1.5 * size / 2**30)]) == 0
    assert "removed: 1 graphs" in capsys.readouterr().out
    assert [e.path for e in store.entries()] == [store.path(KEY)]


def test_the_command_says_the_same_as_json(store, capsys):
    import json

    store.put(KEY, FILES, ABOUT)
    assert cli.main(["cache", "--cache-dir", str(store.folder), "--prune", "0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["graphs"], said["bytes"]) == ([], 0)
    assert [(g["key"], g["graph"]) for g in said["removed"]] == [(KEY, "full")]
    assert not Path(store.path(KEY)).exists()
