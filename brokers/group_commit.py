"""One thread that writes to a database: whatever waits meanwhile is committed together.

A durable commit waits for the disk. Ten orders at once so cost two or three such waits, not ten.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import InvalidRequestError, SQLAlchemyError

_Result = TypeVar("_Result")
_Item = tuple[Callable[[sa.Connection], Any], "Future[Any]"]

MOST_TOGETHER = 100


class GroupCommit:
    """Runs functions on a connection, each all or nothing, in the order they were given; one may
    run again when another that was to be committed with it has failed.

    `failed` words a database error for the caller. `ended` counts the transactions: what was read
    is still so while it has not changed.
    """

    def __init__(
        self, engine: sa.Engine, failed: Callable[[SQLAlchemyError], BaseException]
    ) -> None:
        self._engine = engine
        self._failed = failed
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self.ended = 0

    def post(self, body: Callable[[sa.Connection], _Result]) -> Future[_Result]:
        """The future is done when the change is durable, or has failed as a whole."""
        future: Future[_Result] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(self._failed(InvalidRequestError("it is closed")))
                return future
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="httptrading-journal", daemon=True
                )
                self._thread.start()
            self._queue.put((body, future))
        return future

    def close(self, seconds: float) -> None:
        """Writes what was given so far, then ends."""
        with self._lock:
            self._closed = True
            self._queue.put(None)
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            item = self._queue.get()
            batch: list[_Item] = []
            while item is not None:
                batch.append(item)
                if len(batch) == MOST_TOGETHER:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit(batch)
            if item is None:
                return

    def _commit(self, batch: list[_Item]) -> None:
        """All in one transaction; if one of them fails, each in its own.

        No savepoints: a full disk makes SQLite roll the whole transaction back by itself, so what
        ran before in it would be lost without a word.
        """
        results: list[Any] = []
        began = False
        try:
            with self._engine.begin() as connection:
                began = True
                for body, _ in batch:
                    results.append(body(connection))
        except Exception as error:
            self.ended += 1  # whether it was committed is not known when the connection broke
            if began and len(results) < len(batch) and len(batch) > 1:
                for item in batch:
                    self._commit([item])
                return
            worded = self._failed(error) if isinstance(error, SQLAlchemyError) else error
            for _, future in batch:
                future.set_exception(worded)
        else:
            self.ended += 1
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
