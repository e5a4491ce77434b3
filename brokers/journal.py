"""The order journal: what was about to be sent, and everything that was learned of it since.

A row is durable (SQLite in WAL mode with full sync) before the SDK is called, so that after a
crash, a cut or a deadline it is known what to look for at the broker. Rows are kept for ever.

    sending ──▶ placed | refused | unknown ──▶ placed | not placed

`sending`: being sent right now, or cut short by a crash. `unknown`: sent, no clear answer.
`not placed`: proved never to have reached the broker's book; the same client order id may be sent
again, as a new attempt with a new mark. `seen`: an order that was not placed through this gateway,
known from the broker's lists and pushes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.exc import (
    DatabaseError,
    DataError,
    DBAPIError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.sql.compiler import SQLCompiler

from httptrading.brokers.group_commit import GroupCommit, NotThatSimple
from httptrading.errors import Busy
from httptrading.model import (
    Contract,
    Fill,
    Lifecycle,
    Number,
    Order,
    OrderReport,
    OrderType,
    TimeInForce,
    TradeType,
    exact,
)
from httptrading.tickers import currency_of

log = logging.getLogger("httptrading.journal")

_Result = TypeVar("_Result")
MARK = "ht"  # what every mark of a gateway begins with
_Names = tuple[str, str]  # what a report calls its order: the mark and the order id, "" for none

SENDING, PLACED, REFUSED, UNKNOWN, NOT_PLACED, SEEN = (
    "sending",
    "placed",
    "refused",
    "unknown",
    "not placed",
    "seen",
)
UNSETTLED = (SENDING, UNKNOWN)

_metadata = sa.MetaData()


def _name(length: int) -> sa.String:
    """A name in which case matters; elsewhere than in MySQL it does anyway."""
    exact = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return sa.String(length).with_variant(exact, "mysql", "mariadb")


_about = sa.Table(
    "about",
    _metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.String(64), nullable=False),
)

_orders = sa.Table(
    "orders",
    _metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("instance_id", _name(32), nullable=False),
    sa.Column("client_order_id", _name(64)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("mark", sa.String(24)),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("order_id", _name(128)),
    sa.Column("trade_type", sa.String(16)),
    sa.Column("region", sa.String(8)),
    sa.Column("ticker", sa.String(64)),
    sa.Column("direction", sa.String(8)),
    sa.Column("order_type", sa.String(16)),
    sa.Column("time_in_force", sa.String(8)),
    sa.Column("lifecycle", sa.String(16)),
    # Decimals as text: exact in every database.
    sa.Column("price", sa.String(40)),
    sa.Column("asked_qty", sa.String(40)),
    sa.Column("qty", sa.String(40), nullable=False),  # the order's now; changed in a broker's app
    sa.Column("currency", sa.String(8), nullable=False),
    sa.Column("filled_qty", sa.String(40), nullable=False),
    sa.Column("avg_price", sa.String(40), nullable=False),
    sa.Column("priced_qty", sa.String(40), nullable=False),  # the filled_qty that avg_price is of
    sa.Column("error_reason", sa.Text, nullable=False),
    sa.Column("is_canceled", sa.Boolean, nullable=False),
    sa.Column("is_pending_cancel", sa.Boolean, nullable=False),
    sa.Column("is_open", sa.Boolean, nullable=False),  # may still change at the broker
    sa.Column("created", sa.Double, nullable=False),  # seconds since the epoch
    sa.Column("updated", sa.Double, nullable=False),
    sa.UniqueConstraint("instance_id", "client_order_id", "attempt"),
    sa.UniqueConstraint("instance_id", "mark"),
    sa.Index("orders_by_order_id", "instance_id", "order_id"),
    sa.Index("orders_by_time", "instance_id", "created"),
    sa.Index("orders_open", "instance_id", "is_open", "created"),
    sa.Index("orders_by_state", "instance_id", "state"),
)

_fills = sa.Table(
    "fills",
    _metadata,
    sa.Column("instance_id", _name(32), primary_key=True),
    sa.Column("order_id", _name(128), primary_key=True),
    sa.Column("fill_id", _name(128), primary_key=True),
    sa.Column("qty", sa.String(40), nullable=False),
    sa.Column("price", sa.String(40), nullable=False),
    sa.Column("time", sa.Double, nullable=False),
)

# The statements of the order path are built once: building one costs more than running it.
_INSERT = sa.insert(_orders)
_UPDATE = sa.update(_orders).where(_orders.c.id == sa.bindparam("row"))
_BY_ROW = sa.select(_orders).where(_orders.c.id == sa.bindparam("row"))
_mine = _orders.c.instance_id == sa.bindparam("instance")
_WITH_MARKS = sa.select(_orders).where(_mine, _orders.c.mark.in_(sa.bindparam("names")))
_WITH_ORDER_IDS = (
    sa.select(_orders)
    .where(_mine, _orders.c.order_id.in_(sa.bindparam("names")))
    .order_by(_orders.c.id)
)
_WITH_ORDER_ID = sa.select(_orders).where(_mine, _orders.c.order_id == sa.bindparam("by_order_id"))
_EARLY = _WITH_ORDER_ID.where(_orders.c.state == SEEN, _orders.c.id > sa.bindparam("row"))
_WITH_KEY = sa.select(_orders).where(_mine, _orders.c.client_order_id == sa.bindparam("key"))
_NEWEST_ATTEMPT = _WITH_KEY.order_by(_orders.c.attempt.desc()).limit(1)
_NEWEST_PLACED = _NEWEST_ATTEMPT.where(_orders.c.state == PLACED)
_UNSETTLED = sa.select(_orders).where(_mine, _orders.c.state.in_(UNSETTLED)).order_by(_orders.c.id)


MOST_SEEN = 100
LENGTHS = (1, 8, 64, 512)
"""Of the lists of names in a statement: each connection keeps what it has prepared, for each
length anew. SQLite takes 999 values at least."""

STARTS_WITHIN, OPENS_WITHIN = 5.0, 0.2
"""Seconds for which the start, and a request, wait for the journal to be opened."""

REOPENS_AFTER = 60.0
"""Seconds after an order's end from which on a broker that calls it open is believed: ends are not
always for good (Futu lets a disabled order be enabled again, trade/modify-order.html)."""

READS_WITHIN, ASKS_AGAIN_AFTER = 1.0, 1.0
"""Seconds for which a server's answer is waited for, and after which one that gave none is asked
again: the shortest deadline is 1 s, and a request asks several times."""

READERS = 48
"""Connections for reading, and threads that wait for a server's answer."""

