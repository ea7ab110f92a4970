"""What every family does alike, against its diffusers pipeline: same seed and prompt, same latents."""

from __future__ import annotations

import pytest
import torch

from support.family_parity import FAMILIES, PROMPTS, TOLERANCE, eager, expected, got, ours, relative_error, seeded

GUIDED = [name for name, case in FAMILIES.items() if case.negatives]


def families(ability: str, names=tuple(FAMILIES), slow=()):
    """The parameter `name`, and for the docs' table which ability of it a test shows. `slow`: whose near kin is tried at every run."""
    return pytest.mark.parametrize(
        "name",
        [
            pytest.param(n, marks=[pytest.mark.works(n, ability), *([pytest.mark.slow] if n in slow else [])])
            for n in names
        ],
    )


@families("a prompt")
def test_one_prompt(name):
    latents = expected(name, PROMPTS[0], generator=seeded(1))
    assert relative_error(got(name, PROMPTS[0], seed=1), latents) < TOLERANCE
    assert relative_error(got(name, PROMPTS[1], seed=1), latents) > 1e-3  # the canary: another prompt
    assert relative_error(got(name, PROMPTS[0], seed=2), latents) > 1e-1  # and another noise


@families("a batch of 3")
def test_three_prompts(name):
    latents = expected(name, list(PROMPTS), generator=seeded(1))
    assert len(latents) == 3
    assert relative_error(got(name, list(PROMPTS), seed=1), latents) < TOLERANCE


@families("a generator each")
def test_a_generator_for_each_image(name):
    latents = expected(name, list(PROMPTS), generator=[seeded(i) for i in range(3)])
    assert relative_error(got(name, list(PROMPTS), generator=[seeded(i) for i in range(3)]), latents) < TOLERANCE


@families("a negative prompt", GUIDED)
def test_negative_prompts(name):
    one, three = "blurry", ["blurry", "ugly old red", ""]
    for prompt, negative in ((PROMPTS[0], one), (list(PROMPTS), three)):
        latents = expected(name, prompt, negative_prompt=negative, generator=seeded(1))
        assert relative_error(got(name, prompt, negative_prompt=negative, seed=1), latents) < TOLERANCE
    assert relative_error(got(name, list(PROMPTS), seed=1), latents) > 1e-4  # the canary: without it


@families("no guidance", GUIDED)
def test_a_guidance_of_one_ignores_the_negative_prompt(name):
    latents = expected(name, PROMPTS[0], guidance_scale=1.0, generator=seeded(1))
    assert (
        relative_error(got(name, PROMPTS[0], negative_prompt="ugly", guidance_scale=1.0, seed=1), latents) < TOLERANCE
    )


@families("batched guidance", GUIDED, slow=("sd2", "sdxl-refiner"))
def test_both_branches_at_once(name):
    negative = "blurry"
    latents = expected(name, PROMPTS[0], negative_prompt=negative, generator=seeded(1))
    batched = got(name, PROMPTS[0], "guidance.branches=batched", negative_prompt=negative, seed=1)
    assert relative_error(batched, latents) < TOLERANCE


@families("embeddings")
def test_embeddings_stand_for_prompts(name):
    """What the text encoder's graph gives, given again."""
    pipe = ours(name)
    branches = {"prompt": "", **({"negative_prompt": "negative_"} if FAMILIES[name].negatives else {})}
    texts = {"prompt": PROMPTS[0], "negative_prompt": "blurry"}
    embeds = {}
    for argument, prefix in branches.items():
        (encoded,) = pipe.family_rules._text({argument: texts[argument]}, prefix)
        embeds |= {prefix + n: encoded[output] for n, output in pipe.family_rules.settings.text.embeds.items()}
    latents = expected(name, None, generator=seeded(1), **{**embeds, **none_of(name)})
    assert relative_error(got(name, None, seed=1, **embeds), latents) < TOLERANCE


def none_of(name: str) -> dict[str, None]:
    """Arguments that default to a text and must not be given with embeddings."""
    import inspect

    parameters = inspect.signature(eager(FAMILIES[name].tiny).__call__).parameters
    return {n: None for n, p in parameters.items() if n.startswith("negative_prompt") and isinstance(p.default, str)}


@families("long prompts")
def test_what_does_not_fit_is_cut_off_with_a_warning_that_names_it(name):
    words = " ".join(["red circle"] * 400 + ["heart"])
    with pytest.warns(UserWarning, match=r"cut off: '.*red circle red"):
        cut = got(name, words, seed=1)
    assert relative_error(cut, expected(name, words, generator=seeded(1))) < TOLERANCE


@families("pictures")
def test_the_decoded_picture(name):
    pipe, case = eager(FAMILIES[name].tiny), FAMILIES[name]
    call = {"output_type": "pt", "generator": seeded(1)}
    picture = expected(name, PROMPTS[0], **call)
    ours_ = ours(name)(PROMPTS[0], output_type="pt", seed=1, **case.ours)[0]
    assert ours_.shape == picture.shape
    # pictures in 0..1: differences of latents through a decoder that is nearly linear
    torch.testing.assert_close(ours_, picture, rtol=0, atol=1e-4)
    assert type(pipe).__name__ == ours(name).artifact.manifest.source.pipeline
