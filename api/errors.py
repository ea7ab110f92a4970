"""What prebake raises on purpose: `except prebake.errors.PrebakeError` catches that, and nothing else.

PrebakeError
├── CallerError          ask in another way: exit code 2, HTTP 400
│   ├── RecipeError      a recipe, an override, an option of an export
│   └── RequestError     an argument of a call, an output that exists
├── ResourceError        what is there is not fit for it: HTTP 500
│   ├── ExportError      this model cannot be exported so: exit code 3
│   │   └── QualityError a threshold of the recipe is missed: exit code 4
│   └── ArtifactError    a folder that is damaged, or for another machine: exit code 5
└── Cancelled            the call's `cancel` was set: exit code 130
"""

from .runtime.errors import (
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

__all__ = [
    "ArtifactError",
    "CallerError",
    "Cancelled",
    "ExportError",
    "PrebakeError",
    "QualityError",
    "RecipeError",
    "RequestError",
    "ResourceError",
]
