"""The rates of this machine as `prebake export --dry-run` measured them: a JSON file for each kind of machine and code.

`exporter/cost/machine_rates.py` measures, writes and reads them; `prebake inspect --machine` shows them. A file
`rates/<name>.json` in the user's cache folder is

    {"format": 1,
     "machine": {"cpu": "...", "flags": "<hash>", "threads": 1, "torch": "...", "kernels": "...", "backend": "aoti", "isa": "..."},
     "tables": {"<table>": {"axes": {"rows": [1, 16], "inner": [64]}, "gflops": [2.5, 40.1]}},
     "calls": {"<an operator and its arguments>": <milliseconds>},
     "bandwidth": {"<bytes>": <bytes per millisecond>}, "reading": {"<bytes>": <bytes per millisecond>},
     "value_ms": <milliseconds>, "call_ms": <milliseconds>}

`gflops` has one number for each point of the axes' product, the last axis first to change. A file of another machine, of
another format, or one that is broken is as good as none.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..bounds import parse_json
from ..storage.private_folder import default_cache_folder
from ..storage.user_cache import read_private, write_private

RATES_FOLDER = "rates"
MAX_RATES_BYTES = 4 << 20
FROZEN = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
Positive = Annotated[float, Field(gt=0)]


class Machine(BaseModel):
    """What rates depend on. `flags` is a hash of the CPU's instruction sets, `kernels` of the code that the backend calls in the
    place of torch's operators, its version or a hash; empty where there is none."""

    model_config = FROZEN

    cpu: str
    flags: str
    threads: int = Field(gt=0)
    torch: str
    kernels: str
    backend: str
    isa: str

    @property
    def file_name(self) -> str:
        return f"{hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]}.json"


class RateTable(BaseModel):
    """GFLOP/s of one kind of operator at each point of a grid of sizes."""

    model_config = FROZEN

    axes: dict[str, tuple[Annotated[int, Field(gt=0)], ...]]
    gflops: tuple[Positive, ...]

    @model_validator(mode="after")
    def check_size(self) -> RateTable:
        if len(self.gflops) != math.prod(map(len, self.axes.values())):
            raise ValueError("gflops: one for each point of the axes")
        if any(list(axis) != sorted(set(axis)) or not axis for axis in self.axes.values()):
            raise ValueError("axes: their numbers must grow")
        return self


class Rates(BaseModel):
    """All that is known of one kind of machine."""

    model_config = FROZEN

    format: Literal[1] = 1
    machine: Machine
    tables: dict[str, RateTable] = {}
    calls: dict[str, Positive] = {}
    bandwidth: dict[int, Positive] = {}
    reading: dict[int, Positive] = {}
    value_ms: Positive | None = None
    call_ms: Positive | None = None


def rates_folder() -> Path:
    """Where the files are."""
    return default_cache_folder() / RATES_FOLDER


def rates_path(machine: Machine) -> Path:
    """Where the rates of that machine are kept."""
    return rates_folder() / machine.file_name


def read_rates(machine: Machine) -> Rates:
    """What is known of that machine: nothing yet, where there is no file that says it."""
    rates = _parse_rates(machine.file_name)
    return rates if rates and rates.machine == machine else Rates(machine=machine)


def write_rates(rates: Rates) -> None:
    """Keeps them for later processes, where this user has a private cache folder."""
    text = rates.model_dump_json(indent=1)
    write_private(None, f"{RATES_FOLDER}/{rates.machine.file_name}", text.encode("utf-8", "replace"))


def list_rates() -> Mapping[Path, Rates]:
    """The files that are right, by their paths, sorted."""
    folder = rates_folder()
    try:
        names = sorted(p.name for p in folder.iterdir() if p.suffix == ".json")
    except OSError:
        return {}
    found = {folder / name: _parse_rates(name) for name in names}
    return {path: rates for path, rates in found.items() if rates and rates.machine.file_name == path.name}


def _parse_rates(name: str) -> Rates | None:
    try:
        return Rates.model_validate(parse_json(read_private(None, f"{RATES_FOLDER}/{name}", MAX_RATES_BYTES)))
    except ValueError:
        return None
