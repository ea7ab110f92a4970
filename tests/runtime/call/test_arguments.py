"""What a call is given: NumPy's numbers mean what the numbers mean, and anything else is one sentence of the caller's kind."""

import threading

import numpy as np
import pytest
import torch

from prebake.runtime.call.arguments import real_number, truth_value, whole_number
from prebake.runtime.errors import RequestError
from prebake.runtime.families.sdxl import size_numbers
from support import toy_model as toy


def drawn(pipe, **call):
    return pipe("red", output_type="latent", **{"seed": 7, **call})[0]


SAME = {
    "seed": ({"seed": np.int64(7)}, {"seed": 7}),
    "a tensor": ({"seed": torch.tensor(7)}, {"seed": 7}),
    "a small type": ({"seed": np.uint8(7)}, {"seed": 7}),
    "a negative seed": ({"seed": np.int64(-1)}, {"seed": -1}),
    "the highest seed": ({"seed": np.uint64(2**64 - 1)}, {"seed": 2**64 - 1}),
    "steps and sizes": (
        {"num_inference_steps": np.int64(4), "height": np.int32(8), "width": np.int64(8)},
        {"num_inference_steps": 4},
    ),
    "length and count": ({"max_sequence_length": np.int64(6), "num_images_per_prompt": np.int64(2)}, {"num_images_per_prompt": 2}),
    "guidance": ({"guidance_scale": np.float32(2.5)}, {"guidance_scale": 2.5}),
    "guidance of a tensor": ({"guidance_scale": torch.tensor(2.5)}, {"guidance_scale": 2.5}),
    "a choice": ({"cache": np.bool_(False)}, {"cache": False}),
    "generators in a tuple": (
        {"seed": None, "generator": (torch.Generator().manual_seed(7),)},
        {"seed": 7},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_a_number_means_itself_whatever_its_type(pipe, case):
    given, plain = SAME[case]
    assert torch.equal(drawn(pipe, **given), drawn(pipe, **plain))


REFUSED = {
    "a seed of 65 bits": ({"seed": 2**64}, "seed=18446744073709551616: expected a whole number of 64 bits"),
    "a low seed": ({"seed": -(2**63) - 1}, "seed=-9223372036854775809: expected a whole number of 64 bits"),
    "a seed in words": ({"seed": "x"}, "seed: expected a whole number, got 'x'"),
    "a broken seed": ({"seed": 7.5}, "seed: expected a whole number, got 7.5"),
    "seeds": ({"seed": [1, 2]}, "seed: expected a whole number, got [1, 2]"),
    "seeds in an array": ({"seed": np.arange(2)}, "seed: expected a whole number, got ndarray [2]"),
    "a true seed": ({"seed": True}, "seed: expected a whole number, got True"),
    "a number as generator": ({"seed": None, "generator": 42}, "generator: expected a torch.Generator, or a list of them, got 42"),
    "numbers as generators": ({"seed": None, "generator": [1]}, "generator: expected a torch.Generator, or a list of them, got 1"),
    "NumPy's generator": ({"seed": None, "generator": np.random.default_rng(1)}, "generator: expected a torch.Generator"),
    "steps": ({"num_inference_steps": [4]}, "num_inference_steps: expected a whole number, got [4]"),
    "steps of 4.0": ({"num_inference_steps": 4.0}, "num_inference_steps: expected a whole number, got 4.0"),
    "height": ({"height": "8"}, "height: expected a whole number, got '8'"),
    "no height": ({"height": 0}, "height=0, width=8: the artifact makes"),
    "count": ({"num_images_per_prompt": [1]}, "num_images_per_prompt: expected a whole number, got [1]"),
    "length": ({"max_sequence_length": "6"}, "max_sequence_length: expected a whole number, got '6'"),
    "frames": ({"num_frames": "9"}, "num_frames: expected a whole number, got '9'"),
    "guidances": ({"guidance_scale": [7.5]}, "guidance_scale: expected a number, got [7.5]"),
    "guidance in words": ({"guidance_scale": "7.5"}, "guidance_scale: expected a number, got '7.5'"),
    "guidance beyond floats": ({"guidance_scale": 10**400}, "guidance_scale: expected a finite number, got 1000"),
    "true guidance": ({"guidance_scale": True}, "guidance_scale: expected a number, got True"),
    "strength": ({"strength": "1", "image": torch.zeros(3, 8, 8)}, "strength: expected a number, got '1'"),
    "cache": ({"cache": "no"}, "cache: expected True or False, got 'no'"),
    "latents as an array": ({"latents": np.zeros((1, toy.N, toy.C))}, "latents: expected a tensor of floats, got ndarray"),
    "latents of bytes": ({"latents": torch.zeros(1, toy.N, toy.C, dtype=torch.uint8)}, "latents: expected a tensor of floats, got torch.uint8"),
    "a callback": ({"callback_on_step_end": 3}, "callback_on_step_end: expected a function, got 3"),
    "cancel": ({"cancel": True}, "cancel: expected a threading.Event, got True"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_none_is_refused_in_a_sentence(pipe, case):
    given, told = REFUSED[case]
    with pytest.raises(RequestError) as caught:
        drawn(pipe, **given)
    assert str(caught.value).startswith(told)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("num_infernce_steps", "num_inference_steps"),
        ("guidence_scale", "guidance_scale"),
        ("Prompt_2", "prompt_2"),
        ("generators", "generator"),
        ("num_image_per_prompt", "num_images_per_prompt"),
    ],
)
def test_a_misspelt_argument_is_answered_with_the_nearest_and_all(pipe, name, meant):
    with pytest.raises(RequestError, match=rf"^{name}: .+did you mean {meant}\? it takes ") as caught:
        drawn(pipe, **{name: 28})
    listed = str(caught.value).partition("it takes ")[2].split(", ")
    assert {"prompt", "num_inference_steps", "seed", "callback_on_step_end", "cancel"} <= set(listed)
    assert len(set(listed)) == len(listed)
    assert "negative_prompt" not in listed  # this family's artifact takes none


def test_what_is_nothing_like_an_argument_is_no_guess(pipe):
    with pytest.raises(RequestError, match=r"^clip_skip: .+ does not take it; it takes "):
        drawn(pipe, clip_skip=1)


def test_sizes_of_any_integers_are_sizes():
    plain = {"original_size": (64, 32), "crops_coords_top_left": (0, 4)}
    arrays = {"original_size": np.array([64, 32]), "crops_coords_top_left": (np.int64(0), torch.tensor(4))}
    assert size_numbers(arrays, (8, 8), scored=False) == size_numbers(plain, (8, 8), scored=False)
    with pytest.raises(RequestError, match=r"^original_size: expected a number, got True$"):
        size_numbers({"original_size": (True, 1)}, (8, 8), scored=False)
    with pytest.raises(RequestError, match=r"^aesthetic_score: expected a number"):
        size_numbers({"aesthetic_score": [6.0]}, (8, 8), scored=True)


@pytest.mark.parametrize("value", [threading.Event(), None, "1", b"1", [1], {}, (), object(), np.array([1.0]), 1j])
@pytest.mark.parametrize("read", [whole_number, real_number, truth_value])
def test_no_other_object_is_a_number(read, value):
    with pytest.raises(RequestError, match=r"^x: expected "):
        read("x", value)
