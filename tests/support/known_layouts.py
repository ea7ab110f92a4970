"""Layouts of denoisers, discovered once a process for each structure: a run on fake tensors takes seconds for a UNet."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping

from torch import nn

from prebake.exporter.sites.component import Component
from prebake.exporter.sites.discover import discover_layout
from prebake.exporter.sites.layout import Layout

_known: dict[Hashable, Layout] = {}


def layout_of(component: Component) -> Layout:
    """What `discover_layout` says of it, or said of another one of the same modules, sizes and inputs. One whose forward is not its
    class's own is looked at each time."""
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in component.module.modules()):
        return discover_layout(component)
    key = tuple(describe_structure(component))
    if key not in _known:
        _known[key] = discover_layout(component)
    return _known[key]


class LayoutTable(Mapping[str, Layout]):
    """The layout of each component, discovered when it is first read: a module that is only collected pays for none."""

    def __init__(self, components: Mapping[str, Component]) -> None:
        self.components = components
        self.layouts: dict[str, Layout] = {}

    def __getitem__(self, name: str) -> Layout:
        if name not in self.layouts:
            self.layouts[name] = layout_of(self.components[name])
        return self.layouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.components)

    def __len__(self) -> int:
        return len(self.components)


def describe_structure(component: Component) -> Iterator[Hashable]:
    """Everything that the run sees but the weights' numbers."""
    yield tuple(component.branches.items())
    yield component.inputs
    yield tuple((t.shape, t.dtype, t.stride()) for t in component.args)
    for name, module in component.module.named_modules():
        yield name, type(module), module.extra_repr(), str(dict(getattr(module, "config", {}))), plain_values(module)
        yield tuple((n, t.shape, t.dtype) for n, t in module.named_parameters(recurse=False))


def plain_values(module: nn.Module) -> str:
    """Its attributes that are no tensors and no modules."""
    kinds = (bool, int, float, str, tuple, list, type(None))
    return str(sorted((n, v) for n, v in vars(module).items() if not n.startswith("_") and isinstance(v, kinds)))
