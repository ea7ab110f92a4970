"""Loads, calls and closes an artifact many times: `many_loads.py ARTIFACT CACHE` prints what the process holds after 20, 40 and 60."""

import json
import os
import sys
import threading
from pathlib import Path

from prebake.runtime import load


def maps():
    return Path("/proc/self/maps").read_text("utf-8").splitlines()


def once():
    with load(sys.argv[1], cache_dir=sys.argv[2]) as pipe:
        thread = threading.Thread(target=pipe, kwargs={"prompt": "red", "seed": 1})
        thread.start()
        thread.join()


held = {"maps": [], "descriptors": []}
for _ in range(3):
    for _ in range(20):
        once()
    files = [line.split(maxsplit=5)[5] for line in maps() if "/" in line]
    held["maps"].append(len(files))
    held["descriptors"].append(len(os.listdir("/proc/self/fd")))
print(json.dumps({**held, "artifact": sum(f.startswith((sys.argv[1], sys.argv[2])) for f in files)}))
