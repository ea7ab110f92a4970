"""Sites: named values inside the denoiser that may outlive a step, and what a variant does with each of them.

In: a denoiser and the `Mark`s a policy chose. Out: `apply_variant`, a context in which one forward of the *unchanged* model
carries out one action per site by forward hooks, and hands back the values to store. Nothing is removed here: the
skipped modules still run while being captured, and `capture.prune` drops them because nothing reads their output.
Tensor names (`site:0`, slot `site:0@1`) agree with `runtime/manifest.py` and `runtime/replay.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...runtime.errors import ExportError
from ..private_torch import fake_tensor_mode
from .marks import REST_STREAM, Action, Mark, Variant


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at that path. Raises ExportError with the siblings that exist, since a silent miss skips nothing."""
    try:
        return model.get_submodule(path)
    except AttributeError as e:
        parent = path.rpartition(".")[0]
        exists = [n for n, _ in model.named_modules() if n.rpartition(".")[0] == parent] or [
            n for n, _ in model.named_children()
        ]
        raise ExportError(f"site {path!r} is not in the model; there it has {', '.join(exists)}") from e


@contextmanager
def apply_variant(
    model: nn.Module,
    marks: tuple[Mark, ...],
    variant: Variant,
    slots: Mapping[str, Tensor],
    coefficients: Tensor | None,
) -> Iterator[dict[str, Tensor]]:
    """One forward of `model` inside this context carries out `variant`; yields the dict of fresh site tensors.

    `slots` holds the tensors `name:i@k`, `coefficients` the float32 [B, K] of all combined sites in the order of `marks`.
    The hooks are removed on leaving, also after an error.
    """
    actions = dict(variant.actions)
    fresh: dict[str, Tensor] = {}
    offset = 0
    with ExitStack() as stack:
        for mark in marks:
            action = actions.get(mark.name, "compute")
            weights: tuple[Tensor, ...] = ()
            if action == "combine":
                assert coefficients is not None
                weights = tuple(coefficients[:, offset + k] for k in range(mark.slots))
                offset += mark.slots
            for handle in _hook_site(model, mark, action, slots, weights, fresh):
                stack.callback(handle.remove)
        yield fresh


def _hook_site(
    model: nn.Module,
    mark: Mark,
    action: Action,
    slots: Mapping[str, Tensor],
    weights: tuple[Tensor, ...],
    fresh: dict[str, Tensor],
) -> list[RemovableHandle]:
    if mark.part == "scores":
        return _hook_scores(submodule(model, mark.modules[0])) if action == "identity" else []
    if action not in REPLACEMENTS:
        return []
    return SiteHooks(mark, action, slots, weights, fresh).register(model)


@dataclass(frozen=True)
class SiteOutput:
    """One output of a site as the model computes it, and what may stand in its place: the `stream`, the input that it
    continues (None where none was taken), the `base`, what a residual is taken against (None: the site is no residual), and
    the stored values with their coefficients [B], newest first (none where nothing reads this output)."""

    computed: Tensor
    stream: Tensor | None
    base: Tensor | None
    stored: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]


def _compute(site: SiteOutput) -> Tensor:
    return site.computed


def _combine(site: SiteOutput) -> Tensor:
    """`[base +] sum w_k stored_k`."""
    if not site.stored:  # an output that nothing reads: any value of the right shape will do
        return site.base if site.base is not None else site.computed
    # float32, as the coefficients are: a bfloat16 sum would lose what order-1 prediction gains
    first, *rest = (scale_rows(s.float(), w) for w, s in zip(site.weights, site.stored, strict=True))
    total = sum(rest, first)
    return (site.base.float() + total if site.base is not None else total).to(site.computed.dtype)


