"""Sites: named values inside the denoiser that may outlive a step, and what a variant does with each of them.

In: a denoiser and the `Mark`s a policy chose. Out: `applied`, a context in which one forward of the *unchanged* model
carries out one action per site by forward hooks, and hands back the values to store. Nothing is removed here: the
skipped modules still run while being captured, and `capture.prune` drops them because nothing reads their output.
Tensor names (`site:0`, slot `site:0@1`) agree with `runtime/manifest.py` and `runtime/replay.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from ..runtime.errors import ExportError

Action = Literal["compute", "combine", "zero", "identity"]


@dataclass(frozen=True)
class Mark:
    """Where a site lives: the output of one module, or, if `residual`, what a run of blocks adds to its input.

    `modules` are the paths of the modules whose work the site stands for, in the order in which they run. `streams` names, output by output, the forward argument that a module's output continues (FLUX blocks return
    `(encoder_hidden_states, hidden_states)`); it is what IDENTITY passes on and what a residual is taken against.
    `slots` generations are kept of the outputs in `kept` (None: all), the ones that some variant reads.
    """

    name: str
    modules: tuple[str, ...]
    streams: tuple[str, ...]
    residual: bool = False
    slots: int = 1
    kept: tuple[int, ...] | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """The values to store, by graph output name."""
        return tuple(self.tensor(i) for i in range(len(self.streams)) if self.kept is None or i in self.kept)

    def tensor(self, i: int) -> str:
        return f"{self.name}:{i}"

    def slot_names(self) -> tuple[str, ...]:
        """Graph inputs of a variant that combines this site: tensor by tensor, newest slot first."""
        return tuple(f"{t}@{k}" for t in self.tensors for k in range(self.slots))


@dataclass(frozen=True)
class Variant:
    """The denoiser with one fixed action at every site. Sites that are not named compute."""

    name: str
    actions: tuple[tuple[str, Action], ...]

    def having(self, action: Action) -> tuple[str, ...]:
        return tuple(site for site, a in self.actions if a == action)


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
def applied(
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
            for handle in _hook(model, mark, action, slots, weights, fresh):
                stack.callback(handle.remove)
        yield fresh


def _hook(model, mark: Mark, action: Action, slots, weights, fresh) -> list[Any]:
    head: dict[str, Tensor] = {}
    first, last = (submodule(model, path) for path in (mark.modules[0], mark.modules[-1]))

    def remember(module, args, kwargs):
        missing = [s for s in mark.streams if s not in kwargs]
        if missing:
            raise ExportError(
                f"site {mark.name!r}: expected {mark.modules[0]} to be called with {', '.join(mark.streams)} as keywords, "
                f"missing {', '.join(missing)}; this diffusers version calls its blocks in another way"
            )
        head.update((s, kwargs[s]) for s in mark.streams)

    def act(module, args, kwargs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        if len(outputs) != len(mark.streams):
            raise ExportError(
                f"site {mark.name!r}: expected {len(mark.streams)} outputs of {mark.modules[-1]}, got {len(outputs)}"
            )
        base = [head[s] for s in mark.streams] if mark.residual else None
        if action == "compute":
            values = [o - b for o, b in zip(outputs, base, strict=True)] if base else list(outputs)
            fresh.update((mark.tensor(i), v) for i, v in enumerate(values) if mark.tensor(i) in mark.tensors)
            return None
        replaced = []
        for i, o in enumerate(outputs):
            stored = (
                [slots[f"{mark.tensor(i)}@{k}"] for k in range(mark.slots)]
                if weights and mark.tensor(i) in mark.tensors
                else []
            )
            replaced.append(_value(action, base[i] if base else None, head.get(mark.streams[i]), o, stored, weights))
        return tuple(replaced) if isinstance(output, tuple) else replaced[0]

    handles = []
    if mark.residual or action == "identity":
        handles.append(first.register_forward_pre_hook(remember, with_kwargs=True))
    handles.append(last.register_forward_hook(act, with_kwargs=True))
    return handles


def _value(action: Action, base: Tensor | None, stream: Tensor | None, output: Tensor, slots, weights) -> Tensor:
    """What stands in for a site's output: `[base +] sum w_k slot_k`, zeros (a residual of zero), or the input itself."""
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
        combined = [m for m in marks if m.name in variant.having("combine")]
        stored = [m for m in marks if m.name not in dict(variant.actions) or dict(variant.actions)[m.name] == "compute"]
        self.inputs = inputs + (("coefficients", *(s for m in combined for s in m.slot_names())) if combined else ())
        self.outputs = ("sample", *(t for m in stored for t in m.tensors))
        self.coefficients = sum(m.slots for m in combined)

    def examples(self, own: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Inputs to capture with: `own`, then random coefficients and slots, every one a tensor of its own (torch.export
        would merge two names of one tensor). Slot shapes come from a run on fake tensors that computes every site."""
        if not self.coefficients:
            return own
        everything = VariantModule(self.denoiser, self.marks, Variant("shapes", ()), self.own_inputs)
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake:
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
        with applied(self.denoiser, self.marks, self.variant, named, coefficients) as fresh:
            sample = self.denoiser(*own)
        return (sample.contiguous(), *(fresh[t].contiguous() for t in self.outputs[1:]))
