"""A model that carries hooks or a patched forward is refused: torch.export would bake one step's state in as constants."""

from __future__ import annotations

from torch import nn

from ...runtime.errors import ExportError
from ..private_torch import has_forward_hooks

WAY_OUT = "load a fresh pipeline, and ask for the cache in the recipe's [cache] table instead"


def refuse_hooked(component: str, model: nn.Module) -> None:
    """Raises ExportError naming the module and what it carries: diffusers hooks, torch hooks or a replaced forward."""
    for name, module in model.named_modules():
        where = f"{component}.{name}" if name else component
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.hooks:
            raise ExportError(
                f"{where} carries the diffusers hook {', '.join(registry.hooks)}, whose state would be baked into the graph; {WAY_OUT}"
            )
        if "forward" in vars(module):
            raise ExportError(
                f"{where} has a patched forward ({vars(module)['forward']!r:.80}), which export cannot trust; {WAY_OUT}"
            )
        if has_forward_hooks(module):
            raise ExportError(
                f"{where} carries torch forward hooks, whose state would be baked into the graph; {WAY_OUT}"
            )
