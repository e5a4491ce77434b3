"""Every error this package raises on purpose, as one small tree.

    HttpTradingError
    ├── InvalidRequest        the input is wrong; nothing was sent
    ├── Unsupported           valid, but not with this broker; nothing was sent
    ├── IdempotencyConflict   the client order id names another order; nothing was sent
    ├── OrderNotFound         neither the broker nor the journal knows the order
    ├── InternalError         our bug; details only in the log
    └── BrokerError
        ├── Rejected          the broker said no
        ├── RateLimited       our window or the broker's own limit; nothing was done
        ├── Busy              not now (a full queue, no journal, shutting down); nothing was sent
        ├── BrokerUnavailable no connection; nothing was sent
        ├── TimedOut          the deadline passed; nothing was changed at the broker
        └── OutcomeUnknown    sent, answer not known: look before repeating

The text of an error is a sentence for a trader and reaches the client as `ex`. It never contains
an SDK exception's text, because some SDKs put signatures and keys there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar


class HttpTradingError(Exception):
    """Base of all; `code` is the `error.code` of the HTTP contract.

    `retryable`: the same request may succeed later, and sending it again can do no harm.
    `outcome`: "none" when nothing was changed at the broker, "unknown" when it may have been.
    `retry_after`: seconds after which to try again, or None. `client_order_id`: the name of the
    order in question. `replayed`: this is the stored answer to an earlier request.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False
    outcome: str = "none"

    def __init__(self, text: str, *, retry_after: float | None = None) -> None:
        # Half a character of a broker's own words (json.loads makes one of a cut escape) could be
        # neither sent nor recorded.
        text = str(text or "").encode("utf-8", "replace").decode()
        # An order without a reason would count as open, and an answer without `ex` as a success.
        text = text.strip() or "No reason was given."
        super().__init__(text)
        self.text = text
        self.retry_after = _seconds(retry_after)
        self.client_order_id: str | None = None
        self.replayed = False


def _seconds(given: Any) -> float | None:
    """A header's value may come as text, or be a date."""
    try:
        seconds = float(given)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None


def plain(error: HttpTradingError) -> HttpTradingError:
    """The error as its own class of this tree: a broker's subclass of it may want other arguments
    than a copy is made with, have a code that is none, or be unknown to another process."""
    kind = next(one for one in type(error).__mro__ if one.__module__ == __name__)
    if kind is type(error):
        return error
    made: HttpTradingError = kind(error.text)
    made.retry_after = error.retry_after
    if isinstance(made, InvalidRequest) and isinstance(error, InvalidRequest):
        made.fields = error.fields
    return made


class InvalidRequest(HttpTradingError):
    """`fields` maps the JSON name of each bad field to the sentences about it."""

    code = "INVALID_REQUEST"

    def __init__(self, text: str, fields: Mapping[str, list[str]] | None = None) -> None:
        super().__init__(text)
        self.fields: dict[str, list[str]] = dict(fields or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.text, self.fields)


class Unsupported(HttpTradingError):
    code = "UNSUPPORTED"


class IdempotencyConflict(HttpTradingError):
    code = "IDEMPOTENCY_CONFLICT"


class OrderNotFound(HttpTradingError):
    code = "ORDER_NOT_FOUND"


class InternalError(HttpTradingError):
    code = "INTERNAL"


class BrokerError(HttpTradingError):
    """Anything between us and the broker, or said by the broker."""


class Rejected(BrokerError):
    """The broker's refusal, in the broker's own words."""

    code = "BROKER_REJECTED"


class RateLimited(BrokerError):
    code = "RATE_LIMITED"
    retryable = True


class Busy(BrokerError):
    """Not now, and nothing was sent. Raised by an adapter, it leaves the connection as it is."""

    code = "BUSY"
    retryable = True


class BrokerUnavailable(BrokerError):
    """No connection, so nothing was sent. Raised by an adapter, it makes the worker reconnect."""

    code = "BROKER_UNAVAILABLE"
    retryable = True


class TimedOut(BrokerError):
    code = "TIMEOUT"
    retryable = True


class OutcomeUnknown(BrokerError):
    """Sent, and no answer: never to be repeated before the order was looked for."""

    code = "OUTCOME_UNKNOWN"
    outcome = "unknown"


ERRORS: dict[str, type[HttpTradingError]] = {
    error.code: error
    for error in (
        InvalidRequest,
        Unsupported,
        IdempotencyConflict,
        OrderNotFound,
        InternalError,
        Rejected,
        RateLimited,
        Busy,
        BrokerUnavailable,
        TimedOut,
        OutcomeUnknown,
    )
}
