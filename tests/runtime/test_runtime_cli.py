"""`run` and `inspect`, as `python -m prebake.runtime` has them."""

import json

import pytest
from PIL import Image

import toy
from prebake.runtime.__main__ import main
from prebake.runtime.cli import drawn, numbered, short


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, cache_dir):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_dir))


def test_run_writes_the_image_that_the_call_gives(toy_artifact, pipe, tmp_path, capsys):
    path = tmp_path / "x.png"
    assert (
        main(["run", str(toy_artifact), "red circle", "--seed", "7", "--guidance-scale", "2", "--output", str(path)])
        == 0
    )
    assert Image.open(path).tobytes() == pipe("red circle", seed=7, guidance_scale=2.0).images[0].tobytes()
    assert capsys.readouterr().out.startswith(f"{path}\nloaded in ")


def test_run_numbers_several_images_and_speaks_json(toy_artifact, tmp_path, capsys):
    args = ["red", "blue", "--num-images", "2", "--no-cache", "--json", "--output", str(tmp_path / "x.png")]
    assert main(["run", str(toy_artifact), *args]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["images"] == [str(tmp_path / f"x-{i}.png") for i in range(4)]
    assert all(path.exists() for path in numbered(tmp_path / "x.png", 4))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--steps", "9"],
            "error: num_inference_steps=9: the artifact has the plans 4, 4-uncached; export again with another one",
        ),
        (["--output", "/nonexistent/x.png"], "error: /nonexistent/x.png: the image could not be written"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(toy_artifact, capsys, args, words):
    assert main(["run", str(toy_artifact), "red", *args]) == 1
    err = capsys.readouterr().err
    assert err.startswith(words)
    assert err.count("\n") == 1


def test_inspect_draws_the_plans_and_counts_layers(toy_artifact, capsys):
    assert main(["inspect", str(toy_artifact)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4           █·█·  cache taylor, toy" in lines
    assert "4-uncached  ████  cache none, toy" in lines
    assert "            █ = full, · = reuse" in lines
    assert lines[-1] == "layers  1 int8, 1 kept (--layers says why)"
    assert any(line.startswith("full ") and "28.6%" in line for line in lines)  # 2 of 7 equal calls


def test_strips_are_letters_where_the_terminal_has_no_blocks():
    letters = {"full": "1", "reuse": "0", "reuse-2": "a", "reuse-5": "d"}
    assert drawn(letters, "ascii") == drawn(letters, None) == drawn(letters, "no-such-encoding") == letters
    assert drawn(letters, "utf-8") == {"full": "█", "reuse": "·", "reuse-2": "░", "reuse-5": "d"}


def test_inspect_marks_plans_that_nobody_verified(artifact_copy, capsys):
    toy.edit_manifest(artifact_copy, status="verified", unverified=["4"])
    assert main(["inspect", str(artifact_copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4           █·█·  cache taylor, toy, unverified" in lines
    assert "4-uncached  ████  cache none, toy" in lines
    assert "added since, and not compared with the pipeline: 4; `prebake verify --source` does that" in lines
    assert main(["inspect", str(artifact_copy), "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert (plans["4"]["verified"], plans["4-uncached"]["verified"]) == (False, True)


def test_inspect_lists_layers_with_their_reasons(toy_artifact, capsys):
    assert main(["inspect", str(toy_artifact), "--layers"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "layer  treatment  reason",
        "block  int8       large",
        "embed  kept       too small",
    ]


def test_inspect_speaks_json(toy_artifact, capsys):
    assert main(["inspect", str(toy_artifact), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["plans"]["4"]["strip"] == "1010"
    assert [g["name"] for g in told["graphs"]][:2] == ["full", "reuse"]
    assert told["sizes"]["total"] > told["sizes"]["graphs"] > 0


def test_inspect_opens_no_file_outside_the_folder(artifact_copy, capsys):
    toy.edit_manifest(artifact_copy, plans={"4": "../secret.json"})
    assert main(["inspect", str(artifact_copy)]) == 1
    assert "'../secret.json' is not a plain name inside the folder" in capsys.readouterr().err


def test_numbers_are_short():
    assert [short(n) for n in (0, 999, 1000, 999_700, 1.234e9, 5e15)] == ["0", "999", "1k", "1M", "1.23G", "5P"]
