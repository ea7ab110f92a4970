"""What the caller has set in torch around load and call changes no picture."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from prebake.runtime import load
from prebake.runtime.finite import refuse_nonfinite


@contextmanager
def setting(now, put, value):
    before = now()
    put(value)
    try:
        yield
    finally:
        put(before)


def device(name):
    return lambda: torch.device(name)


def dtype(value):
    return lambda: setting(torch.get_default_dtype, torch.set_default_dtype, value)


STATES = {
    "meta": device("meta"),
    "cuda": device("cuda"),  # there or not
    "set_default_device": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "float64": dtype(torch.float64),
    "bfloat16": dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}


@pytest.mark.parametrize("where", ["load", "call", "both"])
@pytest.mark.parametrize("state", STATES)
def test_the_callers_state_changes_no_picture(toy_artifact, cache_dir, pipe, state, where):
    want = pipe("red", seed=7, output_type="pt").images
    with STATES[state]() if where != "call" else nullcontext():
        opened = load(toy_artifact, cache_dir=cache_dir)
    with STATES[state]() if where != "load" else nullcontext():
        got = opened("red", seed=7, output_type="pt").images
    assert torch.equal(got, want)
    opened.close()


def test_a_callback_has_the_callers_default_device(pipe):
    seen = []
    with torch.device("meta"):
        pipe("red", seed=7, callback_on_step_end=lambda *_: seen.append(torch.empty(1).device.type))
        refuse_nonfinite("image", np.ones((2, 2), np.float32))
    assert set(seen) == {"meta"}
