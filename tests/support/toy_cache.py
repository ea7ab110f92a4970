"""The compiled toy, kept from one run to the next."""

import fcntl
import hashlib
import tempfile
from pathlib import Path

import torch

from prebake.runtime.check.machine import cpu_flags
from support import toy_model as toy


def kept_toy(config) -> Path:
    """The toy artifact, read-only by agreement.

    Compiling takes a minute, so it is kept in pytest's own cache until toy_model.py or torch changes.
    """
    recipe = Path(toy.__file__).read_bytes() + torch.__version__.encode() + "".join(sorted(cpu_flags())).encode()
    folder = config.cache.mkdir("prebake-toy") / hashlib.sha256(recipe).hexdigest()[:16]
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            fresh = Path(tempfile.mkdtemp(dir=folder.parent))
            toy.build(fresh, toy.Eager())
            fresh.rename(folder)
    return folder
