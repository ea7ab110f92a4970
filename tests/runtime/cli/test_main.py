"""`run` and `inspect`, as `python -m prebake.runtime` has them."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from prebake.runtime.__main__ import main
from prebake.runtime.cli.run import numbered_paths, save_image
from prebake.runtime.errors import RequestError
from prebake.runtime.pipeline import ImageOutput, VideoOutput
from prebake.runtime.text import block_signs, format_count
from support import toy_model as toy


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
    assert all(path.exists() for path in numbered_paths(tmp_path / "x.png", 4))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--steps", "9"],
            "error: num_inference_steps=9: the artifact has the plans 4, 4-uncached; export again with another one",
        ),
        (["--output", "/nonexistent/x.png"], "error: /nonexistent/x.png: there is no folder /nonexistent to write to"),
        (["--output", "x.mp4"], "error: x.mp4: the artifact makes images, and none can be written so"),
        (["--fps", "8"], "error: --fps: the artifact makes images, which have no frames; leave it out"),
        (["--image", "absent.png"], "error: absent.png: expected a picture, such as a .png or .jpg, but "),
        (["--mask", __file__], f"error: {__file__}: expected a picture, such as a .png or .jpg, but "),
        (["--strength", "0.5"], "error: strength: "),
        (["--guidance-scale", "nan"], "error: guidance_scale=nan: expected a finite number"),
        (["--seed", str(2**64)], "error: seed=18446744073709551616: expected a whole number of 64 bits"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(toy_artifact, capsys, args, words):
    assert main(["run", str(toy_artifact), "red", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith(words)
    assert err.count("\n") == 1


def test_an_image_that_cannot_be_saved_is_one_line_too(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(RequestError, match=r"x\.png: .* not be written: .*; give --output a \.png"):
        save_image(Image.new("RGB", (2, 2)), tmp_path / "x.png")


class Fake:
    """What `load` gives, without an artifact: it keeps how it was called."""

    def __init__(self, monkeypatch, made, num_frames=None):
        self.made = made
        manifest = SimpleNamespace(defaults=SimpleNamespace(num_frames=num_frames))
        monkeypatch.setattr("prebake.runtime.cli.run.read_manifest", lambda folder: manifest)
        monkeypatch.setattr("prebake.runtime.pipeline.load", lambda folder, **_: self)

    def __call__(self, prompts, **arguments):
        self.prompts, self.arguments = prompts, arguments
        return self.made


def test_run_is_quiet_where_that_is_asked_for(monkeypatch, tmp_path, capsys):
    Fake(monkeypatch, ImageOutput([still("white")]))
    assert main(["run", "anywhere", "a", "--quiet", "--output", str(tmp_path / "x.png")]) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "x.png").exists()


def test_run_writes_one_image_to_stdout_and_nothing_else(monkeypatch, capfdbinary):
    Fake(monkeypatch, ImageOutput([still("red")]))
    assert main(["run", "anywhere", "a", "--output", "-"]) == 0
    out, err = capfdbinary.readouterr()
    assert Image.open(io.BytesIO(out)).getpixel((0, 0)) == (255, 0, 0)
    assert err == b""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["a", "b"], "--output -: expected one image, and the artifact would make 2 images"),
        (["a", "--num-images", "3"], "would make 3 images"),
        (["a", "--json"], "leave --json out"),
    ],
)
def test_what_stdout_cannot_hold_is_refused_before_it_is_made(monkeypatch, capsys, args, words):
    fake = Fake(monkeypatch, ImageOutput([still("red")]))
    assert main(["run", "anywhere", *args, "--output", "-"]) == 2
    assert words in capsys.readouterr().err
    assert not hasattr(fake, "prompts")


def still(colour, size=(16, 24)):
    return Image.new("RGB", size, colour)


@pytest.fixture
def videos(monkeypatch, tmp_path):
    """An artifact that makes two videos of three frames, and a folder to be in."""
    monkeypatch.chdir(tmp_path)
    video = [still("red"), still("green"), still("blue")]
    return Fake(monkeypatch, VideoOutput([video, video[::-1]]), num_frames=3)


def test_run_hands_over_pictures_mask_and_strength(monkeypatch, tmp_path):
    fake = Fake(monkeypatch, ImageOutput([still("white")]))
    Image.new("RGBA", (5, 4), (200, 10, 10, 128)).save(tmp_path / "start.png")
    still("white", (5, 4)).convert("1").save(tmp_path / "mask.png")
    args = ["--image", str(tmp_path / "start.png"), "--mask", str(tmp_path / "mask.png"), "--strength", "0.4"]
    assert main(["run", "anywhere", "a", "b", *args, "--output", str(tmp_path / "x.png")]) == 0
    assert fake.prompts == ["a", "b"]
    given = fake.arguments
    assert (given["image"].mode, given["image"].size, given["image"].getpixel((0, 0))) == ("RGB", (5, 4), (200, 10, 10))
    assert (given["mask_image"].mode, given["mask_image"].getpixel((0, 0))) == ("RGB", (255, 255, 255))
    assert given["strength"] == 0.4


def test_run_leaves_to_the_pipeline_what_nobody_said(monkeypatch, tmp_path):
    fake = Fake(monkeypatch, ImageOutput([still("white")]))
    assert main(["run", "anywhere", "a", "--output", str(tmp_path / "x.png")]) == 0
    assert {name for name, value in fake.arguments.items() if value is not None} == {"num_images_per_prompt", "cache"}


def test_run_writes_videos_and_numbers_them(videos, capsys):
    assert main(["run", "anywhere", "a", "b", "--output", "x.gif", "--fps", "10", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"videos", "load_seconds", "videos_seconds"}
    assert told["videos"] == ["x-0.gif", "x-1.gif"]
    for name, first in (("x-0.gif", (255, 0, 0)), ("x-1.gif", (0, 0, 255))):
        with Image.open(name) as gif:
            assert (gif.n_frames, gif.size, gif.info["duration"]) == (3, (16, 24), 100)
            assert gif.convert("RGB").getpixel((3, 3)) == first


def test_a_video_s_default_name_is_what_can_be_written(videos, monkeypatch, capsys, tmp_path):
    pytest.importorskip("av", reason="needs the extra `video`")
    videos.made = VideoOutput(videos.made.frames[:1])
    assert main(["run", "anywhere", "a"]) == 0
    assert capsys.readouterr().out.startswith("video.mp4\nloaded in 0.00 s, 1 video in ")
    monkeypatch.setitem(sys.modules, "av", None)
    assert main(["run", "anywhere", "a"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["video.gif", "video.mp4"]
    assert b"ftyp" in (tmp_path / "video.mp4").read_bytes()[:12]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--output", "x.png"], "error: x.png: a video is written to a file that ends in .mp4 or .gif"),
        (["--output", "x.gif", "--fps", "0"], "error: x.gif: expected 1 to 50, the most that a .gif can play"),
        (["--output", "absent/x.gif"], "error: absent/x.gif: there is no folder absent to write to"),
    ],
)
def test_a_video_that_cannot_be_written_is_refused_before_it_is_made(videos, capsys, args, words):
    assert main(["run", "anywhere", "a", *args]) == 2
    err = capsys.readouterr().err
    assert err.startswith(words)
    assert err.count("\n") == 1
    assert not hasattr(videos, "arguments")


def test_inspect_draws_the_plans_and_counts_layers(toy_artifact, capsys):
    assert main(["inspect", str(toy_artifact)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4           █·█·  cache taylor, toy" in lines
    assert "4-uncached  ████  cache none, toy" in lines
    assert "            █ = full, · = reuse" in lines
    assert any(line.startswith("stored      ") for line in lines)
    assert lines[-1] == "layers  1 int8, 1 kept (--layers says why)"
    assert any(line.startswith("full ") and "33.3%" in line for line in lines)  # 2 of 6 equal calls


def test_inspect_fits_80_columns(artifact_copy, capsys):
    plan = json.loads((artifact_copy / "plans/4.json").read_text())
    plan["evaluations"] *= 30  # inspect reads a plan without holding it to its name
    (artifact_copy / "plans/4.json").write_text(json.dumps(plan))
    assert main(["inspect", str(artifact_copy)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("█·█·") >= 25, "the strip is broken, not cut"


def test_strips_are_letters_where_the_terminal_has_no_blocks():
    letters = {"full": "1", "reuse": "0", "reuse-2": "a", "reuse-5": "d"}
    assert (
        block_signs(letters, "ascii")
        == block_signs(letters, None)
        == block_signs(letters, "no-such-encoding")
        == letters
    )
    assert block_signs(letters, "utf-8") == {"full": "█", "reuse": "·", "reuse-2": "░", "reuse-5": "d"}


def test_inspect_counts_the_frames_of_a_video(artifact_copy, capsys):
    told = json.loads((artifact_copy / "manifest.json").read_text())["defaults"]
    size = f"{told['width']} x {told['height']} pixels"
    assert main(["inspect", str(artifact_copy)]) == 0
    assert f", {size}" in capsys.readouterr().out
    toy.edit_manifest(artifact_copy, defaults=told | {"num_frames": 9})
    assert main(["inspect", str(artifact_copy)]) == 0
    assert f", 9 frames of {size}" in capsys.readouterr().out


def test_inspect_marks_plans_that_nobody_verified(artifact_copy, capsys):
    toy.edit_manifest(artifact_copy, status="verified", unverified=["4"])
    assert main(["inspect", str(artifact_copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "verified, plan 4 never compared)" in " ".join(line.strip() for line in lines[:4])
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
    assert main(["inspect", str(artifact_copy)]) == 5
    assert "'../secret.json' is not a plain name inside the folder" in capsys.readouterr().err


def test_numbers_are_short():
    assert [format_count(n) for n in (0, 999, 1000, 999_700, 1.234e9, 5e15)] == ["0", "999", "1k", "1M", "1.23G", "5P"]
