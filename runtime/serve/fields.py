"""The fields of a request to the Images API, and what becomes of each: `docs/how-to/serve.md` has the table, `FIELDS` is it.

A request's fields come in as JSON or as a form; out comes `ImageFields`, and with an artifact's plans the arguments of its pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError

MAX_PICTURES = 10
MAX_PARTIAL_PICTURES = 3
MAX_PROMPT_CHARACTERS = 32_000
Quality = Literal["low", "medium", "high"]
QUALITIES: Mapping[str, Quality] = {
    "low": "low", "medium": "medium", "high": "high", "auto": "medium", "standard": "medium", "hd": "high",
}  # fmt: skip


class FieldRule(NamedTuple):
    """What becomes of a field: it is `done`, `mapped` to what there is, or `refused` with a 400 that names it."""

    fate: Literal["done", "mapped", "refused"]
    note: str


FIELDS: Mapping[str, FieldRule] = {
    "prompt": FieldRule("done", f"up to {MAX_PROMPT_CHARACTERS} characters"),
    "model": FieldRule("done", "a name of `/v1/models`; left out, the first; another one is a 404"),
    "n": FieldRule("done", f"1 to {MAX_PICTURES}; 1 with `stream`"),
    "size": FieldRule("done", "a size of the artifact, `auto` its first"),
    "image": FieldRule("done", "edit: one picture as a file, where the artifact was exported for image-to-image"),
    "mask": FieldRule("mapped", "edit: its transparent part is drawn anew; without transparency its white part"),
    "quality": FieldRule(
        "mapped", "`low`, `medium`, `high` are plans; `auto` and `standard` are `medium`, `hd` is `high`"
    ),
    "output_format": FieldRule("done", "`png`, `jpeg`, `webp`"),
    "output_compression": FieldRule("done", "0 to 100, the quality of `jpeg` and `webp`"),
    "response_format": FieldRule("done", "`b64_json`; `url` is refused, since no picture is kept"),
    "stream": FieldRule("done", "events as pictures come"),
    "partial_images": FieldRule(
        "done", f"0 to {MAX_PARTIAL_PICTURES}, with `stream`; each costs a call of the decoder"
    ),
    "background": FieldRule("mapped", "`auto` and `opaque`; no artifact makes transparent pictures"),
    "moderation": FieldRule("mapped", "`auto` and `low` are taken; nothing is moderated"),
    "user": FieldRule("mapped", "goes to the log of the request"),
    "safety_identifier": FieldRule("mapped", "goes to the log and into the answer; nothing is moderated"),
    "style": FieldRule("refused", "say it in the prompt"),
    "input_fidelity": FieldRule("refused", "say it by `strength`"),
    "complexity": FieldRule("refused", "artifacts make pictures of pixels"),
    "frame_count": FieldRule("refused", "artifacts make single pictures here"),
    "frame_duration_ms": FieldRule("refused", "artifacts make single pictures here"),
    "markup": FieldRule("refused", "artifacts make pictures of pixels"),
    "svg": FieldRule("refused", "artifacts make pictures of pixels"),
    "lora": FieldRule("refused", "an artifact's weights were fixed at its export"),
    "loras": FieldRule("refused", "an artifact's weights were fixed at its export"),
    "negative_prompt": FieldRule("done", "extension"),
    "num_inference_steps": FieldRule("done", "extension: one of the artifact's plans, in place of `quality`"),
    "guidance_scale": FieldRule("done", "extension"),
    "true_cfg_scale": FieldRule("done", "extension"),
    "strength": FieldRule("done", "extension, edit: how far to go from the picture, 0 to 1"),
    "seed": FieldRule("done", "extension: the answer has it, a drawn one too"),
}
"""By name, those of the client's `images.generate` and `images.edit` before the extensions."""


class ImageFields(BaseModel):
    """The fields that are not refused, checked, but for the files. What the artifact has is not known here."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = None
    n: int = Field(default=1, ge=1, le=MAX_PICTURES)
    size: str = Field(default="auto", pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] = "auto"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(default=None, ge=0, le=100)
    response_format: Literal["b64_json"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(default=0, ge=0, le=MAX_PARTIAL_PICTURES)
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=512)
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARACTERS)
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    strength: float | None = None
    seed: int | None = None

    @property
    def safety_id(self) -> str | None:
        """Whom the client says that the request is for."""
        return self.safety_identifier or self.user

    def size_arguments(self) -> dict[str, int]:
        """The pipeline's `height` and `width`, nothing for the default."""
        if self.size == "auto":
            return {}
        width, height = map(int, self.size.split("x"))
        return {"height": height, "width": width}


def read_fields(values: Mapping[str, Any]) -> ImageFields:
    """The fields, as JSON or a form has them; null is as good as left out. Raises ApiError 400 with the field that is wrong."""
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        rule = FIELDS.get(name)
        if rule is None or rule.fate == "refused":
            why = rule.note if rule else f"no such field; there are {', '.join(n for n in FIELDS if is_taken(n))}"
            raise ApiError(400, f"{name}: this server does not take it: {why}", name)
    try:
        fields = ImageFields.model_validate(given)
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0])
        raise ApiError(400, f"{name}: {first['msg'][:1].lower()}{first['msg'][1:]}; {FIELDS[name].note}", name) from e
    refuse_combinations(fields)
    return fields


def is_taken(name: str) -> bool:
    return FIELDS[name].fate != "refused"


def refuse_combinations(fields: ImageFields) -> None:
    """Raises ApiError 400 for fields that do not go together."""
    if fields.stream and fields.n > 1:
        raise ApiError(400, f"n={fields.n}: with stream, one picture is drawn; send a request for each", "n")
    if fields.partial_images and not fields.stream:
        raise ApiError(400, "partial_images: they come as events; give stream=true with it", "partial_images")
    if fields.output_compression not in (None, 100) and fields.output_format == "png":
        raise ApiError(
            400,
            "output_compression: a png is compressed without loss; give output_format=jpeg or webp",
            "output_compression",
        )
    if fields.num_inference_steps is not None and fields.quality != "auto":
        raise ApiError(400, "quality: it chooses a number of steps; give it or num_inference_steps", "quality")
