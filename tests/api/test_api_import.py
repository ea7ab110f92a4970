"""`import prebake`: light, complete, and the installed one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

import prebake
from prebake.runtime import errors

HEAVY = ("torch", "numpy", "pydantic", "diffusers", "transformers", "tokenizers")


def python(code: str, cwd, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=os.environ | variables, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_the_import_alone_brings_in_nothing_heavy(tmp_path):
    code = f"import prebake, sys; prebake.errors, prebake.__version__; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code, tmp_path) == "[]"
    assert python(code.replace("prebake.errors,", "prebake.load,"), tmp_path) != "[]"  # the canary


def test_every_name_is_there():
    assert dir(prebake) == prebake.__all__
    assert [name for name in prebake.__all__ if getattr(prebake, name, None) is None] == []
    with pytest.raises(AttributeError, match="module 'prebake' has no attribute 'lode'"):
        _ = prebake.lode


def test_the_errors_are_those_of_the_runtime():
    ours = {name: getattr(prebake.errors, name) for name in prebake.errors.__all__}
    theirs = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.PrebakeError)}
    assert ours == theirs


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "prebake", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"prebake {prebake.__version__}\n"


def test_the_installed_one_wins_beside_a_clone(wheel, tmp_path):
    """A folder `prebake/` without `__init__.py` is a namespace package, and the working folder comes first on the path."""
    site, clone = tmp_path / "site", tmp_path / "clones" / "prebake"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    (clone / "runtime").mkdir(parents=True)
    (clone / "runtime" / "__init__.py").write_text("")
    code = "import prebake.runtime, os; print(os.path.relpath(prebake.runtime.__file__, os.environ['PYTHONPATH']))"
    assert python(code, clone.parent, PYTHONPATH=str(site)) == "prebake/runtime/__init__.py"
    (site / "prebake" / "__init__.py").unlink()  # the canary: how it was
    shutil.rmtree(site / "prebake" / "__pycache__", ignore_errors=True)
    assert python(code, clone.parent, PYTHONPATH=str(site)) == "../clones/prebake/runtime/__init__.py"
