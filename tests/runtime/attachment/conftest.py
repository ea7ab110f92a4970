"""Pipelines that are saved, and their uncompiled artifacts, each made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prebake.runtime.artifact import Artifact


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """Name of a pipeline -> where it is saved."""
    from support.attach_pipelines import saved

    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = saved(name, tmp_path_factory.mktemp(name) / name)
        return made[name]

    return of


@pytest.fixture(scope="session")
def artifact(folder, tmp_path_factory) -> Callable[..., Artifact]:
    """Name of a pipeline, and tables of the recipe -> the uncompiled artifact; each is made once."""
    from support.attach_pipelines import recipe, uncompiled

    made: dict[str, Artifact] = {}

    def of(name: str, steps: tuple[int, ...] = (4,), **tables: Any) -> Artifact:
        key = f"{name} {steps} {tables}"
        if key not in made:
            made[key] = uncompiled(recipe(name, folder(name), steps, **tables), tmp_path_factory.mktemp("artifact"))
        return made[key]

    return of
