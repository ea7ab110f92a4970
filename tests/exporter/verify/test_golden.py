"""Golden vectors that are not of their plan, in an artifact whose hashes are right."""

import pytest
import torch
from safetensors.torch import save

from prebake.exporter.verify.golden import GOLDEN_TENSORS, read_golden, read_golden_request, refuse_other_tensors
from prebake.runtime import ArtifactError
from prebake.runtime.artifact import open_artifact
from support.paper_artifact import PLAN, relist

GOOD = {name: torch.zeros(2) for name in GOLDEN_TENSORS} | {
    "prompt": torch.tensor(list(b"a cat"), dtype=torch.uint8),
    "seed": torch.tensor([7]),
    "evaluations": torch.tensor([0, 1]),
}
WRONG = {
    "no evaluations": ({"evaluations": torch.tensor([], dtype=torch.int64)}, "'evaluations' are not 1 to 2 numbers"),
    "an evaluation far away": ({"evaluations": torch.tensor([0, 10**9])}, "are not some of the plan's 2"),
    "an evaluation before the first": ({"evaluations": torch.tensor([-1, 0])}, "are not some of the plan's 2"),
    "an evaluation twice": ({"evaluations": torch.tensor([1, 1])}, "are not some of the plan's 2"),
    "evaluations as floats": ({"evaluations": torch.tensor([0.0])}, "'evaluations' are not 1 to 2 numbers"),
    "a table of evaluations": ({"evaluations": torch.zeros(1, 1, dtype=torch.int64)}, "are not 1 to 2 numbers"),
    "no picture": ({"image": None}, "has no 'image'"),
    "a prompt of numbers": ({"prompt": torch.zeros(3)}, "'prompt' is no text"),
    "a prompt that is no UTF-8": ({"prompt": torch.tensor([255], dtype=torch.uint8)}, "'prompt' is no text"),
    "many seeds": ({"seed": torch.tensor([1, 2])}, "'seed' is no whole number"),
    "half a seed": ({"seed": torch.tensor([0.5])}, "'seed' is no whole number"),
}


def test_the_good_ones_are_read():
    assert read_golden_request(GOOD, PLAN) == ("a cat", 7, [0, 1])
    refuse_other_tensors(PLAN, GOOD, dict(GOOD))


@pytest.mark.parametrize("what", WRONG)
def test_vectors_of_another_plan_are_refused(what):
    changes, words = WRONG[what]
    stored = {name: tensor for name, tensor in (GOOD | changes).items() if tensor is not None}
    with pytest.raises(ArtifactError) as caught:
        read_golden_request(stored, PLAN)
    assert words in str(caught.value)
    assert str(caught.value).startswith("golden/2.safetensors: ")


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"image": torch.zeros(3)}, r"'image' is float32 \[3\], the replay's is float32 \[2\]"),
        ({"image": torch.zeros(2, dtype=torch.uint8)}, "'image' is uint8"),
        ({"image": None}, "has no 'image'"),
        ({"embeddings.0.x": torch.zeros(2)}, "has 'embeddings.0.x', which no replay gives"),
    ],
)
def test_other_tensors_than_the_replays_are_refused(stored, words):
    there = {name: tensor for name, tensor in (GOOD | stored).items() if tensor is not None}
    with pytest.raises(ArtifactError, match=words):
        refuse_other_tensors(PLAN, there, GOOD)


def test_what_is_no_safetensors_is_refused(paper, opens):
    (paper / "golden").mkdir()
    (paper / "golden/2.safetensors").write_text("no")
    relist(paper)
    with pytest.raises(ArtifactError, match=r"golden/2\.safetensors: expected safetensors, but"):
        read_golden(open_artifact(paper), "2")
    (paper / "golden/2.safetensors").write_bytes(save(GOOD))
    relist(paper)
    assert read_golden(open_artifact(paper), "2").keys() == GOOD.keys()
