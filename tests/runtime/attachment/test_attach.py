"""Attach: an exported denoiser inside an ordinary diffusers pipeline gives the pipeline's own latents.

The artifacts are the captured graphs, run as they are (`attach_pipelines.uncompiled`). The peer is always the pipeline itself,
side by side.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from prebake.exporter.verify.closeness import relative_error
from prebake.exporter.verify.denoiser_alone import AttachedReplayer
from prebake.runtime import ArtifactError, RequestError, attach, detach
from support.attach_pipelines import (
    BUILDERS,
    MASK,
    OTHER_PROMPT,
    ROUNDING,
    Off,
    direct,
    drawn,
    pipeline,
    recipe,
    same,
)

NAMES = tuple(BUILDERS)


# --- latents --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.works(n, "attach")) for n in NAMES])
def test_latents_are_the_pipelines_own(name, artifact):
    """Another seed than the recorded one, and where the text has one length another prompt; the denoiser itself rests."""
    pipe = pipeline(name)
    eager = drawn(pipe, name, OTHER_PROMPT)
    ran: list[str] = []
    blocks = [m for m in pipe.transformer.modules() if isinstance(m, nn.Linear)]
    handles = [m.register_forward_hook(lambda *_: ran.append("it ran")) for m in blocks]
    with attach(pipe, artifact(name)):
        ours = drawn(pipe, name, OTHER_PROMPT)
        twice = drawn(pipe, name, OTHER_PROMPT)
    assert not ran
    assert same(ours, eager)
    assert torch.equal(ours, twice)
    for handle in handles:
        handle.remove()


def test_canary(artifact):
    """What is compared is the artifact's output: one weight of its graph off by a thousandth is seen."""
    pipe, whole = pipeline("aura_flow"), artifact("aura_flow")
    eager = drawn(pipe, "aura_flow")
    wrong = replace(whole, graphs={n: Off(g) for n, g in whole.graphs.items()})
    with attach(pipe, wrong):
        assert relative_error(drawn(pipe, "aura_flow"), eager) > 10 * ROUNDING


def test_several_plans_and_the_one_without_a_cache(artifact):
    pipe, made = pipeline("aura_flow"), artifact("aura_flow", (3, 5), cache=MASK)
    eager = {n: drawn(pipe, "aura_flow", steps=n) for n in (3, 5)}
    with attach(pipe, made, cache=False):
        assert all(same(drawn(pipe, "aura_flow", steps=n), eager[n]) for n in (5, 3))
    with attach(pipe, made):
        assert not same(drawn(pipe, "aura_flow", steps=5), eager[5])


@pytest.mark.parametrize(
    ("name", "site"),
    [pytest.param("sana", "blocks", marks=pytest.mark.works("sana", "caches")), ("wan", "blocks"), ("wan", "output")],
)
def test_a_cached_plan_is_what_hooks_do_in_eager(name, site, artifact):
    """Skipped steps reuse what the same branch stored: written down here once more, with hooks on the eager model."""
    pipe, made = pipeline(name), artifact(name, cache={**MASK, "site": site})
    mask = [e.variant == "full" for e in made.plans["4"].evaluations]
    assert mask.count(False) > 1
    blocks = {"sana": "transformer_blocks", "wan": "blocks"}[name]
    stack = [pipe.transformer] if site == "output" else list(getattr(pipe.transformer, blocks))
    branches = 1 if name == "sana" else 2
    with reused(stack, mask, branches, residual=site == "blocks"):
        eager = drawn(pipe, name)
    with attach(pipe, made):
        ours = drawn(pipe, name)
    assert same(ours, eager)
    assert not same(ours, drawn(pipe, name))