TOO_SLOW = "The order journal is too slow (is the disk overloaded?); nothing was sent."

MIGRATIONS: tuple[tuple[str, ...], ...] = ((),)
"""One tuple of SQL statements per schema version; version 1 is `create_all`. A change to the tables
appends a tuple, and a journal of an older version runs what it lacks, in order."""


class _Short:
    """A statement in SQLite's own words, for the driver's own connection: SQLAlchemy takes several
    times as long as SQLite itself, and every order waits for three of these."""

    def __init__(self, statement: sa.ClauseElement, columns: Iterable[str] = ()) -> None:
        """`columns`: those that an INSERT or UPDATE sets."""
        made = statement.compile(dialect=sqlite.dialect(), column_keys=list(columns) or None)
        assert isinstance(made, SQLCompiler)
        self.text = str(made)
        self.names = tuple(made.positiontup or ())
        self._fixed = {
            name: value for name, value in made.params.items() if isinstance(value, str | int)
        }

    def __call__(self, driver: sqlite3.Connection, values: Mapping[str, Any]) -> sqlite3.Cursor:
        known = {**self._fixed, **values}
        return driver.execute(self.text, [known[name] for name in self.names])


_early = _orders.alias()
_INSERT_SHORT = _Short(_INSERT, (column.name for column in _orders.c if column.name != "id"))
_PLACED_SHORT = _Short(
    _UPDATE.where(
        _orders.c.state == SENDING,
        _orders.c.order_id.is_(None),
        ~sa.exists().where(
            _early.c.instance_id == _orders.c.instance_id,
            _early.c.order_id == sa.bindparam("by_order_id"),
            _early.c.state == SEEN,
            _early.c.id > _orders.c.id,
        ),
    ),
    ("state", "order_id", "updated"),
)
_HAS_KEY_SHORT = _Short(_WITH_KEY.with_only_columns(_orders.c.id).limit(1))


@dataclass(frozen=True)
class OrderRequest:
    """What a client asked for: an order's content."""

    contract: Contract
    order_type: OrderType
    time_in_force: TimeInForce
    lifecycle: Lifecycle
    direction: str
    qty: int
    price: Decimal | None


@dataclass(frozen=True)
class Outcome:
    """What became of a sent order: the row's next state, with the broker's id or the reason."""

    state: str
    order_id: str = ""
    reason: str = ""


