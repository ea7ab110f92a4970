"""Numbers that no picture can be made of: refused by name, never drawn as a black picture."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from prebake.runtime import ArtifactError, RequestError, finite
from prebake.runtime.plan import Update

NAN, INF = float("nan"), float("inf")


def latents(pipe, value):
    given = torch.zeros(1, *pipe.family_rules.latents_shape)
    given.view(-1)[3] = value
    return given


def returned(value):
    return lambda pipe, step, timestep, tensors: {"latents": tensors["latents"] * value}


def in_place(value):
    return lambda pipe, step, timestep, tensors: tensors["latents"].mul_(value).new_zeros(0).tolist() or None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["latents", "prompt_embeds", "pooled_prompt_embeds", "guidance_scale"])
def test_an_argument_that_is_not_finite_is_named(pipe, name, value):
    shapes = {"prompt_embeds": (1, 6, 8), "pooled_prompt_embeds": (1, 6)}
    given = {n: torch.full(shape, value if n == name else 0.0) for n, shape in shapes.items()}
    arguments = {"latents": latents(pipe, value), "guidance_scale": value}
    given = {"prompt": "red", name: arguments[name]} if name in arguments else given
    with pytest.raises(RequestError, match=f"^{name}.*finite number"):
        pipe(**given, seed=1)


@pytest.mark.parametrize("value", [1e39, -1e39, pytest.param(10**400, id="1e400"), np.float64(1e300), np.float32(INF)])  # fmt: skip
def test_a_number_beyond_float32_is_refused(pipe, value):
    with pytest.raises(RequestError, match=r"^guidance_scale.*finite number"):
        pipe("red", seed=1, guidance_scale=value)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["image", "mask_image"])
def test_pictures_are_looked_at_in_every_kind(where, value):
    for picture in (
        torch.full((3, 8, 8), value),
        np.full((8, 8, 3), value, np.float32),
        [torch.full((3, 8, 8), value)],
    ):
        with pytest.raises(RequestError, match=f"^{where}: expected finite"):
            finite.refuse_nonfinite(where, picture)


def test_what_is_finite_passes():
    for value in (
        1,
        2.5,
        np.float32(3),
        torch.ones(2),
        torch.ones(2, dtype=torch.int8),
        np.zeros(3, np.uint8),
        [1.0, None],
        "x",
    ):
        finite.refuse_nonfinite("x", value)


@pytest.mark.parametrize("callback", [returned(NAN), returned(INF), in_place(NAN)])
def test_a_callbacks_latents_are_looked_at(pipe, callback):
    with pytest.raises(RequestError, match=r"^callback_on_step_end: latents: expected finite"):
        pipe("red", seed=1, callback_on_step_end=callback)


def break_model(monkeypatch, pipe, graph, output, at):
    """The graph's output becomes NaN from that call on."""
    bound, calls = pipe.artifact.graph(graph), []
    model = bound._model

    def broken(inputs):
        calls.append(0)
        made = model(inputs)
        return [made[0] * NAN, *made[1:]] if len(calls) > at else made

    monkeypatch.setattr(bound, "_model", broken)


@pytest.mark.parametrize("at", [0, 2])
def test_the_evaluation_is_named(pipe, monkeypatch, at):
    (name,) = {e.variant for e in pipe.artifact.plans["4-uncached"].evaluations}
    break_model(monkeypatch, pipe, name, "sample", at)
    with pytest.raises(ArtifactError, match=f"^evaluation {at} of 4 of plan '4-uncached': the latents are not finite"):
        pipe("red", seed=1, cache=False)


def test_the_last_latents_are_looked_at_where_a_look_would_wait(pipe, monkeypatch):
    (name,) = {e.variant for e in pipe.artifact.plans["4-uncached"].evaluations}
    break_model(monkeypatch, pipe, name, "sample", 1)
    monkeypatch.setattr("prebake.runtime.pipeline.watch_latents", lambda plan, device, watch: watch)
    with pytest.raises(ArtifactError, match=r"^one of 4 evaluations of plan '4-uncached'"):
        pipe("red", seed=1, cache=False)


def test_the_decoder_is_named(pipe, monkeypatch):
    break_model(monkeypatch, pipe, "vae_decoder", "image", 0)
    with pytest.raises(ArtifactError, match=r"^the decoder made .* NaN of"):
        pipe("red", seed=1)


@pytest.mark.parametrize("value", [1e39, -3.5e38, INF, NAN])
def test_a_plans_numbers_are_numbers_of_float32(value):
    for numbers in ({"latents": (value,), "outputs": ()}, {"latents": (1.0,), "outputs": (), "noise": value}):
        with pytest.raises(ValidationError):
            Update.model_validate(numbers)
    Update(latents=(3.4e38,), outputs=(-3.4e38,))
