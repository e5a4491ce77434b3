"""The order journal's database: opened when it can be, written by one thread, read by any."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import (
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)

from httptrading.brokers.group_commit import GroupCommit
from httptrading.brokers.journal_tables import Short, create_or_upgrade, current_gateway_id
from httptrading.errors import Busy

log = logging.getLogger("httptrading.journal")

_Result = TypeVar("_Result")

STARTS_WITHIN, OPENS_WITHIN = 5.0, 0.2
"""Seconds for which the start, and a request, wait for the journal to be opened."""

READS_WITHIN, ASKS_AGAIN_AFTER = 1.0, 1.0
"""Seconds for which a server's answer is waited for, and after which one that gave none is asked
again: the shortest deadline is 1 s, and a request asks several times."""

READERS = 48
"""Connections for reading, and threads that wait for a server's answer."""

TOO_SLOW = "The order journal is too slow (is the disk overloaded?); nothing was sent."


class JournalDatabase:
    """Any database that SQLAlchemy speaks; safe from any thread.

    One that cannot be opened now (disk full) is tried again with each use. What cannot be done is
    Busy; a journal of a newer version is a ValueError.
    """

    def __init__(self, url: str) -> None:
        """`url`: any SQLAlchemy URL; `sqlite:///path` gets WAL, full sync and mode 0600."""
        made = sa.make_url(url)
        self._is_sqlite = is_sqlite = made.get_backend_name() == "sqlite"
        if is_sqlite and made.database in (None, "", ":memory:"):
            raise ValueError("The order journal needs a database that outlives the process.")
        # A server that has been restarted leaves dead connections in the pool.
        ping = not is_sqlite
        self._reader = sa.create_engine(
            url, pool_size=8, max_overflow=READERS - 8, pool_pre_ping=ping
        )
        self._readers = threading.Semaphore(READERS)
        self._asks_at = 0.0  # until when a silent server is not asked again, monotonic
        self._writer = sa.create_engine(url, pool_size=1, pool_pre_ping=ping)
        self._commits = GroupCommit(self._writer, self._unwritable)
        self._asking = threading.Lock()
        self._asked: sa.PoolProxiedConnection | None = None
        self._opening = threading.Lock()
        self._attempt: Future[str] | None = None
        self._closed = False
        self._gateway_id: str | None = None
        self._file: Path | None = None
        if is_sqlite:
            if not str(made.database).startswith("file:"):  # a SQLite URI makes its file itself
                self._file = Path(str(made.database))
            sa.event.listen(self._writer, "connect", _sqlite_connect)
            sa.event.listen(self._writer, "begin", _sqlite_begin)
        try:
            self._open(STARTS_WITHIN)
        except Busy:
            log.error("orders are refused until the journal can be opened")

    def close(self) -> None:
        self._commits.close(2.0)
        self._closed = True
        with self._asking:
            self._let_go()
        self._reader.dispose()
        self._writer.dispose()

    @property
    def gateway_id(self) -> str:
        """Made once for each journal, so that no two gateways make the same mark."""
        return self._open()

    @property
    def writes(self) -> int:
        """How often anything may have been written."""
        return self._commits.ended

    def unchanged_since(self, writes: int) -> bool:
        """Whether what was read after so many writes is surely still so."""
        return self._commits.unchanged_since(writes)

    def surely_lacks(self, statement: Short, values: Mapping[str, Any]) -> bool:
        """Whether a query surely finds nothing; False also when this cannot be told in a moment."""
        if not self._is_sqlite:
            return False
        self._open()
        with self._asking:
            try:
                if self._asked is None:
                    self._asked = self._reader.raw_connection()
                driver = self._asked.driver_connection
                assert isinstance(driver, sqlite3.Connection)
                return statement(driver, values).fetchone() is None
            except (sqlite3.Error, SQLAlchemyError):
                self._let_go()
                return False  # whoever asks at length is told what is wrong

    def _let_go(self) -> None:
        if self._asked is not None:
            self._asked.close()
            self._asked = None

    def write(self, body: Callable[[sa.Connection], None], deadline: float | None) -> None:
        """Runs a change and returns when it is durable; Busy when that takes too long."""
        written = self.post(body)
        try:
            written.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Busy(TOO_SLOW, retry_after=2) from None

    def post(
        self,
        body: Callable[[sa.Connection], _Result],
        *,
        short: Callable[[sqlite3.Connection], _Result] | None = None,
        soon: bool = False,
    ) -> Future[_Result]:
        """As `GroupCommit.post`."""
        try:
            self._open()
        except Busy as error:
            failed: Future[_Result] = Future()
            failed.set_exception(error)
            return failed
        return self._commits.post(body, short=short, soon=soon)

    def _unwritable(self, error: SQLAlchemyError) -> Busy:
        """With `retry_after` when the database as a whole does not take anything now."""
        log.error("the journal cannot be written (%s)", _cause(error))
        if isinstance(error, DataError | IntegrityError | ProgrammingError):
            return Busy("The order journal does not take this; nothing was sent.")
        if _is_read_only(error):
            # SQLite opens what it may not write read-only, its shared memory for all connections of
            # a process: once it may write again, it does so after the last of them is closed.
            with self._asking:
                self._let_go()
            self._reader.dispose()
            self._writer.dispose()
        why = "its file is damaged" if type(error) is DatabaseError else "is the disk full?"
        return Busy(
            f"The order journal cannot be written ({why}); nothing was sent.", retry_after=5
        )

    def read(self, body: Callable[[sa.Connection], _Result]) -> _Result:
        """Runs queries; Busy when the database cannot be read.

        A server that is frozen, or behind a broken line, answers nothing for as long as it likes,
        so it is asked by a thread of its own, and nobody waits for it longer.
        """
        self._open()
        if self._is_sqlite:
            return self._query(body)
        if time.monotonic() < self._asks_at or not self._readers.acquire(timeout=READS_WITHIN):
            raise _silent()
        answer: Future[_Result] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._query(body))
            except BaseException as error:
                answer.set_exception(error)
            finally:
                self._readers.release()

        threading.Thread(target=ask, name="httptrading-journal-read", daemon=True).start()
        try:
            return answer.result(READS_WITHIN)
        except TimeoutError:
            self._asks_at = time.monotonic() + ASKS_AGAIN_AFTER
            log.error("the journal's server does not answer")
            raise _silent() from None

    def _query(self, body: Callable[[sa.Connection], _Result]) -> _Result:
        try:
            with self._reader.connect() as connection:
                result = body(connection)
                if self._closed:  # meanwhile: the pool it would go back to is no more
                    connection.invalidate()
                return result
        except SQLAlchemyError as error:
            log.error("the journal cannot be read (%s)", _cause(error))
            raise Busy(
                "The order journal cannot be read, so this request has sent nothing.", retry_after=5
            ) from None

    def _open(self, patience: float = OPENS_WITHIN) -> str:
        """Creates or upgrades the tables once; returns this gateway's own id, or raises Busy.

        A database that is locked, or a server that does not answer, may hold an attempt for as
        long as it likes, so each has a thread of its own, and nobody waits for it longer.
        """
        if self._gateway_id is None:
            with self._opening:
                attempt = self._attempt
                if attempt is None or attempt.done() and attempt.exception() is not None:
                    attempt = self._attempt = Future()
                    threading.Thread(
                        target=self._try_to_open,
                        args=(attempt,),
                        name="httptrading-journal-open",
                        daemon=True,
                    ).start()
            try:
                self._gateway_id = attempt.result(patience)
            except TimeoutError:
                raise Busy(
                    "The order journal is still being opened (is its database locked?); nothing "
                    "was sent.",
                    retry_after=1,
                ) from None
        return self._gateway_id

    def _try_to_open(self, attempt: Future[str]) -> None:
        try:
            attempt.set_result(self._current() or self._migrate())
        except BaseException as error:
            attempt.set_exception(error)

    def _current(self) -> str | None:
        """The gateway's id when there is nothing to create or upgrade: a journal on a full disk
        can still be read."""
        if self._file is not None and not self._file.exists():
            return None
        try:
            with self._reader.connect() as connection:
                return current_gateway_id(connection)
        except SQLAlchemyError:
            return None

    def _migrate(self) -> str:
        if self._file is not None:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                # Only a new one: whoever closes a file lets go of the locks that SQLite holds on it
                # in this process (sqlite.org/howtocorrupt.html, 2.2).
                os.close(os.open(self._file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            except FileExistsError:
                pass
            except OSError as error:
                log.error("the journal's file cannot be made (%s)", error.strerror)
                raise Busy(
                    "The order journal cannot be made; nothing was sent.", retry_after=5
                ) from None
        try:
            return self._commits.post(create_or_upgrade).result()
        except ValueError:
            self.close()
            raise


def _silent() -> Busy:
    return Busy(
        "The order journal's server does not answer, so this request has sent nothing.",
        retry_after=2,
    )


def _is_read_only(error: SQLAlchemyError) -> bool:
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
    return bool(code & 0xFF == sqlite3.SQLITE_READONLY)  # the rest of the code tells why


def _cause(error: SQLAlchemyError) -> str:
    """What the database says of its own state; never the statement, and not of a row (some quote
    its values)."""
    name = type(error).__name__
    of_the_whole = isinstance(error, OperationalError) or type(error) is DatabaseError
    return f"{name}: {error.orig}" if of_the_whole and isinstance(error, DBAPIError) else name


def _sqlite_connect(connection: Any, _record: Any) -> None:
    # The driver's own transactions begin too late (at the first change); see _sqlite_begin.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}").close()


def _sqlite_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
