"""The routes of the server: OpenAI's Images API, health, metrics and reload.

`create_app` has the models come in, open or not yet, and gives an ASGI application. Every refusal is JSON as OpenAI's clients read it.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.sse import EventSourceResponse
from PIL.Image import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import PrebakeError
from .drawing import ClientGone, Kind, answer_request, open_events, submit
from .errors import ApiError, api_error, error_response
from .fields import read_fields
from .logs import log_event, log_failure
from .models import ModelTable
from .picture_files import drawn_part, read_picture

BEARER = HTTPBearer(auto_error=False)
MAX_FILES, MAX_FORM_FIELDS = 17, 64
CLIENT_GONE = 499
"""What the log has of a client that did not wait for its answer."""


def create_app(models: ModelTable, on_start: Callable[[], None] = lambda: None) -> FastAPI:
    """The application. `on_start` is called once it answers; when it ends, the models are closed."""
    options = models.options

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        on_start()
        yield
        await asyncio.to_thread(models.close)

    app = FastAPI(
        title="prebake", lifespan=lifespan, docs_url=None, redoc_url=None, max_body_size=options.max_body_bytes
    )

    def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        """Raises ApiError 401 unless the request has one of the keys, where there are some."""
        key = given.credentials.encode() if given else b""
        if options.api_keys and not any(hmac.compare_digest(key, k.encode()) for k in options.api_keys):
            raise ApiError(
                401,
                "expected a key of this server as `Authorization: Bearer KEY`",
                None,
                {"WWW-Authenticate": "Bearer"},
            )

    keyed = [Depends(check_key)]

    app.add_middleware(AnswerLog, models=models)

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> JSONResponse:
        return error_response(api_error(error))

    @app.exception_handler(PrebakeError)
    async def refuse_request(_: Request, error: PrebakeError) -> JSONResponse:
        refused = api_error(error)
        if refused.status_code >= 500:
            log_failure("request failed", error)
        return error_response(refused)

    @app.exception_handler(Exception)
    async def tell_bug(_: Request, error: Exception) -> JSONResponse:
        log_failure("bug", error, bug=True)
        return error_response(api_error(error))

    @app.exception_handler(ClientGone)
    @app.exception_handler(ClientDisconnect)
    async def leave(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    # --- pictures -----------------------------------------------------------------------------------------------------

    async def draw(request: Request, kind: Kind, values: dict[str, Any], pictures: dict[str, Image]) -> Response:
        fields = read_fields(values)
        if fields.stream:
            return EventSourceResponse(open_events(models, kind, fields, pictures, request))
        return JSONResponse(await answer_request(models, submit(models, kind, fields, pictures), request))

    @app.post("/v1/images/generations", dependencies=keyed)
    async def generate(request: Request) -> Response:
        """Draws pictures of a prompt, by the fields of OpenAI's `images.generate`."""
        return await draw(request, "image_generation", await read_json(request), {})

    @app.post("/v1/images/edits", dependencies=keyed)
    async def edit(request: Request) -> Response:
        """Draws pictures that begin with one, by the fields of OpenAI's `images.edit`, a form."""
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FORM_FIELDS) as form:
            values, pictures = await read_form(form)
        return await draw(request, "image_edit", values, pictures)

    # --- models -------------------------------------------------------------------------------------------------------

    @app.get("/v1/models", dependencies=keyed)
    async def list_models() -> dict[str, Any]:
        """The artifacts that are served, with sizes and plans."""
        models.get(None)
        return {"object": "list", "data": [model.describe() for model in models.all()]}

    @app.get("/v1/models/{name}", dependencies=keyed)
    async def retrieve_model(name: str) -> dict[str, Any]:
        return models.get(name).describe()

    @app.post("/admin/reload", dependencies=keyed)
    async def reload() -> dict[str, Any]:
        """Opens the artifacts whose manifests have changed in the place of those that are served."""
        if not options.api_keys:
            raise ApiError(403, "reload: a server without --api-key takes it by SIGHUP alone")
        models.get(None)
        return {"reloaded": await reload_models(models)}

    # --- health -------------------------------------------------------------------------------------------------------

    @app.get("/health")
    @app.get("/v2/health/ready")
    async def ready() -> dict[str, str]:
        """200 once every artifact is open and has drawn what its golden vectors say, 503 before."""
        models.get(None)
        return {"status": "ready"}

    @app.get("/v2/health/live")
    async def live() -> dict[str, str]:
        return {"status": "live"}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(models.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse)
    async def playground() -> str:
        return files("prebake.runtime.serve").joinpath("playground.html").read_text("utf-8")

    return app


class AnswerLog:
    """Notes every answer, in the log and in the metrics, once its last byte is sent or its client has gone."""

    def __init__(self, app: ASGIApp, models: ModelTable):
        self._app, self._models = app, models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began, status = time.monotonic(), CLIENT_GONE

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._models.metrics.answers.labels(route, str(status)).inc()
            if not route.startswith(("/health", "/v2/health", "/metrics")):
                seconds = round(time.monotonic() - began, 4)
                log_event("answered", method=scope["method"], route=route, status=status, seconds=seconds)


async def read_json(request: Request) -> dict[str, Any]:
    """The body. Raises ApiError 422 for what is no JSON object, or does not say that it is: a stranger's page in a browser can send
    anything else without asking."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        raise ApiError(422, "expected a body with Content-Type: application/json")
    try:
        values = await request.json()
    except (ValueError, RecursionError) as e:
        raise ApiError(422, "expected a body of JSON") from e
    if not isinstance(values, dict):
        raise ApiError(422, f"expected a JSON object of fields, got {type(values).__name__}")
    return values


async def read_form(form: FormData) -> tuple[dict[str, Any], dict[str, Image]]:
    """The fields of a form, and its pictures by the pipeline's names. Raises ApiError 400 for files that are none."""
    values = {name: value for name, value in form.items() if not isinstance(value, UploadFile)}
    given = {
        name: [each for each in form.getlist(name) if isinstance(each, UploadFile)]
        for name in form
        if isinstance(form[name], UploadFile)
    }
    images = given.pop("image", []) + given.pop("image[]", [])
    masks = given.pop("mask", [])
    if given:
        read_fields({"prompt": "-", **given})  # which refuses it by its name
    if len(images) != 1:
        raise ApiError(400, f"image: expected one picture as a file, got {len(images)}", "image")
    if len(masks) > 1:
        raise ApiError(400, f"mask: expected one picture as a file, got {len(masks)}", "mask")
    pictures = {"image": read_picture("image", await images[0].read()).convert("RGB")}
    if masks:
        pictures["mask_image"] = drawn_part(read_picture("mask", await masks[0].read()))
    return values, pictures


async def reload_models(models: ModelTable) -> list[str]:
    """The names of those that were replaced. While a version is opened, the last one draws."""
    loop = asyncio.get_running_loop()

    async def run(swap: Callable[[], None]) -> None:
        swap()

    def swap_here(swap: Callable[[], None]) -> None:
        asyncio.run_coroutine_threadsafe(run(swap), loop).result()

    return await asyncio.to_thread(models.reload, swap_here)
