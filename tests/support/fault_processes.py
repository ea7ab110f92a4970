"""Processes of their own for faults that a test should not have in its process: other mounts, other limits, death."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


def script(name: str, *args: object, mounts: str | None = None, **env: str) -> Any:
    """What `python NAME ARGS` prints, parsed as JSON; `mounts` are shell commands that are run before, in a namespace of
    its own, whose mounts nobody else sees."""
    command = [sys.executable, str(HERE / name), *map(str, args)]
    if mounts is not None:
        skip_without_namespaces()
        command = [*NAMESPACE, "sh", "-ec", f'{mounts}\nexec "$@"', "sh", *command]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **ENVIRONMENT, **env},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def skip_without_namespaces() -> None:
    if not namespaces():
        pytest.skip("needs `unshare` and a kernel that lets users mount in a namespace of their own")


@cache
def namespaces() -> bool:
    tried = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(tried, capture_output=True, check=False).returncode == 0
