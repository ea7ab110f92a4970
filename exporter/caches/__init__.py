"""Cache methods: one small file each, with its recipe table and its policy.

A policy is a function `schedule(cache, layout, trajectory, calibration) -> Schedule`: from the table's parameters, the
model's layout and the steps' timesteps and sigmas to sites, actions and coefficients. It reads no tensor, so a plan for
another number of steps is resolved in microseconds. A new method adds its file, called as the method is, and a line
below; a recipe then takes it. What several methods share is in `common/`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from ..sites.layout import Layout
from .common.method import CacheMethod
from .common.schedule import Decision as Decision
from .common.schedule import Schedule as Schedule
from .common.schedule import Trajectory as Trajectory

# isort: off
from .none import NoCache as NoCache
from .auto import Auto as Auto
from .dbcache import DBCache as DBCache
from .deepcache import DeepCache as DeepCache
from .fastercache import FasterCache as FasterCache
from .firstblock import FirstBlockCache as FirstBlockCache
from .fora import Fora as Fora
from .layer_skip import LayerSkip as LayerSkip
from .magcache import MagCache as MagCache
from .mask import Mask as Mask
from .pab import PyramidAttentionBroadcast as PyramidAttentionBroadcast
from .smoothcache import SmoothCache as SmoothCache
from .taylorseer import TaylorSeer as TaylorSeer
from .teacache import TeaCache as TeaCache
# isort: on

METHODS: Mapping[str, type[CacheMethod]] = {
    table.model_fields["method"].default: table
    for table in tuple(globals().values())
    if isinstance(table, type) and issubclass(table, CacheMethod) and "method" in table.model_fields
}
"""The tables imported above, by the method's name."""

if TYPE_CHECKING:
    Cache = CacheMethod
else:
    Cache = Annotated[Union[tuple(METHODS.values())], Field(discriminator="method")]  # noqa: UP007  (made from a tuple)


def find_policy(cache: CacheMethod) -> Any:
    """The module of the cache's method."""
    return importlib.import_module(f".{cache.method}", __name__)


def schedule(cache: CacheMethod, layout: Layout, trajectory: Trajectory, calibration: Any = None) -> Schedule:
    """The schedule of the recipe's `cache` table."""
    return find_policy(cache).schedule(cache, layout, trajectory, calibration)
