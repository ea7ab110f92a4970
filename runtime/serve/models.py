"""The artifacts of a server: each is a `ServedModel`, which a reload replaces by a newer one once that has proved itself."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..check.artifact import Trust
from ..engine.engine import Engine
from ..errors import ArtifactError, RequestError
from ..figures import PlanFigures
from ..manifest import MANIFEST_FILE
from ..pipeline import load
from .errors import ApiError
from .fields import QUALITIES, ImageFields
from .golden import replay_golden
from .logs import log_event
from .metrics import Metrics


@dataclass(frozen=True)
class ServeOptions:
    """How artifacts are opened and requests let in. `max_queue_s` is the predicted wait beyond which a request is refused."""

    trust: Trust = "hash"
    public_key: str | None = None
    minimum_release: int | None = None
    runners: int | None = None
    memory_bytes: int | None = None
    max_queue_s: float = 60.0
    max_body_bytes: int = 32 << 20
    api_keys: tuple[str, ...] = ()


class ServedModel:
    """One version of an artifact: opened, compared with its golden vectors, and drawing."""

    def __init__(self, folder: Path, options: ServeOptions, metrics: Metrics):
        self.folder, self.name = folder, folder.resolve().name
        self.digest = digest_of(folder)
        self.created = int((folder / MANIFEST_FILE).stat().st_mtime)
        self.pipe = load(
            folder,
            trust=options.trust,
            public_key=options.public_key,
            minimum_release=options.minimum_release,
            runners=options.runners,
        )
        try:
            if self.pipe.family_rules.output_kind != "images":
                raise ArtifactError(f"{folder}: makes videos, and the server draws pictures; use its Python API")
            self.engine = Engine(
                self.pipe, memory_bytes=options.memory_bytes, on_entry=metrics.entry_listener(self.name)
            )
            self.compared = replay_golden(self.pipe, self.engine.costs)
        except BaseException:
            self.pipe.close()
            raise
        self.qualities = plan_qualities(self.pipe.plans, self.pipe.artifact.manifest.defaults.num_inference_steps)

    def watch_by(self, metrics: Metrics) -> None:
        engine, manifest = self.engine, self.pipe.artifact.manifest
        facts = {"digest": self.digest, "family": manifest.family, "status": manifest.status}
        metrics.watch(
            self.name,
            {
                "running": lambda: engine.opened_count,
                "waiting": lambda: engine.queued_count,
                "queue_seconds": lambda: engine.queued_s,
                "held_bytes": lambda: engine.held_bytes,
            },
            facts,
        )

    def plan_arguments(self, fields: ImageFields) -> dict[str, Any]:
        """The pipeline's arguments that choose the plan of the request's quality, or of its number of steps."""
        if fields.num_inference_steps is not None:
            return {"num_inference_steps": fields.num_inference_steps}
        plan = self.qualities[QUALITIES[fields.quality]]
        return {"num_inference_steps": plan.steps, "cache": not plan.name.endswith("-uncached")}

    def describe(self) -> dict[str, Any]:
        """The model as `/v1/models` has it, with its sizes, and its qualities' plans as they were measured."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "prebake",
            "sizes": [f"{width}x{height}" for height, width in self.pipe.sizes],
            "edits": self.pipe.family_rules.settings.picture is not None,
            "qualities": {quality: describe_plan(plan) for quality, plan in self.qualities.items()},
            "queue_seconds": round(self.engine.queued_s, 3),
        }

    def close(self) -> None:
        """Draws what was submitted to its end, and gives the artifact back."""
        self.engine.close()
        self.pipe.close()


class ModelTable:
    """The models that are served, by name. Empty until they are open; `ready` then."""

    def __init__(self, folders: Sequence[Path], options: ServeOptions, metrics: Metrics):
        self._folders = {folder.resolve().name: folder for folder in folders}
        if len(self._folders) < len(folders):
            raise RequestError("ARTIFACT: two folders have the same name, which is the model's; rename one")
        self.options, self.metrics = options, metrics
        self._models: dict[str, ServedModel] = {}
        self._reloading = threading.Lock()

    @property
    def ready(self) -> bool:
        return len(self._models) == len(self._folders)

    def open_all(self) -> None:
        """Opens every artifact. Raises ArtifactError for one that is damaged, or does not draw what it should."""
        opened = {name: self._open(folder) for name, folder in self._folders.items()}
        self._models = opened

    def _open(self, folder: Path) -> ServedModel:
        model = ServedModel(folder, self.options, self.metrics)
        log_event("model opened", model=model.name, digest=model.digest, golden_plans=model.compared)
        model.watch_by(self.metrics)
        return model

    def reload(self, swap: Callable[[Callable[[], None]], None]) -> list[str]:
        """Opens every artifact whose manifest has changed, and puts it in the place of the last version, which first draws what was
        submitted to it. `swap` calls its argument where requests are let in, so that each meets one version or the other. The names
        of those that were replaced. Raises what `open_all` raises, and then the last version stays."""
        with self._reloading:
            changed = []
            for name, folder in self._folders.items():
                last = self._models[name]
                if digest_of(folder) == last.digest:
                    continue
                fresh = self._open(folder)
                swap(lambda name=name, fresh=fresh: self._models.update({name: fresh}))
                changed.append(name)
                last.close()
            return changed

    def all(self) -> list[ServedModel]:
        return list(self._models.values())

    def get(self, name: str | None) -> ServedModel:
        """The model of that name, the first for none. Raises ApiError 503 before they are open, 404 for another name."""
        if not self.ready:
            raise ApiError(503, "the artifacts are being opened; ask again", headers={"Retry-After": "1"})
        if name is None:
            return next(iter(self._models.values()))
        if name not in self._models:
            raise ApiError(
                404, f"model={name!r:.100}: there is no such model; there are {', '.join(self._models)}", "model"
            )
        return self._models[name]

    def close(self) -> None:
        for model in self._models.values():
            model.close()


def digest_of(folder: Path) -> str:
    """The hash of the manifest, which has those of all other files."""
    return hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest()


def plan_qualities(plans: dict[str, PlanFigures], usual_steps: int) -> dict[str, PlanFigures]:
    """Plans of the default size by quality: `low` computes the least, `high` the most, and `medium` is what a call draws by default."""
    ranked = sorted((p for p in plans.values() if "@" not in p.name), key=lambda p: (p.computed, p.evaluations))
    return {"low": ranked[0], "medium": plans[str(usual_steps)], "high": ranked[-1]}


def describe_plan(plan: PlanFigures) -> dict[str, Any]:
    """A plan's figures; null is what nobody has measured."""
    return {
        "plan": plan.name,
        "num_inference_steps": plan.steps,
        "cache": plan.cache,
        "evaluations": plan.evaluations,
        "computed": plan.computed,
        "psnr_db": plan.psnr_db,
        "worst_psnr_db": plan.worst_psnr_db,
    }