def scale_rows(value: Tensor, weights: Tensor) -> Tensor:
    """A stored value [B n, ...] times a request's weight [B]: the n rows of a request, such as its two branches or a video's frames,
    lie beside each other. Raises ExportError for a value that has no such rows."""
    batch, rows = len(weights), len(value)
    if rows % batch:
        raise ExportError(
            f"a value of shape {list(value.shape)} cannot be stored for {batch} pictures at once, since its first dimension is none of "
            "pictures; choose another site, or set shapes.batch=[1]"
        )
    each = weights if rows == batch or batch == 1 else weights.repeat_interleave(rows // batch)
    return value * each.view(-1, *[1] * (value.dim() - 1))


def _zero(site: SiteOutput) -> Tensor:
    """Zeros, or the base where the site is a residual."""
    if site.base is not None:
        return site.base
    # not zeros_like: that would read the output, and keep what makes it alive
    return torch.zeros(site.computed.shape, dtype=site.computed.dtype, device=site.computed.device)


def _identity(site: SiteOutput) -> Tensor:
    assert site.stream is not None
    return site.stream


REPLACEMENTS: Mapping[Action, Callable[[SiteOutput], Tensor]] = {
    "compute": _compute,
    "combine": _combine,
    "zero": _zero,
    "identity": _identity,
}
"""What a site's output becomes, by action. `pass` is not among them: such a site runs without a hook."""


class SiteHooks:
    """The hooks of one site for one forward: before its first module they remember the streams that come in, and behind
    its last one they replace what comes out, and write to `fresh` what is to be stored."""

    def __init__(
        self,
        mark: Mark,
        action: Action,
        slots: Mapping[str, Tensor],
        weights: tuple[Tensor, ...],
        fresh: dict[str, Tensor],
    ) -> None:
        self.mark, self.slots, self.weights, self.fresh = mark, slots, weights, fresh
        self.action: Action = action
        self.streams = tuple(s for s in mark.streams if s != REST_STREAM)
        self.given: dict[str, Tensor] = {}

    def register(self, model: nn.Module) -> list[RemovableHandle]:
        first, last = (submodule(model, path) for path in (self.mark.modules[0], self.mark.modules[-1]))
        handles = []
        if self.mark.residual or self.action == "identity":
            handles.append(first.register_forward_pre_hook(self.remember_streams, with_kwargs=True))
        handles.append(last.register_forward_hook(self.replace_outputs, with_kwargs=True))
        return handles

    def remember_streams(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = bind_arguments(module, args, kwargs)
        if missing := [s for s in self.streams if s and s not in given]:
            raise ExportError(
                f"site {self.mark.name!r}: expected {self.mark.modules[0]} to be called with "
                f"{', '.join(filter(None, self.streams))}, missing {', '.join(missing)}; its output cannot be taken against "
                "its input, so choose another site"
            )
        self.given.update((s, given[s]) for s in self.streams if s)

    def replace_outputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """What the module returns instead; None leaves its output as it is."""
        outputs = flat_outputs(output)
        rest = outputs[len(self.streams) :] if REST_STREAM in self.mark.streams else ()
        outputs = outputs[: len(outputs) - len(rest)]
        if len(outputs) != len(self.streams):
            raise ExportError(
                f"site {self.mark.name!r}: expected {len(self.streams)} outputs of {self.mark.modules[-1]}, got {len(outputs)}"
            )
        replaced = [self.replace_output(i, o) if isinstance(o, Tensor) else o for i, o in enumerate(outputs)]
        if self.action == "compute":
            return None
        return (*replaced, *rest) if isinstance(output, tuple) else replaced[0]

    def replace_output(self, i: int, computed: Tensor) -> Tensor:
        """Output i as the action has it; what the mark stores of it is written to `fresh`."""
        name, stream = self.mark.tensor(i), self.given.get(self.streams[i])
        base = stream if self.mark.residual else None
        kept = name in self.mark.tensors
        stored = tuple(self.slots[f"{name}@{k}"] for k in range(self.mark.slots)) if self.weights and kept else ()
        value = REPLACEMENTS[self.action](SiteOutput(computed, stream, base, stored, self.weights))
        if kept and self.mark.stores(self.action):
            generation = value if base is None else value - base
            self.fresh[name] = generation.to(getattr(torch, self.mark.dtype)) if self.mark.dtype else generation
        return value


class IdentityAttention(torch.overrides.TorchFunctionMode):
    """Attention weights are the identity: attention returns its values, where there are as many as queries."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False), **(kwargs or {}))
            if given["query"].shape[2] == given["value"].shape[2]:
                return given["value"]
        return func(*args, **(kwargs or {}))


def _hook_scores(module: nn.Module) -> list[RemovableHandle]:
    stack = ExitStack()
    return [
        module.register_forward_pre_hook(lambda *_: (stack.enter_context(IdentityAttention()), None)[1]),
        module.register_forward_hook(lambda *_: stack.close(), always_call=True),
    ]


def bind_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the module's own `forward`."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return dict(list(bound.items())[1:])


def flat_outputs(output: Any) -> tuple[Any, ...]:
    """A module's outputs as a tuple: of a tensor, a tuple, or one of diffusers' output classes."""
    if isinstance(output, Tensor):
        return (output,)
    return output if isinstance(output, tuple) else tuple(output.values())


class VariantModule(nn.Module):
    """The denoiser as a function of flat tensors: its own inputs, then `coefficients` and slots if it combines.

    Returns `(sample, *fresh site tensors)` in the order of `outputs`.
    """

    def __init__(self, denoiser: nn.Module, marks: tuple[Mark, ...], variant: Variant, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.marks, self.variant, self.own_inputs = marks, variant, inputs
        combined = [m for m in marks if m.name in variant.sites_with("combine")]
        self.inputs = inputs + (("coefficients", *(s for m in combined for s in m.slot_names())) if combined else ())
        self.outputs = ("sample", *(t for m in variant.stored_marks(marks) for t in m.tensors))
        self.coefficients = sum(m.slots for m in combined)

    def examples(self, own: tuple[Tensor, ...], batch: int = 1) -> tuple[Tensor, ...]:
        """Inputs to capture with, of that many requests: `own`, then random coefficients and slots, every one a tensor of its own (torch.export
        would merge two names of one tensor). Slot shapes come from a run on fake tensors that computes every site."""
        if not self.coefficients:
            return own
        everything = VariantModule(self.denoiser, self.marks, Variant("shapes", ()), self.own_inputs)
        with torch.no_grad(), fake_tensor_mode() as fake:
            results = everything(*(fake.from_tensor(t) for t in own))
        fresh = dict(zip(everything.outputs, results, strict=True))
        slots = [fresh[name.partition("@")[0]] for name in self.inputs[len(own) + 1 :]]
        seeded = torch.Generator().manual_seed(0)
        return (
            *own,
            torch.ones(batch, self.coefficients),
            *(torch.randn(t.shape, generator=seeded).to(t.dtype) for t in slots),
        )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        own = [named.pop(n) for n in self.own_inputs]
        coefficients = named.pop("coefficients", None)
        with apply_variant(self.denoiser, self.marks, self.variant, named, coefficients) as fresh:
            sample = self.denoiser(*own)
        return (sample.contiguous(), *(fresh[t].contiguous() for t in self.outputs[1:]))
