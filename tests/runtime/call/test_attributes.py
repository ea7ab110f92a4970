"""What a diffusers pipeline has besides its call: it does the same here, or says how to have it; nothing is set to no effect."""

import copy
import io
import sys
import threading

import pytest
import torch

from prebake.runtime.call.attributes import WAYS_OUT, AbsentAttributeError
from prebake.runtime.errors import CallerError, RequestError
from prebake.runtime.pipeline import ImagePipeline


def drawn(pipe, **call):
    return pipe("red", output_type="latent", **{"seed": 7, **call})[0]


@pytest.fixture
def own(pipe):
    """A pipeline of the test's own."""
    return ImagePipeline(pipe.artifact)


# --- what would have no effect ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for names, _ in WAYS_OUT for name in names])
def test_what_is_diffusers_alone_is_refused_with_the_way_out(own, name):
    assert not hasattr(own, name)
    for act in (lambda: getattr(own, name), lambda: setattr(own, name, None)):
        with pytest.raises(
            AbsentAttributeError, match=rf"^{name}: ImagePipeline has no such attribute, for "
        ) as caught:
            act()
        assert isinstance(caught.value, CallerError)
        assert isinstance(caught.value, AttributeError)


def test_a_misspelt_attribute_is_answered_with_the_nearest(own):
    with pytest.raises(AbsentAttributeError, match=r"_interupt: .+did you mean _interrupt\?"):
        own._interupt = True
    with pytest.raises(AbsentAttributeError, match=r"num_timestep: .+did you mean num_timesteps\?"):
        _ = own.num_timestep


def test_a_pipeline_can_be_copied(own):
    assert torch.equal(drawn(copy.copy(own)), drawn(own))


# --- where it is ------------------------------------------------------------------------------------------------------


def test_to_where_it_is_is_itself(own):
    assert own.to("cpu") is own.to(torch.device("cpu")) is own.to(device="cpu", silence_dtype_warnings=True) is own


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("cuda", r"^to\('cuda'\): the artifact was compiled for cpu.+compile.device=cuda$"),
        ("meta", r"^to\('meta'\): the artifact was compiled for cpu"),
        ("gpu", r"^to\('gpu'\): expected a device or a dtype"),
        ([], r"^to\(\[\]\): expected a device or a dtype"),
        (torch.float16, r"^to\(torch.float16\): .+precision.denoiser=float16$"),
    ],
)
def test_to_somewhere_else_is_refused_with_the_way_there(own, asked, told):
    with pytest.raises(RequestError, match=told):
        own.to(asked)


def test_to_takes_diffusers_arguments_alone(own):
    with pytest.raises(RequestError, match=r"^devise: to does not take it; did you mean device\?"):
        own.to(devise="cpu")


# --- in a callback ----------------------------------------------------------------------------------------------------


def test_a_callback_counts_on_num_timesteps(own):
    seen = []

    def callback(p, step, *_):
        seen.append((step, p.num_timesteps, p.guidance_scale))
        return {}

    assert own.num_timesteps == 4
    drawn(own, callback_on_step_end=callback, guidance_scale=2.0)
    assert seen == [(step, 4, 2.0) for step in range(4)]


def test_guidance_that_is_embedded_before_the_loop_cannot_be_changed_in_it(own):
    def callback(p, *_):
        p._guidance_scale = 0.0
        return {}

    with pytest.raises(RequestError, match=r"^_guidance_scale: .+ before the first step"):
        drawn(own, callback_on_step_end=callback)


def test_outside_a_call_nothing_can_be_changed(own):
    with pytest.raises(RequestError, match=r"^_guidance_rescale: can be set in a call's callback alone"):
        own._guidance_rescale = 0.5


# --- the progress bar -------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_terminal_a_call_shows_its_steps(own, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    plain = drawn(own)
    assert "4/4" in terminal.getvalue()
    monkeypatch.setattr(sys, "stderr", none := io.StringIO())
    assert torch.equal(drawn(own), plain)
    assert none.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", None)  # as under pythonw, or with the descriptor closed
    assert torch.equal(drawn(own), plain)


def test_the_bar_is_of_all_pictures_and_as_its_options_say(own):
    own.set_progress_bar_config(disable=False, desc="red", file=(shown := io.StringIO()))
    drawn(own, num_images_per_prompt=2)
    assert "red: " in shown.getvalue()
    assert "8/8" in shown.getvalue()
    own.set_progress_bar_config(disable=True, file=(hidden := Terminal()))
    drawn(own)
    assert hidden.getvalue() == ""


def test_an_interrupted_call_leaves_its_bar_where_it_was(own):
    own.set_progress_bar_config(disable=False, file=(shown := io.StringIO()))

    def callback(p, step, *_):
        p._interrupt = step == 1
        return {}

    drawn(own, callback_on_step_end=callback)
    assert "4/4" not in shown.getvalue()


def test_an_option_that_is_none_of_tqdms_is_refused(own):
    with pytest.raises(RequestError, match=r"^disabel: tqdm does not take it; did you mean disable\?"):
        own.set_progress_bar_config(disabel=True)


def test_a_pipeline_without_a_bar_imports_none_of_it(own):
    own.set_progress_bar_config()
    loaded = sys.modules.pop("tqdm.auto", None)
    try:
        thread = threading.Thread(target=drawn, args=(own,))
        thread.start()
        thread.join()
        assert "tqdm.auto" not in sys.modules
    finally:
        if loaded:
            sys.modules["tqdm.auto"] = loaded
