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
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import sqlalchemy as sa

from httptrading.brokers import journal_tables as tables
from httptrading.brokers.group_commit import NotThatSimple
from httptrading.brokers.journal_database import JournalDatabase
from httptrading.brokers.journal_rows import (
    JournalOrder,
    Names,
    OrderRequest,
    Outcome,
    as_read,
    changes,
    digits,
    fill_of,
    journal_order,
    names_of,
    news_of,
    order_of,
)
from httptrading.brokers.journal_tables import (
    NOT_PLACED,
    PLACED,
    REFUSED,
    SEEN,
    SENDING,
    UNKNOWN,
    UNSETTLED,
)
from httptrading.model import Fill, Order, OrderReport
from httptrading.tickers import currency_of

log = logging.getLogger("httptrading.journal")

MARK = "ht"  # what every mark of a gateway begins with

MOST_SEEN = 100
LENGTHS = (1, 8, 64, 512)
"""Of the lists of names in a statement: each connection keeps what it has prepared, for each
length anew. SQLite takes 999 values at least."""


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
        """`url`: any SQLAlchemy URL, see `JournalDatabase`; ValueError: of a newer version."""
        self._database = JournalDatabase(url)
        self._seen = _Seen(0)

    def close(self) -> None:
        self._database.close()

    @property
    def writes(self) -> int:
        """How often anything may have been written."""
        return self._database.writes

    def unchanged_since(self, writes: int) -> bool:
        """Whether what was read after so many writes is surely still so."""
        return self._database.unchanged_since(writes)

    # --- placing ------------------------------------------------------------------------------
    def mark(self, instance_id: str, client_order_id: str, attempt: int) -> str:
        """The tag given to the broker: unique to this row of this journal; 20 ASCII characters."""
        row = "\n".join((self._database.gateway_id, instance_id, client_order_id, str(attempt)))
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
            "price": digits(request.price),
            "asked_qty": digits(request.qty),
            "qty": digits(request.qty),
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
            inserted = connection.execute(tables.INSERT, values).inserted_primary_key
            assert inserted is not None
            return int(inserted[0]), created

        def short(driver: sqlite3.Connection) -> tuple[int, datetime]:
            return int(tables.INSERT_SHORT(driver, values).lastrowid or 0), created

        return self._database.post(body, short=short)

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
            return self._database.post(body)
        values = {
            "row": row_id,
            "state": PLACED,
            "order_id": outcome.order_id,
            "by_order_id": outcome.order_id,
            "updated": time.time(),
        }

        def short(driver: sqlite3.Connection) -> None:
            if tables.PLACED_SHORT(driver, values).rowcount != 1:
                raise NotThatSimple  # a push was first

        return self._database.post(body, short=short, soon=soon)

    def _apply(self, connection: sa.Connection, row_id: int, outcome: Outcome) -> None:
        row = connection.execute(tables.BY_ROW, {"row": row_id}).one()
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
            connection.execute(tables.UPDATE, {"row": row_id, **values})

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
        rows = self._rows(instance_id, map(names_of, reports))
        changed: set[str] = set()
        for row, report in zip(rows, reports, strict=True):
            if news_of(instance_id, moment, row, report):
                changed.update(filter(None, names_of(report)))
        # With all that is said of those orders: what is no news now may take back what is.
        news = [report for report in reports if not changed.isdisjoint(names_of(report))]
        if news:
            self._database.write(
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
            [row] = self._find(connection, instance_id, [names_of(report)])
            values = news_of(instance_id, moment, row, report)
            if values and row is not None:
                self._change(connection, row, values)
            elif values:
                connection.execute(tables.INSERT, values)

    def joined(self, instance_id: str, reports: Iterable[OrderReport]) -> list[JournalOrder]:
        """The rows as `record` has left them, or would if they could be written."""
        empty = dict.fromkeys(tables.orders.c.keys())
        joined = []
        reports = list(reports)
        rows = self._rows(instance_id, map(names_of, reports))
        for row, report in zip(rows, reports, strict=True):
            values = news_of(instance_id, time.time(), row, report)
            known = dict(row._mapping) if row is not None else {**empty, "id": 0}
            if row is not None or values:
                joined.append(journal_order(SimpleNamespace(**(known | values))))
        return joined

    def together(self, instance_id: str, report: OrderReport) -> Order:
        """What a report and its row say of the order."""
        [row] = self._rows(instance_id, [names_of(report)])
        if row is None:
            return report.order
        values = news_of(instance_id, time.time(), row, report)
        return order_of(SimpleNamespace(**(dict(row._mapping) | values)) if values else row)

    @staticmethod
    def _find(
        connection: sa.Connection, instance_id: str, names: list[Names]
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

        marked = {row.mark: row for row in rows(tables.WITH_MARKS, (mark for mark, _ in names))}
        found: list[sa.Row[Any] | None] = []
        for mark, order_id in names:
            row = marked.get(mark)
            fits = row is not None and (not order_id or row.order_id in (None, order_id))
            found.append(row if fits else None)
        missing = [name[1] for name, row in zip(names, found, strict=True) if row is None]
        known: dict[str, list[sa.Row[Any]]] = {}
        for row in rows(tables.WITH_ORDER_IDS, missing):
            known.setdefault(row.order_id, []).insert(0, row)  # the newest first
        for number, (mark, order_id) in enumerate(names):
            if found[number] is None:
                rows_of_id = known.get(order_id, ())
                is_ours = mark.startswith(MARK)
                fitting = (row for row in rows_of_id if not is_ours or row.mark in (None, mark))
                found[number] = next(fitting, None)
        return found

    def _rows(self, instance_id: str, names: Iterable[Names]) -> list[sa.Row[Any] | None]:
        """The rows of these marks and order ids; of a few, from memory while nothing has been
        written since: who polls an order asks for the same row again and again."""
        keys = [(instance_id, *name) for name in names]
        seen = self._seen
        still = self._database.unchanged_since(seen.writes)
        if not still or len(seen.rows) + len(keys) > MOST_SEEN:
            seen = _Seen(self._database.writes)
        missing = [key for key in keys if key not in seen.rows]
        if missing:
            names = [key[1:] for key in missing]
            rows = self._database.read(
                lambda connection: self._find(connection, instance_id, names)
            )
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
            early = connection.execute(tables.EARLY, named).first()
            if early is not None:
                connection.execute(sa.delete(tables.orders).where(tables.orders.c.id == early.id))
                now = SimpleNamespace(**(dict(row._mapping) | values))
                values = values | changes(now, order_of(early))
        connection.execute(tables.UPDATE, {"row": row.id, **values})

    def record_fills(
        self, instance_id: str, fills: Iterable[Fill], *, deadline: float | None = None
    ) -> None:
        """Keeps executions; one told again replaces what was told before (a broker corrects it).
        `deadline` as in `record`."""
        fills = list(fills)
        new = self._database.read(
            lambda connection: [
                fill for fill in fills if not self._has_fill(connection, instance_id, fill)
            ]
        )
        if new:
            self._database.write(
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
                    "qty": digits(fill.qty),
                    "price": digits(fill.price),
                    "time": fill.time.timestamp(),
                }
                corrected = connection.execute(
                    sa.update(tables.fills).filter_by(**named).values(**told)
                )
                if not corrected.rowcount:
                    connection.execute(sa.insert(tables.fills).values(**named, **told))

    @staticmethod
    def _has_fill(connection: sa.Connection, instance_id: str, fill: Fill) -> bool:
        """As it is told now."""
        found = connection.execute(
            sa.select(tables.fills.c.time).where(
                tables.fills.c.instance_id == instance_id,
                tables.fills.c.order_id == fill.order_id,
                tables.fills.c.fill_id == fill.fill_id,
                tables.fills.c.qty == digits(fill.qty),
                tables.fills.c.price == digits(fill.price),
            )
        )
        return found.first() is not None

    # --- looking up ---------------------------------------------------------------------------
    def by_client_order_id(self, instance_id: str, client_order_id: str) -> JournalOrder | None:
        """The newest attempt under this client order id; an earlier one if that is at the broker
        and this one is not (it had counted as not placed, and came to light later)."""
        named = {"instance": instance_id, "key": client_order_id}
        if self._database.surely_lacks(tables.HAS_KEY_SHORT, named):
            return None  # so it is with most orders that are about to be sent
        newest = self._one(tables.NEWEST_ATTEMPT, **named)
        if newest is None or newest.attempt == 1 or newest.state not in (NOT_PLACED, REFUSED):
            return newest
        return self._one(tables.NEWEST_PLACED, **named) or newest

    def by_order_id(self, instance_id: str, order_id: str) -> JournalOrder | None:
        [row] = self._rows(instance_id, [("", order_id)])
        return None if row is None else as_read(row)

    def by_row_id(self, row_id: int) -> JournalOrder | None:
        return self._one(tables.BY_ROW, row=row_id)

    def unsettled(self, instance_id: str) -> list[JournalOrder]:
        """Rows whose order may or may not be at the broker, oldest first."""
        return self._many(tables.WITHOUT_OUTCOME, instance=instance_id)

    def orders(
        self, instance_id: str, *, open_: bool | None, since: datetime | None, limit: int | None
    ) -> list[JournalOrder]:
        """Orders known to be (or to have been) at the broker, newest first."""
        statement = sa.select(tables.orders).where(
            tables.orders.c.instance_id == instance_id, tables.orders.c.state.in_((PLACED, SEEN))
        )
        if open_ is not None:
            statement = statement.where(tables.orders.c.is_open == open_)
        if since is not None:
            statement = statement.where(tables.orders.c.created >= since.timestamp())
        by_time = tables.orders.c.created.desc(), tables.orders.c.id.desc()
        return self._many(statement.order_by(*by_time).limit(limit))

    def fills(self, instance_id: str, order_id: str) -> list[Fill]:
        """An order's executions, oldest first, but for those taken back."""
        statement = (
            sa.select(tables.fills)
            .where(tables.fills.c.instance_id == instance_id, tables.fills.c.order_id == order_id)
            .order_by(tables.fills.c.time, tables.fills.c.fill_id)
        )
        rows = self._database.read(lambda connection: connection.execute(statement).all())
        return [fill_of(row) for row in rows if row.qty != "0"]

    def _one(self, statement: sa.Select[Any], **values: Any) -> JournalOrder | None:
        rows = self._many(statement, **values)
        return rows[0] if rows else None

    def _many(self, statement: sa.Select[Any], **values: Any) -> list[JournalOrder]:
        rows = self._database.read(lambda connection: connection.execute(statement, values).all())
        return [as_read(row) for row in rows]
