"""A server that replaces its artifact while it serves: an ASGI application without a framework, for `reload_soak.py`.

    PREBAKE_ARTIFACT=artifacts/flux-fast-shapes PREBAKE_RELOAD_S=60 python -m uvicorn --app-dir benchmarks --workers 2 reload_server:app

`GET /?seed=7` answers with the sha256 of the picture's numbers, and the worker's process id; each worker loads the folder
anew every `PREBAKE_RELOAD_S` seconds, and closes what it had. On SIGUSR1 a worker waits for a reload that is under way, gives the
system what its allocator has free, and writes the file `PREBAKE_SETTLED`.process-id.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import prebake
from prebake.runtime import RequestError
from prebake.runtime.memory import trim_heap

ATTEMPTS = 10  # of one request that meets a pipeline which is closed meanwhile


class Served:
    """The artifact that requests are drawn with; one load after the other takes its place."""

    def __init__(self, folder: str, every_s: float):
        self.folder, self.reloads = folder, 0
        self.pipe = prebake.load(folder)
        self._stop, self._reloading = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._reload_every, args=(every_s,), daemon=True)
        self._thread.start()

    def _reload_every(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            with self._reloading:
                last, self.pipe = self.pipe, prebake.load(self.folder)
                last.close()
                self.reloads += 1

    def draw(self, seed: int) -> str:
        """sha256 of the picture. One that was closed between the look at it and the call gives way to the next."""
        for _ in range(ATTEMPTS):
            pipe = self.pipe
            try:
                made: Any = pipe("a red circle", seed=seed, output_type="pt")
                return hashlib.sha256(made[0].numpy().tobytes()).hexdigest()
            except RequestError:
                if not pipe.closed:
                    raise
        raise RuntimeError(f"{ATTEMPTS} pipelines were closed, one after the other")

    def settle(self) -> None:
        """Leaves memory as it is between two reloads, without what was freed and is kept for later."""
        with self._reloading:
            trim_heap()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.pipe.close()


class App:
    """The ASGI application: what it serves begins and ends with its worker."""

    def __init__(self) -> None:
        self.served: Served | None = None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, send)

    async def _live(self, receive: Any, send: Any) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.startup":
                self.served = Served(os.environ["PREBAKE_ARTIFACT"], float(os.environ.get("PREBAKE_RELOAD_S", "60")))
                if settled := os.environ.get("PREBAKE_SETTLED"):
                    asyncio.get_running_loop().add_signal_handler(
                        signal.SIGUSR1, self._settle, Path(f"{settled}.{os.getpid()}")
                    )
            elif self.served:
                self.served.close()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    def _settle(self, said: Path) -> None:
        if self.served:
            self.served.settle()
        said.touch()

    async def _answer(self, scope: dict[str, Any], send: Any) -> None:
        assert self.served
        seed = int(parse_qs(scope["query_string"].decode()).get("seed", ["0"])[0])
        picture = await asyncio.to_thread(self.served.draw, seed)
        said = {"picture": picture, "worker": os.getpid(), "reloads": self.served.reloads}
        body = json.dumps(said).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


app = App()
