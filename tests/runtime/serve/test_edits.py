"""`images.edit` on an artifact that begins from pictures: its graphs as they are, uncompiled, and the application in this process."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from prebake.runtime.serve.app import create_app
from prebake.runtime.serve.metrics import Metrics
from prebake.runtime.serve.models import ModelTable, ServeOptions
from support.family_parity import PICTURE, PROMPTS, ours

Ask = Callable[[Callable[[openai.AsyncOpenAI], Awaitable[Any]]], Any]


@pytest.fixture(scope="module")
def drawn():
    return ours("sd", "sampler.image_to_image=true")


@pytest.fixture(scope="module")
def ask(drawn, tmp_path_factory):
    """Asks the application, by OpenAI's client."""
    folder = tmp_path_factory.mktemp("served") / "edits"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prebake.runtime.serve.models.load", lambda *_, **__: drawn)
        models = ModelTable([folder], ServeOptions(), Metrics())
        models.open_all()
    app = create_app(models)

    def asked(question: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
        async def run() -> Any:
            async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app)) as http:
                return await question(
                    openai.AsyncOpenAI(api_key="none", base_url="http://x/v1", max_retries=0, http_client=http)
                )

        return asyncio.run(run())

    yield asked
    for model in models.all():
        model.engine.close()


def png(image: Image.Image) -> tuple[str, bytes]:
    data = io.BytesIO()
    image.save(data, "PNG")
    return "picture.png", data.getvalue()


def pixels(b64: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(b64))))


CALL = {"seed": 7, "strength": 0.8, "guidance_scale": 3.0}


def test_a_picture_is_edited(ask, drawn):
    image = PICTURE.convert("RGB")
    made = ask(lambda client: client.images.edit(image=png(image), prompt=PROMPTS[0], extra_body=CALL))
    want = np.asarray(drawn(PROMPTS[0], image=image, **CALL).images[0])
    assert np.array_equal(pixels(made.data[0].b64_json), want)
    listed = ask(lambda client: client.images.edit(image=[png(image)], prompt=PROMPTS[0], extra_body=CALL))
    assert np.array_equal(pixels(listed.data[0].b64_json), want)


@pytest.mark.parametrize("transparent", [True, False])
def test_a_mask_says_where_to_draw(ask, drawn, transparent):
    """OpenAI's is transparent there, diffusers' white."""
    where = np.zeros((32, 32), np.uint8)
    where[8:24, 4:20] = 255
    white = Image.fromarray(where)
    mask = white
    if transparent:
        mask = PICTURE.convert("RGBA")
        mask.putalpha(Image.fromarray(255 - where))
    image = PICTURE.convert("RGB")
    made = ask(lambda c: c.images.edit(image=png(image), mask=png(mask), prompt=PROMPTS[0], extra_body=CALL))
    want = drawn(PROMPTS[0], image=image, mask_image=white, **CALL).images[0]
    assert np.array_equal(pixels(made.data[0].b64_json), np.asarray(want))


def test_an_edit_is_streamed(ask, drawn):
    async def question(client: openai.AsyncOpenAI) -> list[Any]:
        events = await client.images.edit(
            image=png(PICTURE.convert("RGB")), prompt=PROMPTS[0], stream=True, partial_images=1, extra_body=CALL
        )
        return [event async for event in events]

    partial, last = ask(question)
    assert (partial.type, last.type) == ("image_edit.partial_image", "image_edit.completed")
    want = np.asarray(drawn(PROMPTS[0], image=PICTURE.convert("RGB"), **CALL).images[0])
    assert np.array_equal(pixels(last.b64_json), want)


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ({"image": [png(PICTURE), png(PICTURE)]}, "image"),
        ({"image": ("x.png", b"GIF89a")}, "image"),
        ({"image": png(PICTURE), "mask": ("x.png", b"none")}, "mask"),
        ({"image": png(PICTURE), "markup": png(PICTURE)}, "markup"),
        ({"image": png(PICTURE), "extra_body": {"strength": 2}}, "strength"),
    ],
)
def test_what_is_no_picture_to_begin_with_is_named(ask, files, param):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(lambda client: client.images.edit(prompt=PROMPTS[0], **files))
    assert refused.value.param == param
