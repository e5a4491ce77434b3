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

import base64
import hashlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from httptrading.errors import Busy
from httptrading.model import (
    CURRENCIES,
    Contract,
    Fill,
    Lifecycle,
    Number,
    Order,
    OrderReport,
    OrderType,
    TimeInForce,
    TradeType,
)

log = logging.getLogger("httptrading.journal")

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
    sa.Column("instance_id", sa.String(32), nullable=False),
    sa.Column("client_order_id", sa.String(64)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("mark", sa.String(24)),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("order_id", sa.String(64)),
    sa.Column("trade_type", sa.String(16)),
    sa.Column("region", sa.String(8)),
    sa.Column("ticker", sa.String(16)),
    sa.Column("direction", sa.String(8)),
    sa.Column("order_type", sa.String(16)),
    sa.Column("time_in_force", sa.String(8)),
    sa.Column("lifecycle", sa.String(16)),
    # Decimals as text: exact in every database.
    sa.Column("price", sa.String(40)),
    sa.Column("qty", sa.String(40), nullable=False),
    sa.Column("currency", sa.String(8), nullable=False),
    sa.Column("filled_qty", sa.String(40), nullable=False),
    sa.Column("avg_price", sa.String(40), nullable=False),
    sa.Column("error_reason", sa.Text, nullable=False),
    sa.Column("is_canceled", sa.Boolean, nullable=False),
    sa.Column("is_pending_cancel", sa.Boolean, nullable=False),
    sa.Column("is_open", sa.Boolean, nullable=False),  # may still change at the broker
    sa.Column("created", sa.Float, nullable=False),  # seconds since the epoch
    sa.Column("updated", sa.Float, nullable=False),
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
    sa.Column("instance_id", sa.String(32), primary_key=True),
    sa.Column("order_id", sa.String(64), primary_key=True),
    sa.Column("fill_id", sa.String(64), primary_key=True),
    sa.Column("qty", sa.String(40), nullable=False),
    sa.Column("price", sa.String(40), nullable=False),
    sa.Column("time", sa.Float, nullable=False),
)

MIGRATIONS: tuple[tuple[str, ...], ...] = ((),)
"""One tuple of SQL statements per schema version; version 1 is `create_all`. A change to the tables
appends a tuple, and a journal of an older version runs what it lacks, in order."""


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
    is_open: bool
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
            and self.order.qty == request.qty
            and self.price == request.price
        )


