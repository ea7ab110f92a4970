"""Prompts that nobody meant: none stops a server, and each is drawn, cut with a warning, or refused in a sentence."""

import warnings

import pytest

from prebake.runtime import RequestError, load


@pytest.fixture(scope="module")
def pipe(toy_artifact, tmp_path_factory):
    return load(toy_artifact, cache_dir=tmp_path_factory.mktemp("cache"))


def drawn(pipe, prompt):
    return pipe(prompt, seed=1, output_type="latent")[0]


DRAWN = {
    "empty": "",
    "blanks": " \t\n ",
    "emoji": "🦊🏳️‍🌈",
    "another script": "红色的圆",
    "right to left": "\u202ered",
    "a zero byte": "a\0red",
    "one long word": "x" * 100_000,
}


@pytest.mark.parametrize("kind", DRAWN)
def test_it_is_drawn(pipe, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(pipe, DRAWN[kind]).isfinite().all()


def test_ten_thousand_tokens_are_cut_and_the_warning_is_short(pipe):
    with pytest.warns(UserWarning, match="the prompt is longer than") as caught:
        assert drawn(pipe, "red " * 10_000).isfinite().all()
    for warning in caught:
        assert "characters more" in str(warning.message)
        assert len(str(warning.message)) < 400


NO_TEXT = {
    "nothing": (None, "None"),
    "a number": (7, "7"),
    "bytes": (b"red", "b'red'"),
    "a tuple": (("a", "b"), "('a', 'b')"),
    "an empty list": ([], "[]"),
    "a number in a list": (["a", 7], "['a', 7]"),
    "a list in a list": ([["a"]], "[['a']]"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_what_is_no_text_is_refused(pipe, kind):
    value, shown = NO_TEXT[kind]
    with pytest.raises(RequestError) as caught:
        drawn(pipe, value)
    assert str(caught.value) == f"prompt: expected a text or a list of texts, got {shown}"


def test_a_refusal_is_short_too(pipe):
    with pytest.raises(RequestError) as caught:
        drawn(pipe, b"x" * 1_000_000)
    assert len(str(caught.value)) < 400


def test_half_a_character_is_refused(pipe):
    with pytest.raises(RequestError) as caught:
        drawn(pipe, ["a red circle", "a \ud83e red circle"])
    assert str(caught.value) == (
        "prompt: expected a text, got half a character, '\\ud83e' at position 2; decode the text as UTF-8"
    )


def test_after_all_of_them_it_draws_what_it_drew(pipe):
    before = drawn(pipe, "a red circle")
    for kind in NO_TEXT:
        with pytest.raises(RequestError):
            drawn(pipe, NO_TEXT[kind][0])
    assert (drawn(pipe, "a red circle") == before).all()
