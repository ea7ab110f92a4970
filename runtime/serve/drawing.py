"""A request drawn: fields to a submitted job, and the job's pictures as an answer or as events."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import time
from collections.abc import AsyncIterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request
from fastapi.sse import format_sse_event
from PIL.Image import Image

from ..engine.engine import PartialCallback, PendingPictures
from ..errors import PrebakeError
from .errors import ApiError, api_error, error_body
from .fields import QUALITIES, ImageFields
from .logs import log_event, log_failure
from .models import ModelTable, ServedModel
from .picture_files import encode_picture

POLL_S = 0.1
"""How often is looked whether a client is still there."""
Kind = Literal["image_generation", "image_edit"]


class ClientGone(Exception):
    """Whoever asked does not wait any more."""


@dataclass(frozen=True)
class Drawing:
    """A request that was let in: its fields, its seed, and the pictures to come."""

    kind: Kind
    fields: ImageFields
    model: ServedModel
    seed: int
    pending: PendingPictures
    began: float

    def facts(self) -> dict[str, Any]:
        """What the log says of it."""
        fields = self.fields
        chosen = fields.model_dump(include={"n", "size", "quality", "num_inference_steps"}, exclude_none=True)
        costs = {"predicted_s": round(self.pending.predicted_s, 4), "queued_s": round(self.pending.queued_s, 4)}
        return {"model": self.model.name, "kind": self.kind, "user": fields.safety_id, **chosen, **costs}


def submit(
    models: ModelTable,
    kind: Kind,
    fields: ImageFields,
    pictures: dict[str, Image],
    on_partial: PartialCallback | None = None,
) -> Drawing:
    """Lets a request in. Raises ApiError: 404, 429 where the queue is too long, and 400 for what the artifact was not exported for."""
    model = models.get(fields.model)
    refuse_long_queue(model, models.options.max_queue_s)
    seed = secrets.randbits(63) if fields.seed is None else fields.seed
    arguments: dict[str, Any] = {
        "negative_prompt": fields.negative_prompt,
        "guidance_scale": fields.guidance_scale,
        "true_cfg_scale": fields.true_cfg_scale,
        "strength": fields.strength,
        **pictures,
        **fields.size_arguments(),
        **model.plan_arguments(fields),
        "num_images_per_prompt": fields.n,
        "seed": seed,
    }
    said = {name: value for name, value in arguments.items() if value is not None}
    try:
        pending = model.engine.submit(
            fields.prompt, partial_images=fields.partial_images, on_partial=on_partial, **said
        )
    except Exception as e:
        raise api_error(e) from e
    models.metrics.predicted_seconds.labels(model.name).observe(pending.predicted_s + pending.queued_s)
    return Drawing(kind, fields, model, seed, pending, time.monotonic())


def refuse_long_queue(model: ServedModel, most_s: float) -> None:
    """Raises ApiError 429 where what is queued takes longer than that, and says when it will not."""
    queued = model.engine.queued_s
    if queued > most_s:
        wait = max(1, math.ceil(queued - most_s))
        raise ApiError(
            429,
            f"{queued:.0f} s of work are queued, and {most_s:.0f} s are let in; ask again in {wait} s",
            headers={"Retry-After": str(wait)},
        )


async def finish(models: ModelTable, drawing: Drawing, request: Request) -> list[Image]:
    """The pictures. Raises ClientGone, and the drawing is cancelled, once nobody waits for them."""
    drawn = asyncio.wrap_future(drawing.pending)
    try:
        while not drawn.done():
            await asyncio.wait({drawn}, timeout=POLL_S)
            if not drawn.done() and await request.is_disconnected():
                raise ClientGone
        images = drawn.result()
    except (ClientGone, CancelledError, asyncio.CancelledError):
        note_cancelled(models, drawing)
        raise
    finally:
        drawing.pending.cancel()  # nothing where it is done
    note_drawn(models, drawing)
    return images


async def answer_request(models: ModelTable, drawing: Drawing, request: Request) -> dict[str, Any]:
    """The body of an answer without events."""
    images = await finish(models, drawing, request)
    fields = drawing.fields
    encoded = [
        await asyncio.to_thread(encode_picture, image, fields.output_format, fields.output_compression)
        for image in images
    ]
    data = [{"b64_json": one} for one in encoded]
    return {"created": int(time.time()), "data": data, "seed": drawing.seed, **common(drawing, images[0])}


def open_events(
    models: ModelTable, kind: Kind, fields: ImageFields, pictures: dict[str, Image], request: Request
) -> AsyncIterator[bytes]:
    """Lets a request in, and gives its partial pictures as they come, then the picture. What is refused is so before the first event."""
    loop, partials = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Image]]()

    def on_partial(_: int, k: int, image: Image) -> None:
        loop.call_soon_threadsafe(partials.put_nowait, (k, image))

    drawing = submit(models, kind, fields, pictures, on_partial)
    return events(drawing, partials, asyncio.ensure_future(finish(models, drawing, request)))


async def events(
    drawing: Drawing, partials: asyncio.Queue[tuple[int, Image]], drawn: asyncio.Task[list[Image]]
) -> AsyncIterator[bytes]:
    """The events of a drawing. What goes wrong now is an event, too."""
    try:
        while not (drawn.done() and partials.empty()):
            coming = asyncio.ensure_future(partials.get())
            await asyncio.wait({drawn, coming}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                continue
            k, image = coming.result()
            yield await picture_event(drawing, image, "partial_image", {"partial_image_index": k})
        (image,) = drawn.result()
        yield await picture_event(drawing, image, "completed", {"usage": NO_USAGE, "seed": drawing.seed})
    except ClientGone:
        return
    except Exception as e:
        error = api_error(e)
        log_failure("request failed", e, bug=not isinstance(e, PrebakeError), **drawing.facts())
        body = error_body(error.status_code, str(error.detail), error.param)
        yield format_sse_event(event="error", data_str=json.dumps(body))
    finally:
        drawn.cancel()


NO_USAGE = {
    "input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}  # fmt: skip
"""The client wants it in its events; no tokens are counted here."""


async def picture_event(drawing: Drawing, image: Image, what: str, more: dict[str, Any]) -> bytes:
    """An event as it is sent."""
    fields, name = drawing.fields, f"{drawing.kind}.{what}"
    encoded = await asyncio.to_thread(encode_picture, image, fields.output_format, fields.output_compression)
    data = {"type": name, "b64_json": encoded, "created_at": int(time.time()), **common(drawing, image), **more}
    return format_sse_event(event=name, data_str=json.dumps(data))


def common(drawing: Drawing, image: Image) -> dict[str, Any]:
    """What every answer and event says of its picture."""
    fields = drawing.fields
    said = {
        "background": "opaque",
        "output_format": fields.output_format,
        "quality": QUALITIES[fields.quality],
        "size": f"{image.width}x{image.height}",
    }
    return said if fields.safety_id is None else {**said, "safety_identifier": fields.safety_id}


def note_drawn(models: ModelTable, drawing: Drawing) -> None:
    seconds = time.monotonic() - drawing.began
    models.metrics.request_seconds.labels(drawing.model.name).observe(seconds)
    log_event("drawn", seconds=round(seconds, 4), **drawing.facts())


def note_cancelled(models: ModelTable, drawing: Drawing) -> None:
    models.metrics.cancelled.labels(drawing.model.name).inc()
    log_event("cancelled", seconds=round(time.monotonic() - drawing.began, 4), **drawing.facts())
