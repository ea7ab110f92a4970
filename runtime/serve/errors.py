"""What a server answers when it refuses: a status, and an error as OpenAI's API has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ..errors import CallerError, PrebakeError, printable_line

SUBJECT = re.compile(r"([a-z_0-9]+)(=.*?)?: ")
"""What a sentence is about, as those of `errors.py` begin: `num_inference_steps=14: the artifact has ...`."""
CODES = {401: "invalid_api_key", 404: "not_found", 413: "too_large", 429: "rate_limit_exceeded", 503: "not_ready"}


class ApiError(HTTPException):
    """A refusal. `param` is the field that it is about."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(status, message, headers)
        self.param = param


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 and status != 429 else CODES.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": CODES.get(status)}}


def api_error(error: Exception) -> ApiError:
    """Any error of a request as a refusal: what was asked wrongly is a 400 that names the field, a fault of the artifact or this
    machine a 500 in its own words, and a bug a 500 that says nothing of what it met."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, PrebakeError):
        message = printable_line(str(error))
        named = SUBJECT.match(message) if isinstance(error, CallerError) else None
        return ApiError(error.http_status, message, named and named[1])
    return ApiError(500, "a bug in prebake; the server's log has its traceback")


def error_response(error: ApiError) -> JSONResponse:
    body = error_body(error.status_code, str(error.detail), error.param)
    return JSONResponse(body, error.status_code, dict(error.headers or {}))
