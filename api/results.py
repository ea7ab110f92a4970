"""What an export, a forecast and a verification give: values to read, and to print."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .runtime.figures import PlanFigures, format_plans


@dataclass(frozen=True)
class ExportResult:
    """An artifact that was just exported. It is a path, too: `prebake.load(result)` opens it.

    `status` is the manifest's: "verified", "failed" (with `keep_failed`), or "unverified". `plans` are by name, with loss and
    speed as the verification found them. `bytes` is the size of the folder's files; `seconds` are by stage of the export;
    `graphs` says of each graph whether it was "compiled" or came "from the cache". Printed, it is a short table.
    """

    path: Path
    status: str
    plans: Mapping[str, PlanFigures]
    bytes: int
    seconds: Mapping[str, float]
    graphs: Mapping[str, str]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        took = f"{sum(self.seconds.values()):.0f} s"
        head = f"{self.path}: {self.status}, {self.bytes / 1e6:.1f} MB, in {took}"
        return "\n".join([head, *(f"  {line}" for line in format_plans(self.plans))])


@dataclass(frozen=True)
class Forecast:
    """What an export would give, before anything is compiled. Printed, it is what `prebake export --dry-run` prints.

    `graphs` is by graph: FLOPs, bytes moved, weights and predicted milliseconds on this machine. `plans` is by plan: the
    evaluations of each variant, shares of FLOPs and time, and the predicted `speedup` against the same steps all computed. `variants` are
    the letters of the strips. The keys are those of `--dry-run --json`.
    """

    graphs: Mapping[str, Mapping[str, Any]]
    plans: Mapping[str, Mapping[str, Any]]
    variants: Mapping[str, str]

    def __str__(self) -> str:
        from .exporter.cost.forecast import format_forecast

        described = {"graphs": self.graphs, "plans": self.plans, "variants": self.variants}
        return "\n".join(format_forecast(described, sys.stdout.encoding))


@dataclass(frozen=True)
class VerifyResult:
    """What a verification found. Printed, it is what `prebake verify` prints.

    `missed` has a sentence for each figure that misses its threshold, and is empty if the artifact `passed`. `plans` are by
    name, with loss and speed where the pipeline was drawn too (`source=True`). `status` is the manifest's afterwards. `report` is what
    `prebake verify --json` prints, as plain values.
    """

    path: Path
    status: str
    missed: tuple[str, ...]
    plans: Mapping[str, PlanFigures]
    report: Mapping[str, Any] = field(repr=False)
    text: str = field(repr=False)

    @property
    def passed(self) -> bool:
        return not self.missed

    def __str__(self) -> str:
        return self.text
