"""One thread that writes to a database: whatever waits meanwhile is committed together.

A durable commit waits for the disk. Ten orders at once so cost two or three such waits, not ten.
"""

from __future__ import annotations

import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, InvalidRequestError, SQLAlchemyError

log = logging.getLogger("httptrading.journal")

_Result = TypeVar("_Result")

MOST_TOGETHER = 100

SYNC_AFTER = 0.01
"""Seconds after which the disk is told to keep what nobody waited for, unless another commit does
so first: the client's answer goes out meanwhile, undisturbed."""


class NotThatSimple(Exception):
    """A short form does not fit what is in the database: the whole `body` is to run."""


class _Change(Generic[_Result]):
    """One function to run, and the future of its result."""

    def __init__(
        self,
        body: Callable[[sa.Connection], _Result],
        short: Callable[[sqlite3.Connection], _Result] | None,
        soon: bool,
    ) -> None:
        self.body = body
        self.short = short
        self.soon = soon
        self.future: Future[_Result] = Future()

    def run(self, connection: sa.Connection | sqlite3.Connection) -> _Result:
        if isinstance(connection, sa.Connection):
            return self.body(connection)
        assert self.short is not None
        return self.short(connection)


class GroupCommit:
    """Runs functions on a connection, each all or nothing, in the order they were given; one may
    run again when another that was to be committed with it has failed.

    `failed` words a database error for the caller. `ended` counts the transactions.
    """

    def __init__(
        self, engine: sa.Engine, failed: Callable[[SQLAlchemyError], BaseException]
    ) -> None:
        self._engine = engine
        self._failed = failed
        self._is_sqlite = engine.dialect.name == "sqlite"
        self._held: sa.Connection | None = None
        self._queue: queue.SimpleQueue[_Change[Any] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._synced = True
        self._under_way = False
        self.ended = 0

    def post(
        self,
        body: Callable[[sa.Connection], _Result],
        *,
        short: Callable[[sqlite3.Connection], _Result] | None = None,
        soon: bool = False,
    ) -> Future[_Result]:
        """The future is done when the change is durable, or has failed as a whole.

        `short` does the same with one statement in SQLite's own words, or raises NotThatSimple;
        SQLAlchemy takes several times as long as SQLite itself. `soon`: the future need not wait
        for the disk; the change outlives the process then, and a moment later a power cut too.
        """
        change = _Change(body, short, soon)
        with self._lock:
            if self._closed:
                change.future.set_exception(self._failed(InvalidRequestError("it is closed")))
                return change.future
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="httptrading-journal", daemon=True
                )
                self._thread.start()
            self._queue.put(change)
        return change.future

    def unchanged_since(self, ended: int) -> bool:
        """Whether what was read after so many transactions is surely still so. While one is under
        way it is not: others may see it before it is counted."""
        return not self._under_way and self.ended == ended

    def close(self, seconds: float) -> None:
        """Writes what was given so far, then ends."""
        with self._lock:
            self._closed = True
            self._queue.put(None)
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            try:
                change = self._queue.get(timeout=None if self._synced else SYNC_AFTER)
            except queue.Empty:
                self._sync()
                continue
            batch: list[_Change[Any]] = []
            while change is not None:
                batch.append(change)
                if len(batch) == MOST_TOGETHER:
                    break
                try:
                    change = self._queue.get_nowait()
                except queue.Empty:
                    break
            if batch:
                self._commit(batch, short=all(one.short is not None for one in batch))
            if change is None:
                break
        if not self._synced:
            self._sync()
        self._let_go()

    def _commit(self, batch: list[_Change[Any]], *, short: bool) -> None:
        """All in one transaction; if one of them fails, each in its own.

        No savepoints: a full disk makes SQLite roll the whole transaction back by itself, so what
        ran before in it would be lost without a word.
        """
        short = short and self._is_sqlite
        results: list[Any] = []
        began = False
        self._under_way = True
        try:
            with self._begin_short(batch) if short else self._begin() as connection:
                began = True
                for change in batch:
                    results.append(change.run(connection))
        except NotThatSimple:
            self._commit(batch, short=False)
        except Exception as error:
            self._count()  # whether it was committed is not known when the connection broke
            self._let_go()
            if began and len(results) < len(batch) and len(batch) > 1:
                for change in batch:
                    self._commit([change], short=False)
                return
            worded = self._failed(error) if isinstance(error, SQLAlchemyError) else error
            for change in batch:
                change.future.set_exception(worded)
        else:
            self._count()
            for change, result in zip(batch, results, strict=True):
                change.future.set_result(result)

    def _count(self) -> None:
        self.ended += 1
        self._under_way = False

    # --- the connection -----------------------------------------------------------------------
    def _connection(self) -> sa.Connection:
        """A file is kept open. A server may have been restarted since, so its connection comes
        from the pool, which looks whether it still lives."""
        if self._held is None or not self._is_sqlite:
            self._let_go()
            self._held = self._engine.connect()
        return self._held

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            with suppress(SQLAlchemyError, sqlite3.Error):  # it may be the one that has just failed
                held.close()

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        connection = self._connection()
        if self._is_sqlite:
            with _as_sqlalchemy_words_it():
                self._driver().execute("PRAGMA synchronous=FULL")
        with connection.begin():
            yield connection
        self._synced = True
        if not self._is_sqlite:
            self._let_go()

    @contextmanager
    def _begin_short(self, batch: list[_Change[Any]]) -> Iterator[sqlite3.Connection]:
        """The driver's own connection in a transaction."""
        soon = all(change.soon for change in batch)
        self._connection()
        driver = self._driver()
        with _as_sqlalchemy_words_it():
            driver.execute(f"PRAGMA synchronous={'NORMAL' if soon else 'FULL'}")
            if len(batch) > 1:  # a single statement is a transaction by itself
                driver.execute("BEGIN IMMEDIATE")
            try:
                yield driver
                if driver.in_transaction:
                    driver.execute("COMMIT")
            except BaseException:
                driver.rollback()
                raise
        self._synced = not soon

    def _driver(self) -> sqlite3.Connection:
        assert self._held is not None
        driver = self._held.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        return driver

    def _sync(self) -> None:
        """Waits for the disk to have what was committed without waiting. A later commit that waits
        does the same: there is one log."""
        self._synced = True
        try:
            self._connection()
            path = self._driver().execute("PRAGMA database_list").fetchone()[2]
            log_file = os.open(f"{path}-wal", os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fsync(log_file)
            finally:
                os.close(log_file)
        except FileNotFoundError:
            pass  # a file system without shared memory: SQLite keeps no such log, and has synced
        except (OSError, sqlite3.Error, SQLAlchemyError) as error:
            name = type(error).__name__
            log.error("what was recorded last may not outlive a power cut (%s)", name)


@contextmanager
def _as_sqlalchemy_words_it() -> Iterator[None]:
    """The driver's errors are those of the engine."""
    try:
        yield
    except sqlite3.Error as error:
        raise DBAPIError.instance(None, None, error, sqlite3.Error) from None
