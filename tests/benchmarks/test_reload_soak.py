"""The server that reloads answers as it should, and the soak sees what is not flat."""

import asyncio
import json
import sys
import threading

import pytest

from support.paths import ROOT

sys.path.append(str(ROOT / "benchmarks"))  # last, since its modules have short names
import reload_server
import reload_soak


def samples(growth_bytes=0, **last):
    """Thirty minutes of one worker, whose own memory grows by so much an hour."""
    made = [
        reload_soak.WorkerSample(float(s), 1, 1 << 28, (1 << 27) + growth_bytes * s // 3600, 400, 0, 10, 8)
        for s in range(0, 1801, 60)
    ]
    return [*made[:-1], reload_soak.WorkerSample(**{**vars(made[-1]), **last})]


def test_what_is_flat_has_no_problem():
    assert reload_soak.soak_problems(samples(growth_bytes=1 << 19)) == []


def test_a_sample_in_the_middle_of_a_reload_is_no_growth():
    """Two artifacts are open then."""
    made = samples()
    busy = [
        reload_soak.WorkerSample(**{**vars(s), "anonymous": s.anonymous + (8 << 20)}) if i in (14, 22, 28) else s
        for i, s in enumerate(made)
    ]
    assert reload_soak.soak_problems(busy) == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"growth_bytes": 2 << 20}, "memory of its own grows by 2.0 MiB an hour"),
        ({"maps": 403}, "maps: 400 at a third, 403 at the end"),
        ({"descriptors": 11}, "descriptors: 10 at a third, 11 at the end"),
        ({"deleted": 3}, "3 maps of deleted files"),
    ],
)
def test_what_is_not_flat_is_said(given, words):
    assert reload_soak.soak_problems(samples(**given)) == [words]


async def ask(app, seed):
    sent = []

    async def send(message):
        sent.append(message)

    await app({"type": "http", "query_string": f"seed={seed}".encode()}, None, send)
    assert sent[0]["status"] == 200
    return json.loads(sent[1]["body"])


async def serve(app):
    """Starts, asks until there were two reloads, and ends."""
    live, said = asyncio.Queue(), []

    async def send(message):
        said.append(message["type"])

    living = asyncio.create_task(app({"type": "lifespan"}, live.get, send))
    await live.put({"type": "lifespan.startup"})
    while not said:
        await asyncio.sleep(0.01)
    answers = [await ask(app, 7)]
    while answers[-1]["reloads"] < 2:
        answers.append(await ask(app, 7))
    await live.put({"type": "lifespan.shutdown"})
    await living
    return said, answers


def test_the_server_answers_the_same_while_it_reloads(toy_artifact, tmp_path, monkeypatch):
    monkeypatch.setenv("PREBAKE_ARTIFACT", str(toy_artifact))
    monkeypatch.setenv("PREBAKE_RELOAD_S", "0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    app = reload_server.App()
    said, answers = asyncio.run(asyncio.wait_for(serve(app), 60))
    assert said == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert len({answer["picture"] for answer in answers}) == 1
    assert app.served
    assert app.served.pipe.closed


def test_a_worker_settles_between_two_reloads(tmp_path, monkeypatch):
    """The file that the soak waits for comes after the heap was given back, which waits for a reload that is under way."""
    said = []
    monkeypatch.setattr(reload_server, "trim_heap", lambda: said.append("trimmed"))
    app = reload_server.App()
    app.served = object.__new__(reload_server.Served)
    app.served._reloading = threading.Lock()
    app.served._reloading.acquire()
    settling = threading.Thread(target=app._settle, args=(tmp_path / "settled.1",))
    settling.start()
    assert not said
    app.served._reloading.release()
    settling.join(10)
    assert said == ["trimmed"]
    assert (tmp_path / "settled.1").exists()
