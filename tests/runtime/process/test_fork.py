"""An open artifact in a process that was forked: the same picture, or a sentence; never a wait without end."""

import pytest

from support import fault_processes


@pytest.fixture(scope="module")
def said(toy_artifact, cache_dir):
    return fault_processes.script("forked_calls.py", toy_artifact, cache_dir, OMP_NUM_THREADS="2")


@pytest.mark.parametrize("how", ["child", "multiprocessing", "loaded after", "parent"])
def test_a_call_gives_the_same_picture(said, how):
    assert said[how] is True


def test_a_fork_of_a_fork_gives_the_same_picture(said):
    assert said["grandchild"] == [True, True]


def test_an_error_comes_out_of_the_call(said):
    assert said["error"].startswith("ZeroDivisionError")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("at work", "while a call was at work"),
        ("in a callback", "while a call"),
        ("graph", "its threads are gone"),
        ("not forkable", "its backend does not"),
    ],
)
def test_what_cannot_go_on_says_so(said, how, words):
    assert said[how].startswith("ArtifactError")
    assert "was forked" in said[how]
    assert words in said[how]
    assert "load it after the fork" in said[how]