class reused:
    """Inside, a run of modules is taken from the store of its branch at evaluations where the mask is False."""

    def __init__(self, stack: list[nn.Module], mask: list[bool], branches: int, *, residual: bool) -> None:
        self.calls, self.stored, self.head = 0, {}, None
        self.mask, self.branches, self.residual = mask, branches, residual
        self.first, self.last = stack[0], stack[-1]

    def __enter__(self) -> None:
        self.handles = [
            self.first.register_forward_pre_hook(self.enter, with_kwargs=True),
            self.last.register_forward_hook(self.leave),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.head = args[0] if args else kwargs["hidden_states"]

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        evaluation, branch = divmod(self.calls, self.branches)
        self.calls += 1
        value = output[0] if isinstance(output, tuple) else output
        base = self.head if self.residual else torch.zeros(())
        if self.mask[evaluation]:
            self.stored[branch] = value - base
            return output
        value = base + self.stored[branch]
        return (value, *output[1:]) if isinstance(output, tuple) else value


def test_an_interrupted_call_leaves_nothing_behind(artifact):
    """The plan begins again, and what the broken run had stored is not reused."""
    pipe = pipeline("wan")
    with attach(pipe, artifact("wan", cache=MASK)):
        whole = drawn(pipe, "wan")
        with pytest.raises(InterruptedError):
            drawn(pipe, "wan", seed=8, callback_on_step_end=stop_at(1, InterruptedError))
        assert torch.equal(drawn(pipe, "wan"), whole)
        drawn(pipe, "wan", seed=8, callback_on_step_end=stop_at(2, None))
        assert torch.equal(drawn(pipe, "wan"), whole)


def stop_at(step: int, error: type[Exception] | None) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if i == step and error:
            raise error
        pipe._interrupt = pipe._interrupt or i == step
        return tensors

    return callback


def test_a_refused_call_leaves_nothing_behind(artifact):
    pipe = pipeline("aura_flow")
    eager = drawn(pipe, "aura_flow")
    with attach(pipe, artifact("aura_flow")):
        with pytest.raises(RequestError):
            drawn(pipe, "aura_flow", height=48)
        assert same(drawn(pipe, "aura_flow"), eager)


def test_an_output_class_comes_back(artifact):
    """A denoiser that is asked for its output class gives one."""
    pipe, made = pipeline("aura_flow"), artifact("aura_flow")
    facts = copy.deepcopy(made.manifest.pipeline)
    sample = {"kind": "tensor"}
    name = "diffusers.models.modeling_outputs.Transformer2DModelOutput"
    facts["output"] = {"kind": "dict", "cls": name, "items": {"sample": sample}}
    changed = replace(made, manifest=made.manifest.model_copy(update={"pipeline": facts}))
    eager = drawn(pipe, "aura_flow")
    with attach(pipe, changed):
        assert same(drawn(pipe, "aura_flow"), eager)  # the pipeline takes `[0]` of either
    facts["output"]["cls"] = "os.environ"
    with pytest.raises(ArtifactError, match="expected an output class of the diffusers"):
        attach(pipe, replace(made, manifest=made.manifest.model_copy(update={"pipeline": facts})))


# --- attaching and detaching ----------------------------------------------------------------------------------------


def test_detach_gives_everything_back(artifact):
    pipe = pipeline("sana")
    before, scheduler = dict(vars(pipe.transformer)), dict(vars(pipe.scheduler))
    eager = drawn(pipe, "sana")
    attach(pipe, artifact("sana"))
    assert type(pipe.transformer).__name__ == "SanaTransformer2DModel"
    assert pipe.transformer.dtype == torch.float32
    drawn(pipe, "sana")
    detach(pipe)
    assert vars(pipe.transformer).keys() == before.keys()
    assert vars(pipe.scheduler).keys() >= scheduler.keys()
    assert "set_timesteps" not in vars(pipe.scheduler)
    assert torch.equal(drawn(pipe, "sana"), eager)
    with pytest.raises(RequestError, match="nothing is attached"):
        detach(pipe)


def test_with_detaches_after_an_error_too(artifact):
    pipe = pipeline("aura_flow")
    with pytest.raises(InterruptedError), attach(pipe, artifact("aura_flow")):
        raise InterruptedError
    assert "forward" not in vars(pipe.transformer)
    with attach(pipe, artifact("aura_flow")):
        detach(pipe)  # by hand, and once more at the end of the block


def test_a_copied_scheduler_is_not_followed(artifact):
    pipe = pipeline("aura_flow")
    with attach(pipe, artifact("aura_flow")):
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(7)
        assert len(twin.timesteps) == 7
        assert len(pipe.scheduler.timesteps) != 7
        with pytest.raises(RequestError, match="called before the pipeline set a schedule"):
            direct(pipe)


def test_verification_draws_in_a_pipeline_on_the_artifacts_device(folder, artifact):
    """On a GPU, for which torch's device without data stands in here."""
    elsewhere = replace(artifact("sana"), device=torch.device("meta"))
    loaded = AttachedReplayer(elsewhere, recipe("sana", folder("sana")), str(folder("sana"))).loaded
    assert loaded.pipe.transformer.device == elsewhere.device
    assert loaded.pipe.vae.device == elsewhere.device


def test_attaching_needs_no_diffusers_of_its_own():
    code = "import sys, prebake.runtime as r; r.attach, r.detach; print('diffusers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
