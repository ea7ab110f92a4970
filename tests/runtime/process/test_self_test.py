"""torch that computes wrong in this process is found at load, and again when its number of threads changes."""

import pytest
import torch
from torch.nn import functional

from prebake.runtime import ArtifactError, load
from prebake.runtime.process import self_test


@pytest.fixture(autouse=True)
def untested():
    self_test.wrong_arithmetic.cache_clear()
    yield
    torch.set_num_threads(1)
    self_test.wrong_arithmetic.cache_clear()


KERNELS = {
    "bfloat16 products": (functional, "linear"),
    "int8 products": (self_test, "int8_product"),
    "attention": (functional, "scaled_dot_product_attention"),
    "convolutions": (functional, "conv2d"),
}


def leave_half_undone(monkeypatch, name):
    """The kernel computes the first half of what it should, as if its other thread had not been there."""
    module, function = KERNELS[name]
    right = getattr(module, function)

    def halved(*args, **kwargs):
        made = right(*args, **kwargs).clone()
        made.view(-1)[made.numel() // 2 :] = -1
        return made

    monkeypatch.setattr(module, function, halved)


@pytest.mark.parametrize("threads", [1, 2])
def test_right_results_pass(threads):
    torch.set_num_threads(threads)
    assert self_test.wrong_arithmetic(threads) == ""


@pytest.mark.parametrize("name", KERNELS)
def test_a_wrong_kernel_is_named_at_load(toy_artifact, cache_dir, monkeypatch, name):
    leave_half_undone(monkeypatch, name)
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    with pytest.raises(ArtifactError, match=f"with 1 threads: .*{name}.*OMP_DYNAMIC=true") as caught:
        load(toy_artifact, cache_dir=cache_dir)
    assert "OMP_NUM_THREADS=1" in str(caught.value)


def test_another_number_of_threads_is_tried_at_the_next_call(toy_artifact, cache_dir, monkeypatch):
    pipe = load(toy_artifact, cache_dir=cache_dir)
    leave_half_undone(monkeypatch, "bfloat16 products")
    pipe("red", seed=1)  # tried already, and not again
    torch.set_num_threads(2)
    with pytest.raises(ArtifactError, match="with 2 threads: bfloat16 products"):
        pipe("red", seed=1)
