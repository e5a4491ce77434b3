"""The envelope around every answer, and the one table from errors to HTTP."""

from __future__ import annotations

import logging
import math
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from flask import Response

from httptrading.brokers.base import BaseBroker
from httptrading.errors import HttpTradingError, InternalError, InvalidRequest
from httptrading.schemas.numbers import dump_json
from httptrading.schemas.response import iso

log = logging.getLogger("httptrading.app")

HTTP_STATUS = {
    "INVALID_REQUEST": 400,
    "ORDER_NOT_FOUND": 404,
    "IDEMPOTENCY_CONFLICT": 422,
    "UNSUPPORTED": 422,
    "BROKER_REJECTED": 422,
    "RATE_LIMITED": 429,
    "INTERNAL": 500,
    "BUSY": 503,
    "BROKER_UNAVAILABLE": 503,
    "TIMEOUT": 504,
    "OUTCOME_UNKNOWN": 504,
}


_NOT_STORED = ("Cache-Control", "no-store")
"""Without it a shared cache keeps a 404 as well (RFC 9111 4.2.2, RFC 9110 15.1; Varnish for 120 s)
and hands a stranger's to the owner: it does not know that the token decides."""


def not_found() -> Response:
    """One answer, byte for byte, to whoever has no business here."""
    return Response(b"Not Found\n", 404, (("Content-Type", "text/plain"), _NOT_STORED))


def envelope(broker: BaseBroker, ex: str | None, time: datetime | None = None) -> dict[str, Any]:
    return {
        "type": "apiResponse",
        "instanceId": broker.instance_id,
        "broker": broker.broker_name,
        "brokerDisplay": broker.broker_display,
        "time": iso(time or datetime.now(UTC)),
        "ex": ex,
    }


_HEADERS = (("Content-Type", "application/json"), _NOT_STORED)


def json_answer(body: Mapping[str, Any], status: int = 200) -> Response:
    return Response(dump_json(body) + "\n", status, _HEADERS)


def error_body(broker: BaseBroker, error: HttpTradingError, request_id: str) -> dict[str, Any]:
    details: dict[str, Any] = {
        "code": error.code,
        "retryable": error.retryable,
        "outcome": error.outcome,
    }
    if isinstance(error, InvalidRequest) and error.fields:
        details["fields"] = error.fields
    if error.client_order_id is not None:
        details["clientOrderId"] = error.client_order_id
    details["requestId"] = request_id
    return envelope(broker, error.text) | {"error": details}


def error_answer(
    broker: BaseBroker, error: HttpTradingError, request_id: str, status: int | None = None
) -> Response:
    response = json_answer(error_body(broker, error, request_id), status or HTTP_STATUS[error.code])
    if error.retry_after is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif response.status_code in (429, 503):
        response.headers["Retry-After"] = "1"
    if error.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


def our_bug(error: Exception, request_id: str) -> InternalError:
    """The generic text for the client; the class and the lines it came through for the log."""
    lines = "".join(traceback.format_tb(error.__traceback__))
    log.error("request %s: unexpected %s\n%s", request_id, type(error).__name__, lines)
    return InternalError(
        f"Something went wrong in httptrading itself; the log has it under request {request_id}."
    )
