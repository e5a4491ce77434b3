"""One copy of a broker, run in the thread (or child process) that owns it.

Everything a broker raises is translated here, at the border, to the error tree. The text of an
unexpected exception goes nowhere, not even to the log: some SDKs put signed requests there.
"""

from __future__ import annotations

import copy
import gc
import logging
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from httptrading.brokers.base import CHANGES, BaseBroker, Link, run_operation
from httptrading.brokers.checked import NonsenseAnswer, checked
from httptrading.errors import (
    BrokerUnavailable,
    HttpTradingError,
    InternalError,
    OutcomeUnknown,
    TimedOut,
    Unsupported,
    plain,
)

log = logging.getLogger("httptrading.broker")

CLOSES_WITHIN = 3.0
"""Seconds for an `async def close()`: many an SDK's waits for a farewell that never comes, and the
next connection is made only after it."""


class LocalBroker:
    """A copy of the prototype with its connection."""

    pid = None  # it has no process of its own

    def __init__(
        self, prototype: BaseBroker, connection: str, data_dir: Path, link: Link | None
    ) -> None:
        self._broker = copy.copy(prototype)
        self._broker.connection = connection
        self._broker.data_dir = data_dir
        self._broker._link = link

    async def open(self, seconds: float) -> None:
        """Connects; BrokerUnavailable with a sentence when that fails."""
        broker = self._broker
        try:
            await run_operation(broker.connect, seconds)
            _leave_imports_alone(type(broker))
        except HttpTradingError as error:
            raise plain(error) from None
        except ImportError as error:
            _log_unexpected(broker, "connect", error)
            wanted = f": pip install '{broker.sdk}'" if broker.sdk else ""
            raise BrokerUnavailable(
                f"The SDK of {broker.broker_display} is not installed or cannot be imported{wanted}"
            ) from None
        except TimeoutError:
            raise BrokerUnavailable(
                f"Connecting to {broker.broker_display} took longer than {seconds:g} s"
            ) from None
        # longport raises plain BaseException for bad numbers; a CancelledError is the broker's own
        # (libraries cancel what waits for a connection that has broken), nobody cancels a worker.
        except BaseException as error:
            _log_unexpected(broker, "connect", error)
            raise BrokerUnavailable(
                f"Connecting to {broker.broker_display} failed ({type(error).__name__}); "
                "the log has the place"
            ) from None

    async def run(self, operation: str, arguments: Mapping[str, Any], seconds: float) -> Any:
        """Runs one operation; an `async def` one is cancelled after `seconds`."""
        broker = self._broker
        changes = operation in CHANGES
        try:
            value = await run_operation(getattr(broker, operation), seconds, **arguments)
            return checked(operation, value)
        except HttpTradingError as error:
            raise plain(error) from None
        except NonsenseAnswer as error:
            text = f"The answer of {broker.broker_display} to {operation} has {error}"
            log.error("%s.%s: the answer has %s", broker.broker_name, operation, error)
            raise (OutcomeUnknown(text) if changes else InternalError(text)) from None
        except TimeoutError:
            if changes:
                raise _unknown(broker) from None
            raise TimedOut(f"{broker.broker_display} did not answer in time") from None
        except BaseException as error:
            if isinstance(error, NotImplementedError) and (
                not changes or _left_out(broker, operation, error)
            ):
                raise Unsupported(f"{broker.broker_display} does not offer {operation}") from None
            _log_unexpected(broker, operation, error)
            if changes:
                raise _unknown(broker) from None
            raise InternalError(
                f"Reading from {broker.broker_display} failed unexpectedly; the log has the place"
            ) from None

    async def close(self) -> None:
        try:
            await run_operation(self._broker.close, CLOSES_WITHIN)
        except BaseException as error:
            _log_unexpected(self._broker, "close", error)

    def ended(self) -> str:
        return ""

    def interrupt(self) -> None:
        """Helps a stuck call to end; from another thread."""
        try:
            self._broker.abort()
        except Exception as error:
            _log_unexpected(self._broker, "abort", error)


_imported: set[type[BaseBroker]] = set()


def _leave_imports_alone(kind: type[BaseBroker]) -> None:
    """Once for each SDK: the objects of its import live as long as the process, and the garbage
    collector would stop every thread to look at them again and again (pandas: 40 ms each time)."""
    if kind.sdk and kind not in _imported:
        _imported.add(kind)
        gc.collect()
        gc.freeze()


def _left_out(broker: BaseBroker, operation: str, error: NotImplementedError) -> bool:
    """Whether the broker's own method says so; an SDK that raises it, perhaps at the answer to an
    order, does not say that nothing was sent."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_name == operation and frame.f_locals.get("self") is broker


def _unknown(broker: BaseBroker) -> OutcomeUnknown:
    return OutcomeUnknown(f"Sent to {broker.broker_display}, but no clear answer came back")


def _log_unexpected(broker: BaseBroker, operation: str, error: BaseException) -> None:
    """The exception's class and the lines it came through; never its text."""
    lines = "".join(traceback.format_tb(error.__traceback__))
    log.error(
        "unexpected %s from %s.%s\n%s",
        type(error).__name__,
        broker.broker_name,
        operation,
        lines,
    )
