"""The server's process: listens at once, opens its artifacts meanwhile, reloads at SIGHUP, ends in order at SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from ..errors import RequestError
from .app import create_app, reload_models
from .logs import LOG_CONFIG, log_event, log_failure, log_warning
from .metrics import Metrics
from .models import ModelTable, ServeOptions

DRAIN_S = 60
"""How long an ending server waits for what is being drawn."""


def serve(folders: Sequence[Path], options: ServeOptions, host: str, port: int) -> None:
    """Serves until it is told to end. Raises ArtifactError for an artifact that is damaged, or does not draw what it should."""
    models = ModelTable(folders, options, Metrics())
    failed: list[BaseException] = []
    tasks: set[asyncio.Task[None]] = set()

    def open_models() -> None:
        try:
            models.open_all()
            log_event("ready", models=[model.name for model in models.all()])
        except BaseException as e:
            failed.append(e)
            server.should_exit = True

    async def reload() -> None:
        try:
            log_event("reloaded", models=await reload_models(models))
        except Exception as e:
            log_failure("reload failed; the last version stays", e)

    def on_hangup() -> None:
        task = asyncio.ensure_future(reload())
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def on_start() -> None:
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)
        threading.Thread(target=open_models, daemon=True, name="prebake-open").start()

    config = uvicorn.Config(
        create_app(models, on_start), log_config=LOG_CONFIG, access_log=False, server_header=False,
        timeout_graceful_shutdown=DRAIN_S, lifespan="on",
    )  # fmt: skip
    server = uvicorn.Server(config)
    with warnings.catch_warnings(), open_socket(host, port) as listening:
        warnings.showwarning = log_warning
        log_event("listening", host=host, port=listening.getsockname()[1])
        server.run(sockets=[listening])
    if failed:
        raise failed[0]


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises RequestError for one that cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as e:
        raise RequestError(f"--host {host} --port {port}: nothing can listen there ({e}); give another") from e
