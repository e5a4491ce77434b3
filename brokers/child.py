"""The child process of `isolation = "process"`: one broker, one pipe to the parent.

Needs only the standard library, httptrading's plain modules and the broker's own SDK.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import logging
import os
import pickle
import select
import signal
import sys
import threading
from collections.abc import Iterable
from datetime import UTC, datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from httptrading.brokers.base import BaseBroker
from httptrading.brokers.local import LocalBroker
from httptrading.errors import BrokerUnavailable, HttpTradingError, InternalError
from httptrading.model import Contract, Fill, OrderReport, Quote

PICKLE_PROTOCOL = 4  # read by every Python from 3.8


class _PlainPickler(pickle.Pickler):
    """Text, numbers and times of an SDK's own kinds (numpy's and pandas' are such) leave as
    Python's: the parent need not have its packages."""

    def reducer_override(self, value: Any) -> Any:
        # By the base's own method: a str with an Enum mixed in calls itself otherwise.
        if isinstance(value, str):
            return str, (str.__str__(value),)
        if isinstance(value, float):
            return float, (float.__float__(value),)
        if isinstance(value, int):
            return int, (int.__int__(value),)
        if isinstance(value, datetime):
            if value.tzinfo is None:
                return datetime.fromisoformat, (datetime.isoformat(value),)
            if type(value) is not datetime or not isinstance(value.tzinfo, timezone):
                return datetime.fromtimestamp, (float(value.timestamp()), UTC)
        return NotImplemented


class _ParentLink:
    """The broker telling the parent; from any thread."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        data = io.BytesIO()
        _PlainPickler(data, PICKLE_PROTOCOL).dump(message)
        with self._lock:
            self._pipe.send_bytes(data.getvalue())

    def report(self, reports: Iterable[OrderReport]) -> None:
        self.send("report", tuple(reports))

    def fill(self, fills: Iterable[Fill]) -> None:
        self.send("fill", tuple(fills))

    def stale(self) -> None:
        self.send("stale")

    def lost(self, reason: str) -> None:
        self.send("lost", reason)

    def restored(self) -> None:
        self.send("restored")

    def take(self, window: str) -> None:
        """Only from within an operation: the parent sends nothing else while one runs."""
        self.send("take", window)
        kind, error = pickle.loads(self._pipe.recv_bytes())
        if kind != "taken":
            raise RuntimeError("unexpected message")
        if error is not None:
            raise error

    def quote_of(self, instance_id: str, contract: Contract) -> Quote:
        raise BrokerUnavailable('Another instance\'s quotes need isolation = "thread"')


def main(descriptor: int, lifeline: int) -> NoReturn:
    """Serves the parent until it says so or is gone."""
    _die_with_parent(lifeline)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    pipe = Connection(descriptor)
    link = _ParentLink(pipe)
    code = 0
    try:
        _, paths, broker, connection, data_dir = pickle.loads(pipe.recv_bytes())
        sys.path[:] = [*sys.path, *(path for path in paths if path not in sys.path)]
        prototype = _loaded(broker, link)
        local = LocalBroker(prototype, connection, Path(data_dir), link)
        asyncio.run(_serve(pipe, link, local))
    except (EOFError, OSError):
        code = 1  # the parent is gone
    # SDKs leave threads behind that would hold the process.
    os._exit(code)


def _loaded(broker: bytes, link: _ParentLink) -> BaseBroker:
    """The prototype; when its module cannot be imported here, the parent is told why."""
    try:
        prototype: BaseBroker = pickle.loads(broker)
    except Exception as error:
        missing = f" of {error.name}" if isinstance(error, ImportError) and error.name else ""
        text = (
            f"The child process cannot import the broker's class ({type(error).__name__}{missing})"
        )
        link.send("error", BrokerUnavailable(text))
        raise EOFError from None
    return prototype


async def _serve(pipe: Connection, link: _ParentLink, broker: LocalBroker) -> None:
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(pipe.fileno(), readable.set)
    incoming = select.poll()  # Connection.poll() makes a selector each time
    incoming.register(pipe.fileno(), select.POLLIN)
    while True:
        await readable.wait()
        readable.clear()
        while incoming.poll(0):
            message = pickle.loads(pipe.recv_bytes())
            try:
                value: Any = None
                match message:
                    case ("open", float() | int() as seconds):
                        await broker.open(seconds)
                    case ("run", str(operation), dict(arguments), float(seconds)):
                        value = await broker.run(operation, arguments, seconds)
                    case ("close",):
                        await broker.close()
                        link.send("result", None)
                        return
                    case _:
                        raise InternalError("The child process was asked something it cannot do")
                try:
                    link.send("result", value)
                except (pickle.PicklingError, TypeError, AttributeError):
                    raise InternalError("The broker's answer cannot leave its process") from None
            except HttpTradingError as error:
                link.send("error", error)


def _die_with_parent(lifeline: int) -> None:
    """Ends this process when the parent's end of `lifeline` closes, however the parent ended."""
    if sys.platform == "linux":
        # The kernel's own way also works while an SDK holds the GIL (prctl(2), PR_SET_PDEATHSIG 1).
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    def watch() -> None:
        os.read(lifeline, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
