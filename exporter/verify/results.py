"""Results: what eager gave, kept on disk. It is nearly all that a comparison costs.

A comparison that was interrupted goes on where it was, and machines that draw a part each put their folders together: files are named by
what was asked of eager, so none is in the way of another. What the artifact draws is drawn anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ...runtime.errors import RecipeError
from ...runtime.manifest import Manifest
from ...runtime.plan import PLAN_INPUTS_FILE
from ..recipe.resolve import Recipe
from .budget import PictureJob, Workload
from .reference import EagerReference
from .replayer import DrawnPicture, GraphCall

WORKLOAD = TypeAdapter(Workload)
DECISIVE_TABLES: Any = {
    **dict.fromkeys(("sampler", "guidance", "shapes", "attach"), True),
    "model": {"lora", "textual_inversion"},
    "verify": {"reference"},
}
"""What of a recipe eager's answers depend on."""


class EagerResults:
    """A folder of results. Writing is one move, so that a process that is killed leaves no half one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remove(self) -> None:
        """Takes the folder away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self, name: str) -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / name).read_bytes()
        return None

    def write(self, name: str, data: bytes) -> None:
        """Raises RecipeError where the folder cannot be written."""
        try:
            try:
                self._write(name, data)
            except FileNotFoundError:  # another comparison of the model has ended, and taken the folder away
                self._write(name, data)
        except OSError as e:
            raise RecipeError(
                f"{self.folder}: results cannot be kept there ({e.strerror}); choose another folder with --results"
            ) from e

    def _write(self, name: str, data: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(fresh).replace(self.folder / name)

    def tensors(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What was kept under the key, or else what `compute` gives, which is kept. A file that is damaged is as none."""
        if (data := self.read(f"{key}.safetensors")) is not None:
            with contextlib.suppress(SafetensorError):
                return load(data)
        found = {name: t.detach().cpu().contiguous() for name, t in compute().items()}
        self.write(f"{key}.safetensors", save(found))
        return found

    def workload(self, key: str, choose: Callable[[], Workload]) -> Workload:
        """What an interrupted comparison had chosen, or else what `choose` gives, which is kept: times decide it, and they are never
        equal twice."""
        if (data := self.read(f"{key}.json")) is not None:
            with contextlib.suppress(ValidationError):
                return WORKLOAD.validate_json(data)
        chosen = choose()
        self.write(f"{key}.json", WORKLOAD.dump_json(chosen))
        return chosen


class RememberedReference:
    """An eager reference that is asked once: what it gave is in `results`. `model` stands for everything that its answers depend on."""

    def __init__(self, reference: EagerReference, results: EagerResults, model: str) -> None:
        self._reference, self._results, self._model = reference, results, model
        self._dtype, self._is_cast = "reference", False

    @property
    def pipe(self) -> Any:
        return self._reference.pipe

    @property
    def scheduler(self) -> str:
        return self._reference.scheduler

    def weights(self) -> dict[str, Tensor]:
        return self._reference.weights()

    def is_whole(self, call: GraphCall) -> bool:
        return self._reference.is_whole(call)

    def cast_to_bfloat16(self) -> None:
        """The pipeline itself is cast when it is needed."""
        self._dtype = "bfloat16"

    def draw(self, prompt: str, seed: int, steps: int) -> DrawnPicture:
        def drawn() -> dict[str, Tensor]:
            picture = self._asked().draw(prompt, seed, steps)
            return {"image": picture.image, "latents": picture.latents, "seconds": torch.tensor(picture.seconds)}

        kept = self._results.tensors(self._key("draw", prompt, seed, steps), drawn)
        return DrawnPicture(kept["image"], kept["latents"], kept["seconds"].item())

    def evaluate(self, call: GraphCall) -> tuple[Tensor, float]:
        def evaluated() -> dict[str, Tensor]:
            sample, ms = self._asked().evaluate(call)
            return {"sample": sample, "ms": torch.tensor(ms)}

        kept = self._results.tensors(self._key("evaluate", call_digest(call)), evaluated)
        return kept["sample"], kept["ms"].item()

    def evaluate_variant(self, call: GraphCall) -> Tensor | None:
        def evaluated() -> dict[str, Tensor]:
            sample = self._asked().evaluate_variant(call)
            return {} if sample is None else {"sample": sample}

        return self._results.tensors(self._key("variant", call_digest(call)), evaluated).get("sample")

    def _asked(self) -> EagerReference:
        if self._dtype == "bfloat16" and not self._is_cast:
            self._reference.cast_to_bfloat16()
            self._is_cast = True
        return self._reference

    def _key(self, *what: Any) -> str:
        return digest(self._model, self._dtype, *what)


def digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:40]


def call_digest(call: GraphCall) -> str:
    """Equal for calls of the same graph with the same inputs and stored values, to the bit."""
    told = hashlib.sha256()
    for part in (call, *getattr(call, "parts", ())):
        told.update(part.graph.encode())
        for name, tensor in sorted({**part.inputs, **part.stored}.items()):
            told.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            told.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return told.hexdigest()


def model_digest(manifest: Manifest, recipe: Recipe) -> str:
    """What eager's answers depend on: the model, the calls that the recipe describes, and the versions that compute."""
    asked = recipe.model_dump(mode="json", include=DECISIVE_TABLES)
    sites = [entry.sha256 for entry in manifest.files if entry.path == PLAN_INPUTS_FILE]
    versions = [version(name) for name in ("torch", "diffusers", "transformers")]
    return digest(manifest.source.sha256, manifest.defaults.model_dump(mode="json"), asked, sites, versions)


def workload_digest(manifest: Manifest, recipe: Recipe, jobs: Sequence[PictureJob], checked: int) -> str:
    """What the choice of a workload depends on, but for times."""
    files = {entry.path: entry.sha256 for entry in manifest.files}
    return digest(files, recipe.verify.model_dump(mode="json"), list(jobs), checked, torch.get_num_threads())
