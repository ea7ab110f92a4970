"""Models from the Hugging Face hub, through diffusers' own loader, and what to do where there is none."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ...runtime.errors import ExportError, error_summary
from ...runtime.transfer.hub import is_caused_by


def download_model(model: str, revision: str | None) -> Path:
    """The folder of the hub's `model`, downloaded or from the cache. Raises ExportError with the way out."""
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(model, revision=revision))
    except Exception as e:
        raise ExportError(f"model {model!r}: {download_failure(model, revision, e)}") from e


def download_files(key: str, repository: str, suffixes: Sequence[str]) -> Path:
    """The folder of a repository's files that end so, downloaded or from the cache. Raises ExportError with the way out."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[f"*{suffix}" for suffix in suffixes]))
    except Exception as e:
        raise ExportError(f"{key} {repository!r}: {download_failure(repository, None, e)}") from e


def download_failure(model: str, revision: str | None, error: BaseException) -> str:
    """One clause on why the hub gave no `model`, and the way out."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    among = partial(is_caused_by, error)
    if among(GatedRepoError):  # is a RepositoryNotFoundError too
        return (
            f"its owner asks for a licence to be accepted; do so on the model's page, https://huggingface.co/{model}, "
            "and log in with `hf auth login`"
        )
    if among(RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it; give a branch, tag or commit that its page lists, or none"
    if among(RepositoryNotFoundError):
        return "the hub has no such model, or it is private; check the name, or log in with `hf auth login`"
    # whatever library speaks HTTP, a network that is not there ends in one of Python's own errors
    if among(LocalEntryNotFoundError, ConnectionError, TimeoutError, socket.gaierror):
        return (
            "it is not in the hub's cache and the hub cannot be reached; export once with a network (and without "
            f"HF_HUB_OFFLINE), or give the folder of a pipeline; the cause: {error_summary(error)}"
        )
    return f"the hub says {error_summary(error)}"
