"""Sites: named values inside the denoiser that may outlive a step, and what a variant does with each of them.

In: a denoiser and the `Mark`s a policy chose. Out: `apply_variant`, a context in which one forward of the *unchanged* model
carries out one action per site by forward hooks, and hands back the values to store. Nothing is removed here: the
skipped modules still run while being captured, and `capture.prune` drops them because nothing reads their output.
Tensor names (`site:0`, slot `site:0@1`) agree with `runtime/manifest.py` and `runtime/replay.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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

    `slots` holds the tensors `name:i@k`, `coefficients` the float32 [K] of all combined sites in the order of `marks`.
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
                weights = tuple(coefficients[offset + k] for k in range(mark.slots))
                offset += mark.slots
            for handle in _hook_site(model, mark, action, slots, weights, fresh):
                stack.callback(handle.remove)
        yield fresh


def _hook_site(model, mark: Mark, action: Action, slots, weights, fresh) -> list[Any]:
    if action == "pass":
        return []
    if mark.part == "scores":
        return _hook_scores(submodule(model, mark.modules[0])) if action == "identity" else []
    head: dict[str, Tensor] = {}
    streams = tuple(s for s in mark.streams if s != REST_STREAM)
    first, last = (submodule(model, path) for path in (mark.modules[0], mark.modules[-1]))

    def remember(module, args, kwargs):
        given = bind_arguments(module, args, kwargs)
        if missing := [s for s in streams if s and s not in given]:
            raise ExportError(
                f"site {mark.name!r}: expected {mark.modules[0]} to be called with {', '.join(filter(None, streams))}, "
                f"missing {', '.join(missing)}; its output cannot be taken against its input, so choose another site"
            )
        head.update((s, given[s]) for s in streams if s)

    def act(module, args, kwargs, output):
        outputs = flat_outputs(output)
        passed = outputs[len(streams) :] if REST_STREAM in mark.streams else ()
        outputs = outputs[: len(outputs) - len(passed)]
        if len(outputs) != len(streams):
            raise ExportError(
                f"site {mark.name!r}: expected {len(streams)} outputs of {mark.modules[-1]}, got {len(outputs)}"
            )
        replaced = []
        for i, o in enumerate(outputs):
            if not isinstance(o, Tensor):
                replaced.append(o)
                continue
            base = head[streams[i]] if mark.residual else None
            kept = mark.tensor(i) in mark.tensors
            if action == "compute":
                value = o - base if base is not None else o
                replaced.append(o)
            else:
                stored = [slots[f"{mark.tensor(i)}@{k}"] for k in range(mark.slots)] if weights and kept else []
                o = _replacement_value(action, base, head.get(streams[i]), o, stored, weights)
                value = o - base if base is not None and mark.emitted else o
                replaced.append(o)
            if kept and (action == "compute" or (mark.emitted and action == "combine")):
                fresh[mark.tensor(i)] = value.to(getattr(torch, mark.dtype)) if mark.dtype else value
        if action == "compute":
            return None
        return (*replaced, *passed) if isinstance(output, tuple) else replaced[0]

    handles = []
    if mark.residual or action == "identity":
        handles.append(first.register_forward_pre_hook(remember, with_kwargs=True))
    handles.append(last.register_forward_hook(act, with_kwargs=True))
    return handles


class IdentityAttention(torch.overrides.TorchFunctionMode):
    """Attention weights are the identity: attention returns its values, where there are as many as queries."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False), **(kwargs or {}))
            if given["query"].shape[2] == given["value"].shape[2]:
                return given["value"]
        return func(*args, **(kwargs or {}))


def _hook_scores(module: nn.Module) -> list[Any]:
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


def _replacement_value(
    action: Action, base: Tensor | None, stream: Tensor | None, output: Tensor, slots, weights
) -> Tensor:
    """The replacement of a site's output: `[base +] sum w_k slot_k`, zeros (a residual of zero), or the input itself."""
    if action == "identity":
        assert stream is not None
        return stream
    if action == "zero":
        # not zeros_like: that would read the output, and keep what makes it alive
        return base if base is not None else torch.zeros(output.shape, dtype=output.dtype, device=output.device)
    if not slots:  # an output that nothing reads: any value of the right shape will do
        return base if base is not None else output
    # float32, as the coefficients are: a bfloat16 sum would lose what order-1 prediction gains
    first, *rest = (w * s.float() for w, s in zip(weights, slots, strict=True))
    total = sum(rest, first)
    return (base.float() + total).to(output.dtype) if base is not None else total.to(output.dtype)


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

    def examples(self, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs to capture with: `own`, then random coefficients and slots, every one a tensor of its own (torch.export
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
            torch.ones(self.coefficients),
            *(torch.randn(t.shape, generator=seeded).to(t.dtype) for t in slots),
        )

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        own = [named.pop(n) for n in self.own_inputs]
        coefficients = named.pop("coefficients", None)
        with apply_variant(self.denoiser, self.marks, self.variant, named, coefficients) as fresh:
            sample = self.denoiser(*own)
        return (sample.contiguous(), *(fresh[t].contiguous() for t in self.outputs[1:]))