@dataclass(frozen=True)
class JournalOrder:
    """One row: `order` is the best knowledge, the rest is what was asked and how it stands."""

    row_id: int
    client_order_id: str | None
    attempt: int
    mark: str | None
    state: str
    order: Order
    contract: Contract | None
    direction: str | None
    order_type: OrderType | None
    time_in_force: TimeInForce | None
    lifecycle: Lifecycle | None
    price: Decimal | None
    asked_qty: Decimal | None
    is_open: bool
    is_priced_in_part: bool  # the average price is not yet that of all that is filled
    created: datetime
    updated: datetime

    @property
    def order_id(self) -> str:
        return self.order.order_id

    def same_content(self, request: OrderRequest) -> bool:
        return (
            self.contract == request.contract
            and self.direction == request.direction
            and self.order_type == request.order_type
            and self.time_in_force == request.time_in_force
            and self.lifecycle == request.lifecycle
            and self.asked_qty == request.qty
            and self.price == request.price
        )


class _Seen:
    """Rows as they were read after so many writes; `rows` only grows."""

    def __init__(self, writes: int) -> None:
        self.writes = writes
        self.rows: dict[tuple[str, str, str], sa.Row[Any] | None] = {}


class Journal:
    """All instances' orders; safe from any thread.

    Every method that must write raises Busy when it cannot, so that nothing is sent unrecorded.
    """

    def __init__(self, url: str) -> None:
        """`url`: any SQLAlchemy URL; `sqlite:///path` gets WAL, full sync and mode 0600.

        A journal that cannot be opened now (disk full) is tried again with each use; one of a
        newer version is a ValueError.
        """
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
        self._seen = _Seen(0)
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
        """How often anything may have been written: what was read is still so at the same count."""
        return self._commits.ended

    # --- placing ------------------------------------------------------------------------------
    def mark(self, instance_id: str, client_order_id: str, attempt: int) -> str:
        """The tag given to the broker: unique to this row of this journal; 20 ASCII characters."""
        row = "\n".join((self.gateway_id, instance_id, client_order_id, str(attempt)))
        return MARK + hashlib.sha256(row.encode()).hexdigest()[:18]

    def begin(
        self, instance_id: str, client_order_id: str, attempt: int, request: OrderRequest
    ) -> Future[tuple[int, datetime]]:
        """Records that this order is about to be sent; the future gives the row's id and its time
        when that is durable."""
        now = time.time()
        values = {
            "instance_id": instance_id,
            "client_order_id": client_order_id,
            "attempt": attempt,
            "mark": self.mark(instance_id, client_order_id, attempt),
            "state": SENDING,
            "order_id": None,
            "trade_type": request.contract.trade_type.name,
            "region": request.contract.region,
            "ticker": request.contract.ticker,
            "direction": request.direction,
            "order_type": request.order_type.name,
            "time_in_force": request.time_in_force.name,
            "lifecycle": request.lifecycle.name,
            "price": _text(request.price),
            "asked_qty": _text(request.qty),
            "qty": _text(request.qty),
            "currency": currency_of(request.contract.region, request.contract.ticker),
            "filled_qty": "0",
            "avg_price": "0",
            "priced_qty": "0",
            "error_reason": "",
            "is_canceled": False,
            "is_pending_cancel": False,
            "is_open": True,
            "created": now,
            "updated": now,
        }

        created = datetime.fromtimestamp(now, UTC)

        def body(connection: sa.Connection) -> tuple[int, datetime]:
            inserted = connection.execute(_INSERT, values).inserted_primary_key
            assert inserted is not None
            return int(inserted[0]), created

        def short(driver: sqlite3.Connection) -> tuple[int, datetime]:
            return int(_INSERT_SHORT(driver, values).lastrowid or 0), created

        return self._post(body, short=short)

    def settle(self, row_id: int, outcome: Outcome, *, soon: bool = False) -> Future[None]:
        """Writes what became of a sent order; the future is done when that is durable.

        `PLACED`: the broker took it under this id; what a push said of the id meanwhile is joined.
        `soon`: then the disk is not waited for. Should the power fail in the next moment, the row
        says `sending` again, so the order must be one that the broker's lists tell.
        `REFUSED`: there is no such order, unless a part of it has been filled. `UNKNOWN`: no clear
        answer came. `NOT_PLACED`: nothing was sent, or the broker's lists lack it; only if that is
        still open.
        """

        def body(connection: sa.Connection) -> None:
            self._apply(connection, row_id, outcome)

        if outcome.state != PLACED:
            return self._post(body)
        values = {
            "row": row_id,
            "state": PLACED,
            "order_id": outcome.order_id,
            "by_order_id": outcome.order_id,
            "updated": time.time(),
        }

        def short(driver: sqlite3.Connection) -> None:
            if _PLACED_SHORT(driver, values).rowcount != 1:
                raise NotThatSimple  # a push was first

        return self._post(body, short=short, soon=soon)

    def _apply(self, connection: sa.Connection, row_id: int, outcome: Outcome) -> None:
        row = connection.execute(_BY_ROW, {"row": row_id}).one()
        values: dict[str, Any] = {"state": outcome.state, "updated": time.time()}
        if outcome.state == PLACED:
            values["order_id"] = outcome.order_id
            if row.state in (NOT_PLACED, REFUSED):
                values |= {"error_reason": "", "is_open": True}
            self._change(connection, row, values)
            return
        if outcome.state == REFUSED:
            still = row.filled_qty == "0"
        elif outcome.state == UNKNOWN:
            still = row.state == SENDING
        else:
            still = row.state in UNSETTLED
        if still:
            if outcome.state != UNKNOWN:
                values |= {"error_reason": outcome.reason, "is_open": False}
            connection.execute(_UPDATE, {"row": row_id, **values})

    # --- what the broker says -----------------------------------------------------------------
    def record(
        self,
        instance_id: str,
        reports: Iterable[OrderReport],
        seen: float | None = None,
        *,
        deadline: float | None = None,
    ) -> None:
        """Joins what a list, a query or a push said to what is known.

        `seen`: when the broker was asked, or the push came in (`time.time()`; None: now). Filled
        quantity never goes down, a final state is final, but for one that the broker itself takes
        back much later. Writes only what changed; Busy when that is not done by the `deadline`
        (`time.monotonic()`), but it is done still.
        """
        reports, moment = list(reports), time.time() if seen is None else seen
        rows = self._rows(instance_id, map(_names, reports))
        changed: set[str] = set()
        for row, report in zip(rows, reports, strict=True):
            if _news(instance_id, moment, row, report):
                changed.update(filter(None, _names(report)))
        # With all that is said of those orders: what is no news now may take back what is.
        news = [report for report in reports if not changed.isdisjoint(_names(report))]
        if news:
            self._write(
                lambda connection: self._join(connection, instance_id, news, moment), deadline
            )

    def _join(
        self,
        connection: sa.Connection,
        instance_id: str,
        reports: list[OrderReport],
        moment: float,
    ) -> None:
        for report in reports:
            [row] = self._find(connection, instance_id, [_names(report)])
            values = _news(instance_id, moment, row, report)
            if values and row is not None:
                self._change(connection, row, values)
            elif values:
                connection.execute(_INSERT, values)

    def joined(self, instance_id: str, reports: Iterable[OrderReport]) -> list[JournalOrder]:
        """The rows as `record` has left them, or would if they could be written."""
        empty = dict.fromkeys(_orders.c.keys())
        joined = []
        reports = list(reports)
        rows = self._rows(instance_id, map(_names, reports))
        for row, report in zip(rows, reports, strict=True):
            values = _news(instance_id, time.time(), row, report)
            known = dict(row._mapping) if row is not None else {**empty, "id": 0}
            if row is not None or values:
                joined.append(_journal_order(SimpleNamespace(**(known | values))))
        return joined

    def together(self, instance_id: str, report: OrderReport) -> Order:
        """What a report and its row say of the order."""
        [row] = self._rows(instance_id, [_names(report)])
        if row is None:
            return report.order
        values = _news(instance_id, time.time(), row, report)
        return _order_of(SimpleNamespace(**(dict(row._mapping) | values)) if values else row)

    @staticmethod
    def _find(
        connection: sa.Connection, instance_id: str, names: list[_Names]
    ) -> list[sa.Row[Any] | None]:
        """The rows of reports: by the mark, else by the order id.

        One order has one id and one mark, so neither may contradict the row's; a mark that no
        gateway made does not: somebody has changed it at the broker, who keeps the id.
        """

        def rows(statement: sa.Select[Any], wanted: Iterable[str]) -> Iterator[sa.Row[Any]]:
            distinct = list(dict.fromkeys(filter(None, wanted)))
            for begin in range(0, len(distinct), LENGTHS[-1]):
                some = distinct[begin : begin + LENGTHS[-1]]
                some += some[-1:] * (next(n for n in LENGTHS if n >= len(some)) - len(some))
                yield from connection.execute(statement, {"instance": instance_id, "names": some})

        marked = {row.mark: row for row in rows(_WITH_MARKS, (mark for mark, _ in names))}
        found: list[sa.Row[Any] | None] = []
        for mark, order_id in names:
            row = marked.get(mark)
            fits = row is not None and (not order_id or row.order_id in (None, order_id))
            found.append(row if fits else None)
        missing = [name[1] for name, row in zip(names, found, strict=True) if row is None]
        known: dict[str, list[sa.Row[Any]]] = {}
        for row in rows(_WITH_ORDER_IDS, missing):
            known.setdefault(row.order_id, []).insert(0, row)  # the newest first
        for number, (mark, order_id) in enumerate(names):
            if found[number] is None:
                rows_of_id = known.get(order_id, ())
                is_ours = mark.startswith(MARK)
                fitting = (row for row in rows_of_id if not is_ours or row.mark in (None, mark))
                found[number] = next(fitting, None)
        return found

    def _rows(self, instance_id: str, names: Iterable[_Names]) -> list[sa.Row[Any] | None]:
        """The rows of these marks and order ids; of a few, from memory while nothing has been
        written since: who polls an order asks for the same row again and again."""
        keys = [(instance_id, *name) for name in names]
        seen = self._seen
        if seen.writes != self._commits.ended or len(seen.rows) + len(keys) > MOST_SEEN:
            seen = _Seen(self._commits.ended)
        missing = [key for key in keys if key not in seen.rows]
        if missing:
            names = [key[1:] for key in missing]
            rows = self._read(lambda connection: self._find(connection, instance_id, names))
            seen.rows.update(zip(missing, rows, strict=True))
        if len(keys) <= MOST_SEEN:
            self._seen = seen
        return [seen.rows[key] for key in keys]

    @staticmethod
    def _change(connection: sa.Connection, row: sa.Row[Any], values: dict[str, Any]) -> None:
        """Writes the values. When they give the row its order id, what was seen of that id since
        the row began (a push without a mark) was this order: the two become one."""
        if row.state in (NOT_PLACED, REFUSED) and values.get("state") == PLACED:
            log.error("an order that counted as %s is at the broker after all", row.state)
        elif values.get("is_open") and not row.is_open:
            log.warning("order %s had ended, and is open again", row.order_id)
        order_id = values.get("order_id")
        if order_id is not None:
            named = {"instance": row.instance_id, "by_order_id": order_id, "row": row.id}
            early = connection.execute(_EARLY, named).first()
            if early is not None:
                connection.execute(sa.delete(_orders).where(_orders.c.id == early.id))
                now = SimpleNamespace(**(dict(row._mapping) | values))
                values = values | _merged(now, _order_of(early))
        connection.execute(_UPDATE, {"row": row.id, **values})

    def record_fills(
        self, instance_id: str, fills: Iterable[Fill], *, deadline: float | None = None
    ) -> None:
        """Keeps executions; one told again replaces what was told before (a broker corrects it).
        `deadline` as in `record`."""
        fills = list(fills)
        new = self._read(
            lambda connection: [
                fill for fill in fills if not self._has_fill(connection, instance_id, fill)
            ]
        )
        if new:
            self._write(
                lambda connection: self._insert_fills(connection, instance_id, new), deadline
            )

    def _insert_fills(self, connection: sa.Connection, instance_id: str, fills: list[Fill]) -> None:
        for fill in fills:
            if not self._has_fill(connection, instance_id, fill):
                named = {
                    "instance_id": instance_id,
                    "order_id": fill.order_id,
                    "fill_id": fill.fill_id,
                }
                told = {
                    "qty": _text(fill.qty),
                    "price": _text(fill.price),
                    "time": fill.time.timestamp(),
                }
                corrected = connection.execute(sa.update(_fills).filter_by(**named).values(**told))
                if not corrected.rowcount:
                    connection.execute(sa.insert(_fills).values(**named, **told))

    @staticmethod
    def _has_fill(connection: sa.Connection, instance_id: str, fill: Fill) -> bool:
        """As it is told now."""
        found = connection.execute(
            sa.select(_fills.c.time).where(
                _fills.c.instance_id == instance_id,
                _fills.c.order_id == fill.order_id,
                _fills.c.fill_id == fill.fill_id,
                _fills.c.qty == _text(fill.qty),
                _fills.c.price == _text(fill.price),
            )
        )
        return found.first() is not None

    # --- looking up ---------------------------------------------------------------------------
    def by_client_order_id(self, instance_id: str, client_order_id: str) -> JournalOrder | None:
        """The newest attempt under this client order id; an earlier one if that is at the broker
        and this one is not (it had counted as not placed, and came to light later)."""
        named = {"instance": instance_id, "key": client_order_id}
        if self._is_new(named):
            return None
        newest = self._one(_NEWEST_ATTEMPT, **named)
        if newest is None or newest.attempt == 1 or newest.state not in (NOT_PLACED, REFUSED):
            return newest
        return self._one(_NEWEST_PLACED, **named) or newest

    def _is_new(self, named: Mapping[str, str]) -> bool:
        """Whether there surely is no row of this client order id: most orders ask for one."""
        if not self._is_sqlite:
            return False
        self._open()
        with self._asking:
            try:
                if self._asked is None:
                    self._asked = self._reader.raw_connection()
                driver = self._asked.driver_connection
                assert isinstance(driver, sqlite3.Connection)
                return _HAS_KEY_SHORT(driver, named).fetchone() is None
            except (sqlite3.Error, SQLAlchemyError):
                self._let_go()
                return False  # whoever asks at length is told what is wrong

    def _let_go(self) -> None:
        if self._asked is not None:
            self._asked.close()
            self._asked = None

    def by_order_id(self, instance_id: str, order_id: str) -> JournalOrder | None:
        [row] = self._rows(instance_id, [("", order_id)])
        return None if row is None else _as_read(row)

    def by_row_id(self, row_id: int) -> JournalOrder | None:
        return self._one(_BY_ROW, row=row_id)

    def unsettled(self, instance_id: str) -> list[JournalOrder]:
        """Rows whose order may or may not be at the broker, oldest first."""
        return self._many(_UNSETTLED, instance=instance_id)

    def orders(
        self, instance_id: str, *, open_: bool | None, since: datetime | None, limit: int | None
    ) -> list[JournalOrder]:
        """Orders known to be (or to have been) at the broker, newest first."""
        statement = sa.select(_orders).where(
            _orders.c.instance_id == instance_id, _orders.c.state.in_((PLACED, SEEN))
        )
        if open_ is not None:
            statement = statement.where(_orders.c.is_open == open_)
        if since is not None:
            statement = statement.where(_orders.c.created >= since.timestamp())
        return self._many(
            statement.order_by(_orders.c.created.desc(), _orders.c.id.desc()).limit(limit)
        )

    def fills(self, instance_id: str, order_id: str) -> list[Fill]:
        """An order's executions, oldest first, but for those taken back."""
        statement = (
            sa.select(_fills)
            .where(_fills.c.instance_id == instance_id, _fills.c.order_id == order_id)
            .order_by(_fills.c.time, _fills.c.fill_id)
        )
        return [
            Fill(row.fill_id, row.order_id, Decimal(row.qty), Decimal(row.price), _time(row))
            for row in self._read(lambda connection: connection.execute(statement).all())
            if row.qty != "0"
        ]

    def _one(self, statement: sa.Select[Any], **values: Any) -> JournalOrder | None:
        rows = self._many(statement, **values)
        return rows[0] if rows else None

    def _many(self, statement: sa.Select[Any], **values: Any) -> list[JournalOrder]:
        rows = self._read(lambda connection: connection.execute(statement, values).all())
        return [_as_read(row) for row in rows]

    # --- the database -------------------------------------------------------------------------
    def _write(self, body: Callable[[sa.Connection], None], deadline: float | None) -> None:
        """Runs a change and returns when it is durable; Busy when that takes too long."""
        written = self._post(body)
        try:
            written.result(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except TimeoutError:
            raise Busy(TOO_SLOW, retry_after=2) from None

    def _post(
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

    def _read(self, body: Callable[[sa.Connection], _Result]) -> _Result:
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
                about = _about_of(connection)
        except SQLAlchemyError:
            return None
        if about.get("schema_version") != str(len(MIGRATIONS)):
            return None
        return about.get("gateway_id")

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
            return self._commits.post(self._create_or_upgrade).result()
        except ValueError:
            self.close()
            raise

    @staticmethod
    def _create_or_upgrade(connection: sa.Connection) -> str:
        is_there = sa.inspect(connection).has_table(_about.name)
        about = _about_of(connection) if is_there else {}
        version = int(about.get("schema_version", len(MIGRATIONS)))
        if version > len(MIGRATIONS):
            raise ValueError("The journal was written by a newer version of httptrading.")
        _metadata.create_all(connection)
        for statements in MIGRATIONS[version:]:
            for statement in statements:
                connection.execute(sa.text(statement))
        values = {
            "gateway_id": about.get("gateway_id", uuid.uuid4().hex),
            "schema_version": str(len(MIGRATIONS)),
        }
        for name, value in values.items():
            if about.get(name) != value:
                connection.execute(sa.delete(_about).where(_about.c.name == name))
                connection.execute(sa.insert(_about).values(name=name, value=value))
        return values["gateway_id"]


def _silent() -> Busy:
    return Busy(
        "The order journal's server does not answer, so this request has sent nothing.",
        retry_after=2,
    )


def _is_read_only(error: SQLAlchemyError) -> bool:
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", 0)
    return bool(code & 0xFF == sqlite3.SQLITE_READONLY)  # the rest of the code tells why


def _about_of(connection: sa.Connection) -> Mapping[str, str]:
    return {row.name: row.value for row in connection.execute(sa.select(_about))}


def _cause(error: SQLAlchemyError) -> str:
    """What the database says of its own state; never the statement, and not of a row (some quote
    its values)."""
    name = type(error).__name__
    of_the_whole = isinstance(error, OperationalError) or type(error) is DatabaseError
    return f"{name}: {error.orig}" if of_the_whole and isinstance(error, DBAPIError) else name


def merge(
    known: Order, news: Order, is_open: bool = True, priced_qty: Number | None = None
) -> Order:
    """What is known after the news: fills only grow, a final state stays.

    `priced_qty`: how much of the filled quantity the known average price is of (None: all). A
    report that counts more fills without a price leaves the price as it is until one is told.

    >>> merge(Order("1", "USD", 10, 5, 2.0), Order("1", "USD", 10, 3, 9.0)).filled_qty
    5
    """
    if priced_qty is None:
        priced_qty = known.filled_qty if known.avg_price else 0
    older = news.filled_qty < known.filled_qty
    priced = bool(news.avg_price) and not older and news.filled_qty > priced_qty
    merged = replace(
        known,
        order_id=news.order_id or known.order_id,
        currency=news.currency or known.currency,
        filled_qty=known.filled_qty if older else news.filled_qty,
        avg_price=news.avg_price if priced else known.avg_price,
    )
    failed = news.is_canceled or bool(news.error_reason)
    if not is_open or known.is_completed or (older and not failed):
        return merged
    merged = replace(
        merged,
        qty=known.qty if older else news.qty or known.qty,
        error_reason=news.error_reason,
        is_canceled=news.is_canceled,
        is_pending_cancel=news.is_pending_cancel,
    )
    return replace(merged, is_pending_cancel=merged.is_pending_cancel and not merged.is_completed)


def _names(report: OrderReport) -> _Names:
    return report.mark, report.order.order_id


def _news(
    instance_id: str, moment: float, row: sa.Row[Any] | None, report: OrderReport
) -> dict[str, Any]:
    """What a report changes in its row, or the whole of a new one; nothing: no news."""
    # A float is not what is read back: 0.3 is less than Decimal("0.3").
    order = replace(
        report.order,
        qty=exact(report.order.qty),
        filled_qty=exact(report.order.filled_qty),
        avg_price=exact(report.order.avg_price),
    )
    now = time.time()
    if row is None and not order.order_id:
        return {}
    if row is None:
        return {
            "instance_id": instance_id,
            "attempt": 1,
            "state": SEEN,
            "order_id": order.order_id,
            **_asked(report),
            **_known(order),
            "priced_qty": _text(order.filled_qty) if order.avg_price else "0",
            "is_open": not order.is_completed,
            "created": report.time.timestamp() if report.time else now,
            "updated": now,
        }
    # News from before the refusal (a push that was overtaken) does not call it in question.
    alive = order.filled_qty > 0 or (not order.is_completed and moment > row.updated)
    revived = row.state in (NOT_PLACED, REFUSED) and alive
    values = _merged(row, order, revived or _reopened(row, order, moment))
    if order.order_id and row.order_id is None:
        values["order_id"] = order.order_id
    if revived or (row.state in UNSETTLED and order.order_id):
        values["state"] = PLACED
    if row.state == SEEN and None in (row.ticker, row.direction, row.order_type, row.lifecycle):
        # Not every report tells everything.
        asked = _asked(report).items()
        values |= {name: told for name, told in asked if told and getattr(row, name) is None}
    if values:
        values["updated"] = now
    return values


def _reopened(row: Any, news: Order, moment: float) -> bool:
    """Whether an order that had ended is open again. An overtaken push says so as well, but not
    so much later."""
    ended = row.state in (PLACED, SEEN) and not row.is_open and Decimal(row.filled_qty) < news.qty
    older = news.filled_qty < Decimal(row.filled_qty)
    is_late = moment > row.updated + REOPENS_AFTER
    return bool(ended and is_late and not older and not news.is_completed)


def _merged(row: Any, news: Order, revived: bool = False) -> dict[str, Any]:
    """The columns that the news changes. `revived`: the row counted as no order, or as one that
    had ended, until now."""
    known = _order_of(row)
    base = replace(known, error_reason="", is_canceled=False) if revived else known
    merged = merge(base, news, row.is_open or revived, Decimal(row.priced_qty))
    before, after = _known(known), _known(merged)
    values = {name: after[name] for name in after if after[name] != before[name]}
    if "avg_price" in values:
        values["priced_qty"] = _text(news.filled_qty)
    is_open = (row.is_open or revived) and not merged.is_completed
    if is_open != row.is_open:
        values["is_open"] = is_open
    return values


def _known(order: Order) -> dict[str, Any]:
    return {
        "qty": _text(order.qty),
        "currency": order.currency,
        "filled_qty": _text(order.filled_qty),
        "avg_price": _text(order.avg_price),
        "error_reason": order.error_reason,
        "is_canceled": order.is_canceled,
        "is_pending_cancel": order.is_pending_cancel,
    }


def _asked(report: OrderReport) -> dict[str, Any]:
    contract = report.contract
    return {
        "trade_type": contract.trade_type.name if contract else None,
        "region": contract.region if contract else None,
        "ticker": contract.ticker if contract else None,
        "direction": report.direction,
        "order_type": report.order_type.name if report.order_type else None,
        "time_in_force": report.time_in_force.name if report.time_in_force else None,
        "lifecycle": report.lifecycle.name if report.lifecycle else None,
        "price": _text(report.price),
        "asked_qty": _text(report.order.qty),
    }


def _text(number: Number | None) -> str | None:
    """A number's plain decimal digits, without trailing zeros: equal numbers, equal text."""
    if number is None:
        return None
    text = format(exact(number), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _order_of(row: Any) -> Order:
    return Order(
        order_id=row.order_id or "",
        currency=row.currency,
        qty=Decimal(row.qty),
        filled_qty=Decimal(row.filled_qty),
        avg_price=Decimal(row.avg_price),
        error_reason=row.error_reason,
        is_canceled=row.is_canceled,
        is_pending_cancel=row.is_pending_cancel,
    )


def _journal_order(row: Any) -> JournalOrder:
    contract = None
    if row.region and row.ticker:
        contract = Contract(TradeType[row.trade_type], row.ticker, row.region)
    return JournalOrder(
        row_id=row.id,
        client_order_id=row.client_order_id,
        attempt=row.attempt,
        mark=row.mark,
        state=row.state,
        order=_order_of(row),
        contract=contract,
        direction=row.direction,
        order_type=OrderType[row.order_type] if row.order_type else None,
        time_in_force=TimeInForce[row.time_in_force] if row.time_in_force else None,
        lifecycle=Lifecycle[row.lifecycle] if row.lifecycle else None,
        price=Decimal(row.price) if row.price is not None else None,
        asked_qty=Decimal(row.asked_qty) if row.asked_qty is not None else None,
        is_open=row.is_open,
        is_priced_in_part=0 < Decimal(row.priced_qty) < Decimal(row.filled_qty),
        created=datetime.fromtimestamp(row.created, UTC),
        updated=datetime.fromtimestamp(row.updated, UTC),
    )


_as_read = lru_cache(1000)(_journal_order)
"""Of a row that was read: whoever polls reads the same again."""


def _time(row: Any) -> datetime:
    return datetime.fromtimestamp(row.time, UTC)


def _sqlite_connect(connection: Any, _record: Any) -> None:
    # The driver's own transactions begin too late (at the first change); see _sqlite_begin.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}").close()


def _sqlite_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
