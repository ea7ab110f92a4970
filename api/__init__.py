"""Diffusion pipelines, compiled once ahead of time: export, load, verify, attach.

    import prebake

    artifact = prebake.export("flux-fast", model="shapes", output="artifacts/x")   # a folder, compared with the pipeline
    pipe = prebake.load("artifacts/x")                                             # needs no diffusers and no compiler
    pipe("a red circle", seed=7).images[0].save("circle.png")

Names are looked up on first use: `import prebake` alone brings in no torch. What is refused is raised as an error of
`prebake.errors`. Nothing is printed unless `progress=True`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .artifacts import export, verify
    from .results import ExportResult, Forecast, VerifyResult
    from .runtime.attachment.attach import attach, detach
    from .runtime.engine.engine import Engine
    from .runtime.engine.jobs import PendingPictures
    from .runtime.figures import PlanFigures
    from .runtime.pipeline import ImageOutput, ImagePipeline, VideoOutput, VideoPipeline, load

    __version__: str

__all__ = [
    "Engine",
    "ExportResult",
    "Forecast",
    "ImageOutput",
    "ImagePipeline",
    "PendingPictures",
    "PlanFigures",
    "VerifyResult",
    "VideoOutput",
    "VideoPipeline",
    "__version__",
    "attach",
    "detach",
    "errors",
    "export",
    "load",
    "verify",
]

_MODULES = {
    "Engine": ".runtime.engine.engine",
    "ExportResult": ".results",
    "Forecast": ".results",
    "ImageOutput": ".runtime.pipeline",
    "ImagePipeline": ".runtime.pipeline",
    "PendingPictures": ".runtime.engine.jobs",
    "PlanFigures": ".runtime.figures",
    "VerifyResult": ".results",
    "VideoOutput": ".runtime.pipeline",
    "VideoPipeline": ".runtime.pipeline",
    "attach": ".runtime.attachment.attach",
    "detach": ".runtime.attachment.attach",
    "export": ".artifacts",
    "load": ".runtime.pipeline",
    "verify": ".artifacts",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("prebake")
    if name == "errors":
        return import_module(".errors", __name__)
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
