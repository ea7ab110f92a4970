"""Pictures as files: those that a client sends, and those that it is sent. Nothing is read from a URL or a path."""

from __future__ import annotations

import base64
import io

from PIL import Image, ImageOps

from .errors import ApiError

MAX_SIDE = 8192
"""Pixels of a picture's side; more is refused before it is decoded."""


def read_picture(field: str, data: bytes) -> Image.Image:
    """The picture, upright, in the mode of its file. Raises ApiError 400, naming the field, for what is none or too large."""
    try:
        image = Image.open(io.BytesIO(data))
        if max(image.size) > MAX_SIDE:
            raise ApiError(
                400, f"{field}: {image.width} x {image.height} pixels; send at most {MAX_SIDE} a side", field
            )
        return ImageOps.exif_transpose(image)
    # SyntaxError is what Pillow raises for some broken files
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise ApiError(400, f"{field}: expected a picture, such as a .png or .jpg; send its file", field) from e


def drawn_part(mask: Image.Image) -> Image.Image:
    """A mask as OpenAI has it, transparent where to draw, as diffusers has it: white there. One without transparency is taken as it is."""
    if "A" not in mask.getbands():
        return mask.convert("L")
    return ImageOps.invert(mask.getchannel("A"))


def encode_picture(image: Image.Image, file_format: str, quality: int | None) -> str:
    """The picture as a file in base64; `quality` of jpeg and webp, 100 where nothing was said."""
    data = io.BytesIO()
    image.save(
        data, file_format.upper(), **({} if file_format == "png" else {"quality": 100 if quality is None else quality})
    )
    return base64.b64encode(data.getvalue()).decode()
