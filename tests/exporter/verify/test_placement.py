"""Where the reference runs, and in what. There is no GPU in these tests: what is asked of diffusers and torch is looked at."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from prebake.exporter.recipe.resolve import resolve
from prebake.exporter.verify import placement
from prebake.exporter.verify.placement import place_pipeline, reference_device, reference_dtype, weights_bytes
from prebake.runtime.errors import RecipeError


def recipe(*overrides):
    return resolve("baseline", overrides)


@pytest.mark.parametrize(
    ("overrides", "device", "dtype"),
    [
        ((), "cpu", torch.float32),
        (("compile.device=cuda",), "cuda", torch.float32),
        (("compile.device=cuda", 'verify.reference={device = "cpu"}'), "cpu", torch.float32),
        (("compile.device=cuda", 'verify.reference={dtype = "float16"}'), "cuda", torch.float16),
        (('verify.reference={device = "cuda", dtype = "float16"}',), "cuda", torch.float16),
    ],
)
def test_the_reference_runs_where_the_artifact_does_unless_the_recipe_says_otherwise(
    monkeypatch, overrides, device, dtype
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = recipe(*overrides)
    assert (reference_device(asked).type, reference_dtype(asked)) == (device, dtype)


def test_a_gpu_that_is_not_there_is_refused_with_the_way_out(monkeypatch):
    """Not replaced by the CPU: a GPU's artifact would be held to what another device rounds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"compile\.device: .*set verify\.reference="):
        reference_device(recipe("compile.device=cuda"))
    with pytest.raises(RecipeError, match=r"^verify\.reference: "):
        reference_device(recipe('verify.reference={device = "cuda"}'))


def test_float16_on_a_cpu_is_refused():
    with pytest.raises(RecipeError, match="is not possible on device"):
        recipe('verify.reference={dtype = "float16"}')


def test_a_key_that_the_table_lacks_is_named():
    with pytest.raises(RecipeError, match=r"unknown key 'reference\.devise'"):
        recipe('verify.reference={devise = "cpu"}')


class Pipe:
    """A pipeline of 400 bytes of weights, and what was asked of it."""

    def __init__(self):
        self.components = {
            "unet": nn.Linear(4, 20, bias=False),
            "scheduler": object(),
            "vae": nn.Linear(4, 5, bias=False),
        }
        self.asked = []

    def to(self, device):
        self.asked.append(("to", device.type))

    def enable_model_cpu_offload(self, device):
        self.asked.append(("offload", device.type))


@pytest.mark.parametrize(
    ("device", "free", "asked"),
    [("cpu", 0, []), ("cuda", 480, [("to", "cuda")]), ("cuda", 479, [("offload", "cuda")])],
)
def test_what_does_not_fit_is_moved_a_component_at_a_time(monkeypatch, device, free, asked):
    monkeypatch.setattr(placement, "free_bytes", lambda _: free)
    pipe = Pipe()
    assert weights_bytes(pipe) == 400
    assert place_pipeline(pipe, torch.device(device)) is (asked != [("offload", "cuda")])
    assert pipe.asked == asked


def test_eager_is_given_everything_on_its_device():
    """On the device `meta`, which computes nothing: inputs that stayed behind would be refused."""
    from prebake.exporter.sites.component import Component
    from prebake.exporter.verify.reference import Reference

    reference = object.__new__(Reference)
    module = nn.Linear(4, 4).to("meta")
    reference._device = torch.device("meta")
    denoiser = Component("denoiser", module, ("x",), ("sample",), (torch.zeros(1, 4),))
    (given,) = reference._own_inputs(denoiser, SimpleNamespace(inputs={"x": torch.zeros(1, 4, dtype=torch.bfloat16)}))
    assert (given.device.type, given.dtype) == ("meta", torch.float32)
    assert module(given).device.type == "meta"
