"""The world against its checker: true pictures pass, and each single fault fails."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from prebake.exporter.shapes import read_prompt_set
from prebake.exporter.shapes.checker import accuracy, check_picture, parse_prompt
from prebake.exporter.shapes.evaluate import count_open_attributes, draw_prompt_sets
from prebake.exporter.shapes.world import Caption, Scene, loosen_caption, place_scene, render_scene, sample_caption

PROMPT = "a large red circle left of a small blue square on a white background"


@pytest.fixture(scope="module")
def scene() -> Scene:
    return place_scene(parse_prompt(PROMPT), np.random.default_rng(3))


def with_thing(scene: Scene, index: int, **changes) -> np.ndarray:
    things = list(scene.things)
    things[index] = replace(things[index], **changes)
    return render_scene(replace(scene, things=tuple(things)))


def test_ground_truth_is_exact():
    rng = np.random.default_rng(1)
    captions = [sample_caption(rng) for _ in range(100)]
    captions += [loosen_caption(c, rng) for c in captions]
    pictures = [render_scene(place_scene(c, rng)) for c in captions]
    assert accuracy(pictures, captions)["exact"] >= 0.995


def test_every_caption_survives_its_prompt():
    rng = np.random.default_rng(2)
    for _ in range(500):
        caption = loosen_caption(sample_caption(rng), rng)
        assert parse_prompt(str(caption)) == caption
    assert parse_prompt("") == Caption()


def test_same_seed_gives_same_picture():
    a, b = (render_scene(place_scene(parse_prompt(PROMPT), np.random.default_rng(5))) for _ in range(2))
    assert np.array_equal(a, b)


def test_true_picture_passes_as_array_and_as_pil(scene):
    picture = render_scene(scene)
    assert check_picture(picture, PROMPT).exact
    assert check_picture(Image.fromarray((picture * 255).astype(np.uint8)), PROMPT).exact


@pytest.mark.parametrize(
    ("fault", "changes"),
    [("colour", {"colour": "green"}), ("shape", {"shape": "star"}), ("size", {"radius": 8.5})],
)
def test_one_wrong_attribute_fails_and_is_named(scene, fault, changes):
    verdict = check_picture(with_thing(scene, 0, **changes), PROMPT)
    assert not verdict.exact
    assert [name for name, right in verdict.right.items() if not right] == [fault]


def test_wrong_place_fails(scene):
    first, second = scene.things
    swapped = replace(scene, things=(replace(first, x=48.0), replace(second, x=14.0)))
    assert [name for name, right in check_picture(render_scene(swapped), PROMPT).right.items() if not right] == [
        "place"
    ]
    single = "a large red circle at the left on a white background"
    centred = replace(scene, things=(replace(first, x=32.0, y=32.0),))
    assert not check_picture(render_scene(centred), single).right["place"]


def test_wrong_ground_fails(scene):
    verdict = check_picture(render_scene(replace(scene, ground=0.08)), PROMPT)
    assert not verdict.right["ground"]
    assert check_picture(render_scene(replace(scene, ground=0.08)), PROMPT.removesuffix(" on a white background")).exact


def test_extra_missing_and_blank_fail(scene):
    first, second = scene.things
    third = replace(second, shape="star", x=50.0, y=12.0, colour="green")
    extra = replace(scene, things=(replace(first, y=40.0), replace(second, y=48.0), third))
    for picture in (
        render_scene(extra),
        render_scene(replace(scene, things=(first,))),
        render_scene(replace(scene, things=())),
        np.full((64, 64, 3), 255, np.uint8),
        np.zeros((64, 64, 3), np.uint8),
    ):
        assert not check_picture(picture, PROMPT).right["count"]
        assert not check_picture(picture, PROMPT).exact
    assert not check_picture(np.zeros((64, 64, 3), np.uint8), "").exact


def test_noise_and_shapeless_blobs_fail(scene):
    noise = np.random.default_rng(0).random((64, 64, 3), np.float32)
    assert not check_picture(noise, "").exact
    smear = np.full((64, 64, 3), 0.95, np.float32)
    smear[30:34, 4:60] = (0.9, 0.1, 0.1)
    assert not check_picture(smear, "a red shape").exact


def test_unnamed_attributes_are_free(scene):
    for prompt in ("a circle left of a shape", "a shape and a blue square", "a shape and a shape", ""):
        assert check_picture(render_scene(scene), prompt).exact
    assert not check_picture(render_scene(scene), "a red circle").exact  # names one object; there are two


@pytest.mark.parametrize(
    "prompt",
    [
        "a photo of a cat",
        "large red circle",
        "a red large circle",
        "a red circle beside a blue square",
        "a red circle on a purple background",
        "a red circle on a white",
        "a red circle at the left of a star",
        "a red",
    ],
)
def test_prompt_outside_the_grammar_is_an_error_with_the_prompt_in_it(prompt):
    with pytest.raises(ValueError, match=prompt):
        parse_prompt(prompt)


def test_picture_of_another_size_is_an_error():
    with pytest.raises(ValueError, match=r"\(64, 64, 3\)"):
        check_picture(np.zeros((32, 32, 3)), PROMPT)


def test_committed_prompt_sets_are_those_of_the_script():
    assert {name: read_prompt_set(name) for name in ("full", "underspecified")} == draw_prompt_sets()


def test_full_prompts_leave_nothing_open_and_underspecified_ones_much():
    full, loose = read_prompt_set("full"), read_prompt_set("underspecified")
    assert (len(full), len(loose)) == (256, 64)
    assert {count_open_attributes(parse_prompt(p)) for p in full} == {0}
    assert min(count_open_attributes(parse_prompt(p)) for p in loose) >= 3
