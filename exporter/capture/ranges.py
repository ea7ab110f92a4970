"""What of a graph follows the picture's size, in an artifact of a range.

A component comes in whose inputs say how they do (`Component.axes`); out come the same of its outputs, seen on tensors without
numbers at the ends of the range, and `torch.export`'s dimensions for tracing it. Height and width are dimensions of their own, also
where the example is square. `runtime/sizes` has the words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.export.dynamic_shapes import ShapesCollection

from ...runtime.errors import ExportError
from ...runtime.sizes.dimension import Dimension, fit_dimension
from ...runtime.sizes.size_range import SideRange, SizeRange
from ..private_torch import fake_tensor_mode
from ..sites.component import Axes

WAY_OUT = "list the sizes instead, as shapes.sizes, which compiles a graph for each"


def resize(tensor: Tensor, axes: Axes, height: int, width: int) -> Tensor:
    """A tensor of its dtype, without numbers, of the shape that it has at that size."""
    shape = [axes[i].at(height, width) if i in axes else n for i, n in enumerate(tensor.shape)]
    return torch.empty(shape, dtype=tensor.dtype)


def find_output_axes(
    graph: str, module: nn.Module, args: Sequence[Tensor], axes: Sequence[Axes], names: Sequence[str], sizes: SizeRange
) -> dict[str, Axes]:
    """Output -> how it follows the size. Raises ExportError for one that does in another way than in a line with height, width and area."""

    def shapes(height: int, width: int) -> list[tuple[int, ...]]:
        with torch.no_grad(), fake_tensor_mode():
            made = module(*(resize(t, a, height, width) for t, a in zip(args, axes, strict=True)))
        return [tuple(t.shape) for t in made]

    seen = [shapes(*size) for size in sizes.corners]
    inside = tuple(side.values[len(side.values) // 2] for side in (sizes.height, sizes.width))
    middle = shapes(*inside)
    found: dict[str, Axes] = {}
    for i, name in enumerate(names):
        dimensions = {}
        for axis, numbers in enumerate(zip(*(shape[i] for shape in seen), strict=True)):
            d = fit_dimension((sizes.height.min, sizes.height.max), (sizes.width.min, sizes.width.max), numbers)
            if min(d.constant, d.height, d.width, d.area) < 0 or evaluate_dimension(d, *inside) != middle[i][axis]:
                raise ExportError(
                    f"graph {graph!r}: dimension {axis} of its output {name!r} follows the size in no line: {numbers} at {sizes}; {WAY_OUT}"
                )
            if not d.is_constant:
                dimensions[axis] = d
        found[name] = dimensions
    return found


def evaluate_dimension(dimension: Dimension, height: int, width: int) -> int | None:
    """The number that it is at that size, None where that is no whole one."""
    try:
        return dimension.at(height, width)
    except ValueError:
        return None


@dataclass(frozen=True)
class ExportDimensions:
    """`torch.export`'s names for what varies in one graph: a side's multiples of its `unit`, or, where tensors follow the area alone, as
    FLUX's tokens do, the first tensor's number of them."""

    sizes: SizeRange
    sides: Mapping[str, Any]
    area: Dimension | None
    tokens: Any

    @classmethod
    def of(cls, sizes: SizeRange, dimensions: Iterable[Dimension]) -> ExportDimensions:
        known = [fix_sides(d, sizes) for d in dimensions]
        sides = {name: getattr(sizes, name) for name in ("height", "width")}
        named = {n: name_side(n, side) for n, side in sides.items() if any(getattr(d, n) for d in known)}
        area = next((d for d in known if d.area and not d.height and not d.width), None)
        if area is None or named:
            return cls(sizes, named, None, None)
        ends = [area.at(*size) for size in (sizes.corners[0], sizes.corners[-1])]
        return cls(sizes, {}, area, Dim("tokens", min=ends[0], max=ends[1]))

    def find(self, dimension: Dimension) -> Any:
        """The dimension as torch.export takes it: by one of the names, or one that it finds out itself while it traces."""
        d = fix_sides(dimension, self.sizes)
        for name, dim in self.sides.items():
            side: SideRange = getattr(self.sizes, name)
            if not d.area and not getattr(d, "width" if name == "height" else "height"):
                return scale_dim(dim, getattr(d, name) * side.unit, d.constant)
        if self.area and not d.height and not d.width:
            ratio = d.area / self.area.area
            return scale_dim(self.tokens, ratio, d.constant - ratio * self.area.constant)
        return Dim.DYNAMIC


def name_side(name: str, side: SideRange) -> Any:
    """The side in its units."""
    refuse_one_unit(name, side)
    return Dim(name, min=side.min // side.unit, max=side.max // side.unit)


def refuse_one_unit(name: str, side: SideRange) -> None:
    """Raises ExportError for a range that begins at one unit: torch.export takes a dimension of 1 for a constant."""
    if side.min < 2 * side.unit and not side.is_fixed:
        raise ExportError(
            f"shapes.{name}.min: expected at least {2 * side.unit}, two of the {side.unit} pixels that all lengths are multiples of, got "
            f"{side.min}; raise min, or set a smaller step"
        )


def fix_sides(dimension: Dimension, sizes: SizeRange) -> Dimension:
    """The dimension with a side that is fixed as the number that it is."""
    constant, by_height, by_width, area = dimension.constant, dimension.height, dimension.width, dimension.area
    if sizes.height.is_fixed:
        constant, by_width = constant + by_height * sizes.height.min, by_width + area * sizes.height.min
        by_height = area = by_height * 0
    if sizes.width.is_fixed:
        constant, by_height = constant + by_width * sizes.width.min, by_height + area * sizes.width.min
        by_width = area = by_width * 0
    return Dimension(constant, by_height, by_width, area)


def scale_dim(dim: Any, factor: Any, constant: Any) -> Any:
    """`factor * dim + constant`, where both are whole; else what torch.export finds out."""
    if factor.denominator != 1 or constant.denominator != 1:
        return Dim.DYNAMIC
    scaled = dim if factor == 1 else int(factor) * dim
    return scaled + int(constant) if constant else scaled


def export_shapes(args: Sequence[Tensor], axes: Sequence[Axes], sizes: SizeRange) -> ShapesCollection:
    """What `torch.export.export` takes as `dynamic_shapes` for these example tensors."""
    chosen = ExportDimensions.of(sizes, (d for a in axes for d in a.values()))
    shapes = ShapesCollection()
    for tensor, dimensions in zip(args, axes, strict=True):
        if varying := {axis: chosen.find(d) for axis, d in dimensions.items() if not fix_sides(d, sizes).is_constant}:
            shapes[tensor] = varying
    return shapes
