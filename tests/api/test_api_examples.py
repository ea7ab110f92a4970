"""The examples of the docstrings, in the order of an afternoon: exported, then verified."""

from __future__ import annotations

import doctest

import pytest

import prebake

pytestmark = pytest.mark.slow  # one export, compiled


@pytest.mark.filterwarnings("ignore")
def test_the_examples_do_what_they_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    found = doctest.DocTestFinder(recurse=False)
    for function in (prebake.export, prebake.verify):
        (examples,) = found.find(function, function.__name__, globs={"prebake": prebake})
        assert runner.run(examples).failed == 0, capsys.readouterr().out
    pipe = prebake.load("artifacts/x")
    assert pipe("a red circle", seed=7).images[0].size == pipe.sizes[0][::-1]
    assert capsys.readouterr().err == ""