class Journal:
    """All instances' orders; safe from any thread.

    Every method that must write raises Busy when it cannot, so that nothing is sent unrecorded.
    """

    def __init__(self, url: str) -> None:
        """`url`: any SQLAlchemy URL; `sqlite:///path` gets WAL, full sync and mode 0600."""
        self._reader = sa.create_engine(url, pool_size=8, max_overflow=40)
        self._writer = sa.create_engine(url, pool_size=1)
        self._write_lock = threading.Lock()
        if self._writer.dialect.name == "sqlite":
            sa.event.listen(self._writer, "connect", _sqlite_connect)
            sa.event.listen(self._writer, "begin", _sqlite_begin)
            database = self._writer.url.database
            if database:
                Path(database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(database, os.O_CREAT | os.O_RDWR, 0o600))
        self.gateway_id = self._migrate()

    def close(self) -> None:
        self._reader.dispose()
        self._writer.dispose()

    # --- placing ------------------------------------------------------------------------------
    def mark(self, instance_id: str, client_order_id: str, attempt: int) -> str:
        """The tag given to the broker: unique to this row of this journal; 20 ASCII characters."""
        row = "\n".join((self.gateway_id, instance_id, client_order_id, str(attempt)))
        digest = base64.b32encode(hashlib.sha256(row.encode()).digest()).decode().lower()
        return "ht" + digest[:18]

    def begin(
        self, instance_id: str, client_order_id: str, attempt: int, request: OrderRequest
    ) -> int:
        """Records durably that this order is about to be sent; returns the row's id."""
        now = time.time()
        values = {
            "instance_id": instance_id,
            "client_order_id": client_order_id,
            "attempt": attempt,
            "mark": self.mark(instance_id, client_order_id, attempt),
            "state": SENDING,
            "trade_type": request.contract.trade_type.name,
            "region": request.contract.region,
            "ticker": request.contract.ticker,
            "direction": request.direction,
            "order_type": request.order_type.name,
            "time_in_force": request.time_in_force.name,
            "lifecycle": request.lifecycle.name,
            "price": _text(request.price),
            "qty": _text(request.qty),
            "currency": CURRENCIES.get(request.contract.region, ""),
            "filled_qty": "0",
            "avg_price": "0",
            "error_reason": "",
            "is_canceled": False,
            "is_pending_cancel": False,
            "is_open": True,
            "created": now,
            "updated": now,
        }
        with self._writing() as connection:
            statement = sa.insert(_orders).values(values).returning(_orders.c.id)
            return int(connection.execute(statement).scalar_one())

    def placed(self, row_id: int, order_id: str) -> None:
        """The broker took it under this id. What a push said of the id meanwhile is joined."""
        with self._writing() as connection:
            row = connection.execute(sa.select(_orders).where(_orders.c.id == row_id)).one()
            early = connection.execute(
                sa.select(_orders).where(
                    _orders.c.instance_id == row.instance_id,
                    _orders.c.order_id == order_id,
                    _orders.c.state == SEEN,
                )
            ).first()
            values: dict[str, Any] = {"state": PLACED, "order_id": order_id, "updated": time.time()}
            if early is not None:
                connection.execute(sa.delete(_orders).where(_orders.c.id == early.id))
                values |= _merged(_order_of(row), _order_of(early), row.is_open)
            connection.execute(sa.update(_orders).where(_orders.c.id == row_id).values(values))

    def refused(self, row_id: int, reason: str) -> None:
        """The broker said no; there is no such order."""
        self._set(row_id, state=REFUSED, error_reason=reason, is_open=False)

    def unknown(self, row_id: int) -> None:
        """Sent, and no clear answer came."""
        self._set(row_id, only=(SENDING,), state=UNKNOWN)

    def not_placed(self, row_id: int, reason: str) -> None:
        """Proved not to be at the broker: nothing was sent, or the broker's lists lack it."""
        self._set(row_id, only=UNSETTLED, state=NOT_PLACED, error_reason=reason, is_open=False)

    def _set(self, row_id: int, only: Iterable[str] | None = None, **values: Any) -> None:
        statement = sa.update(_orders).where(_orders.c.id == row_id)
        if only is not None:
            statement = statement.where(_orders.c.state.in_(tuple(only)))
        with self._writing() as connection:
            connection.execute(statement.values(updated=time.time(), **values))

    # --- what the broker says -----------------------------------------------------------------
    def record(self, instance_id: str, reports: Iterable[OrderReport]) -> list[JournalOrder]:
        """Joins what a list, a query or a push said to what is known, and returns the rows.

        Filled quantity never goes down, a final state is final. Writes only what changed.
        """
        rows = []
        with self._connected() as connection:
            planned = [(report, *self._plan(connection, instance_id, report)) for report in reports]
        if any(values for _, _, values in planned):
            with self._writing() as connection:
                for report, _, _ in planned:
                    row, values = self._plan(connection, instance_id, report)
                    if values and row is not None:
                        connection.execute(
                            sa.update(_orders).where(_orders.c.id == row.id).values(values)
                        )
                    elif values:
                        connection.execute(sa.insert(_orders).values(values))
        with self._connected() as connection:
            for report, _, _ in planned:
                found = self._find(connection, instance_id, report)
                if found is not None:
                    rows.append(_journal_order(found))
        return rows

    def _find(
        self, connection: sa.Connection, instance_id: str, report: OrderReport
    ) -> sa.Row[Any] | None:
        mine = _orders.c.instance_id == instance_id
        if report.mark:
            row = connection.execute(
                sa.select(_orders).where(mine, _orders.c.mark == report.mark)
            ).first()
            if row is not None:
                return row
        return connection.execute(
            sa.select(_orders)
            .where(mine, _orders.c.order_id == report.order.order_id)
            .order_by(_orders.c.id.desc())
        ).first()

    def _plan(
        self, connection: sa.Connection, instance_id: str, report: OrderReport
    ) -> tuple[sa.Row[Any] | None, dict[str, Any]]:
        """The row a report belongs to, and what it changes there (nothing: no news)."""
        row = self._find(connection, instance_id, report)
        order = report.order
        now = time.time()
        if row is None:
            return None, {
                "instance_id": instance_id,
                "attempt": 1,
                "state": SEEN,
                "order_id": order.order_id,
                **_asked(report),
                **_known(order),
                "is_open": not order.is_completed,
                "created": report.time.timestamp() if report.time else now,
                "updated": now,
            }
        values: dict[str, Any] = _merged(_order_of(row), order, row.is_open)
        if order.order_id and row.order_id != order.order_id:
            values["order_id"] = order.order_id
        proven = row.state in UNSETTLED or (
            row.state in (NOT_PLACED, REFUSED) and (order.filled_qty > 0 or not order.is_completed)
        )
        if proven:
            if row.state in (NOT_PLACED, REFUSED):
                log.error("an order that counted as %s is at the broker after all", row.state)
                values |= {"error_reason": order.error_reason, "is_open": not order.is_completed}
            values["state"] = PLACED
        if values:
            values["updated"] = now
        return row, values

    def record_fills(self, instance_id: str, fills: Iterable[Fill]) -> None:
        """Keeps executions; one that is known already changes nothing."""
        with self._connected() as connection:
            new = [fill for fill in fills if not self._has_fill(connection, instance_id, fill)]
        if not new:
            return
        with self._writing() as connection:
            for fill in new:
                if not self._has_fill(connection, instance_id, fill):
                    connection.execute(
                        sa.insert(_fills).values(
                            instance_id=instance_id,
                            order_id=fill.order_id,
                            fill_id=fill.fill_id,
                            qty=_text(fill.qty),
                            price=_text(fill.price),
                            time=fill.time.timestamp(),
                        )
                    )

    @staticmethod
    def _has_fill(connection: sa.Connection, instance_id: str, fill: Fill) -> bool:
        found = connection.execute(
            sa.select(_fills.c.time).where(
                _fills.c.instance_id == instance_id,
                _fills.c.order_id == fill.order_id,
                _fills.c.fill_id == fill.fill_id,
            )
        )
        return found.first() is not None

    # --- looking up ---------------------------------------------------------------------------
    def by_client_order_id(self, instance_id: str, client_order_id: str) -> JournalOrder | None:
        """The newest attempt under this client order id."""
        return self._one(
            sa.select(_orders)
            .where(
                _orders.c.instance_id == instance_id, _orders.c.client_order_id == client_order_id
            )
            .order_by(_orders.c.attempt.desc())
            .limit(1)
        )

    def by_order_id(self, instance_id: str, order_id: str) -> JournalOrder | None:
        return self._one(
            sa.select(_orders)
            .where(_orders.c.instance_id == instance_id, _orders.c.order_id == order_id)
            .order_by(_orders.c.id.desc())
            .limit(1)
        )

    def sent_ages(self, instance_id: str, seconds: float) -> list[float]:
        """How many seconds ago each order was sent, for those of the last `seconds`."""
        now = time.time()
        statement = sa.select(_orders.c.updated).where(
            _orders.c.instance_id == instance_id,
            _orders.c.created >= now - seconds - 60,
            _orders.c.client_order_id.is_not(None),
        )
        with self._connected() as connection:
            ages = [now - moment for moment in connection.execute(statement).scalars()]
        return [max(0.0, age) for age in ages if age < seconds]

    def by_row_id(self, row_id: int) -> JournalOrder | None:
        return self._one(sa.select(_orders).where(_orders.c.id == row_id))

    def unsettled(self, instance_id: str) -> list[JournalOrder]:
        """Rows whose order may or may not be at the broker, oldest first."""
        return self._many(
            sa.select(_orders)
            .where(_orders.c.instance_id == instance_id, _orders.c.state.in_(UNSETTLED))
            .order_by(_orders.c.id)
        )

    def orders(
        self, instance_id: str, *, open_: bool | None, since: datetime | None, limit: int
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
        """An order's executions, oldest first."""
        with self._connected() as connection:
            rows = connection.execute(
                sa.select(_fills)
                .where(_fills.c.instance_id == instance_id, _fills.c.order_id == order_id)
                .order_by(_fills.c.time, _fills.c.fill_id)
            )
            return [
                Fill(row.fill_id, row.order_id, Decimal(row.qty), Decimal(row.price), _time(row))
                for row in rows
            ]

    def _one(self, statement: sa.Select[Any]) -> JournalOrder | None:
        rows = self._many(statement)
        return rows[0] if rows else None

    def _many(self, statement: sa.Select[Any]) -> list[JournalOrder]:
        with self._connected() as connection:
            return [_journal_order(row) for row in connection.execute(statement)]

    # --- the database -------------------------------------------------------------------------
    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """One durable transaction. One writer at a time: SQLite has no more, and waiting here is
        cheaper than in its busy handler."""
        with self._write_lock:
            try:
                with self._writer.begin() as connection:
                    yield connection
            except SQLAlchemyError as error:
                log.error("the journal cannot be written (%s)", type(error).__name__)
                raise Busy(
                    "The order journal cannot be written (is the disk full?).", retry_after=5
                ) from None

    @contextmanager
    def _connected(self) -> Iterator[sa.Connection]:
        try:
            with self._reader.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            log.error("the journal cannot be read (%s)", type(error).__name__)
            raise Busy("The order journal cannot be read.", retry_after=5) from None

    def _migrate(self) -> str:
        """Creates or upgrades the tables; returns this gateway's own id, made once."""
        with self._writing() as connection:
            _metadata.create_all(connection)
            about: Mapping[str, str] = {
                row.name: row.value for row in connection.execute(sa.select(_about))
            }
            version = int(about.get("schema_version", len(MIGRATIONS)))
            if version > len(MIGRATIONS):
                raise ValueError("The journal was written by a newer version of httptrading.")
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


def merge(known: Order, news: Order, is_open: bool = True) -> Order:
    """What is known after the news: fills only grow, a final state stays.

    >>> merge(Order("1", "USD", 10, 5, 2.0), Order("1", "USD", 10, 3, 9.0)).filled_qty
    5
    """
    more = news.filled_qty > known.filled_qty
    first_price = news.filled_qty == known.filled_qty and not known.avg_price
    merged = replace(
        known,
        order_id=news.order_id or known.order_id,
        currency=news.currency or known.currency,
        filled_qty=news.filled_qty if more else known.filled_qty,
        avg_price=news.avg_price if more or first_price else known.avg_price,
    )
    if is_open and not known.is_completed:
        merged = replace(
            merged,
            qty=news.qty or known.qty,
            error_reason=news.error_reason,
            is_canceled=news.is_canceled,
            is_pending_cancel=news.is_pending_cancel and not news.is_completed,
        )
    return merged


def _merged(known: Order, news: Order, is_open: bool) -> dict[str, Any]:
    """The columns that the news changes."""
    merged = merge(known, news, is_open)
    before, after = _known(known), _known(merged)
    values = {name: after[name] for name in after if after[name] != before[name]}
    if is_open and merged.is_completed:
        values["is_open"] = False
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
    }


def _text(number: Number | None) -> str | None:
    """A number's plain decimal digits, without trailing zeros: equal numbers, equal text."""
    if number is None:
        return None
    value = number if isinstance(number, Decimal) else Decimal(repr(number))
    text = format(value, "f")
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
        is_open=row.is_open,
        created=datetime.fromtimestamp(row.created, UTC),
        updated=datetime.fromtimestamp(row.updated, UTC),
    )


def _time(row: Any) -> datetime:
    return datetime.fromtimestamp(row.time, UTC)


def _sqlite_connect(connection: Any, _record: Any) -> None:
    # The driver's own transactions begin too late (at the first change); see _sqlite_begin.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000"):
        connection.execute(f"PRAGMA {pragma}").close()


def _sqlite_begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
