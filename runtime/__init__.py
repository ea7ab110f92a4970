"""Replays a prebake artifact: `from prebake.runtime import load`, and no diffusers, transformers or compiler comes in.

The names below are looked up on first use, so that `prebake --help` and the light modules (`errors`, `manifest`,
`plan`) do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attachment.attach import attach, detach
    from .engine.engine import Engine
    from .errors import (
        ArtifactError,
        CallerError,
        Cancelled,
        ExportError,
        PrebakeError,
        QualityError,
        RecipeError,
        RequestError,
        ResourceError,
    )
    from .pipeline import load

    __version__: str

__all__ = [
    "ArtifactError",
    "CallerError",
    "Cancelled",
    "Engine",
    "ExportError",
    "PrebakeError",
    "QualityError",
    "RecipeError",
    "RequestError",
    "ResourceError",
    "__version__",
    "attach",
    "detach",
    "load",
]

_MODULES = {
    "Engine": ".engine.engine",
    "attach": ".attachment.attach",
    "detach": ".attachment.attach",
    "load": ".pipeline",
    "ArtifactError": ".errors",
    "CallerError": ".errors",
    "Cancelled": ".errors",
    "ExportError": ".errors",
    "PrebakeError": ".errors",
    "QualityError": ".errors",
    "RecipeError": ".errors",
    "RequestError": ".errors",
    "ResourceError": ".errors",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("prebake")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
