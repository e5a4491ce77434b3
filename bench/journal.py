"""What a long memory costs: placing and looking up with a thousand orders in the journal and with a
million, in one run (`python -m bench.journal`)."""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from httptrading.brokers.journal import Journal
from httptrading.brokers.journal_rows import OrderRequest, Outcome
from httptrading.brokers.journal_tables import PLACED
from httptrading.model import (
    Contract,
    Lifecycle,
    Order,
    OrderReport,
    OrderType,
    TimeInForce,
    TradeType,
)

FEW, MANY = 1_000, 1_000_000
TIMES = 300
WARM_UP = 30

_ID = "benchJournal00001"
_REQUEST = OrderRequest(
    Contract(TradeType.Securities, "AAPL", "US"),
    OrderType.Limit,
    TimeInForce.DAY,
    Lifecycle.RTH,
    "BUY",
    10,
    Decimal("200.01"),
)

# Copies the row that is there: key, mark, order id and time differ, as among real orders.
_FILL = """
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count})
INSERT INTO orders ({columns}) SELECT {values} FROM orders, numbers
"""
_DIFFERENT = {
    "id": "orders.id + n",
    "client_order_id": "'filled-' || n",
    "mark": "'filled-' || n",
    "order_id": "'filled-' || n",
    "created": "created - {count} + n",
    "is_open": "n % 100 = 0",
}


def filled_journal(path: Path, count: int) -> Journal:
    """A journal with so many placed orders, one in a hundred of them still open."""
    journal = Journal(f"sqlite:///{path}")
    row_id, _ = journal.begin(_ID, "first", 1, _REQUEST).result()
    journal.settle(row_id, Outcome(PLACED, order_id="first")).result()
    with closing(sqlite3.connect(path)) as database, database:
        columns = [row[1] for row in database.execute("PRAGMA table_info(orders)")]
        values = ", ".join(_DIFFERENT.get(name, name).format(count=count) for name in columns)
        database.execute(_FILL.format(count=count - 1, columns=", ".join(columns), values=values))
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return journal


def _operations(journal: Journal, count: int) -> dict[str, Callable[[int], object]]:
    """Each is given the number of its turn."""

    def middle(turn: int) -> str:
        return f"filled-{(turn * 7919) % (count - 1) + 1}"

    def place(turn: int) -> None:
        """The three journal accesses of one order/place."""
        key = f"new-{turn}"
        assert journal.by_client_order_id(_ID, key) is None
        row_id, _ = journal.begin(_ID, key, 1, _REQUEST).result()
        journal.settle(row_id, Outcome(PLACED, order_id=key), soon=True).result()

    def push(turn: int) -> None:
        order = Order(f"new-{turn}", "USD", 10, 5, 200.5)
        journal.record(_ID, [OrderReport(order)])
        (row,) = journal.joined(_ID, [OrderReport(order)])
        assert row.client_order_id == f"new-{turn}"

    def same_push(turn: int) -> None:
        journal.record(_ID, [OrderReport(Order("new-1", "USD", 10, 5, 200.5))])

    yesterday = datetime.now(UTC) - timedelta(days=1)
    return {
        "place": place,
        "push with news": push,
        "push without news": same_push,
        "replay (by clientOrderId)": lambda turn: journal.by_client_order_id(_ID, middle(turn)),
        "order/state (by orderId)": lambda turn: journal.by_order_id(_ID, middle(turn)),
        "order/list (newest 100)": lambda turn: journal.orders(
            _ID, open_=None, since=None, limit=100
        ),
        "order/list (open, 1 day)": lambda turn: journal.orders(
            _ID, open_=True, since=yesterday, limit=100
        ),
        "order/fills": lambda turn: journal.fills(_ID, middle(turn)),
        "settlement's question": lambda turn: journal.unsettled(_ID),
    }


def measure(few: int = FEW, many: int = MANY) -> list[tuple[str, float, float]]:
    """(operation, median seconds with few rows, median seconds with many), taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        with (
            closing(filled_journal(Path(folder, "few.sqlite"), few)) as small,
            closing(filled_journal(Path(folder, "many.sqlite"), many)) as large,
        ):
            return list(_compare(_operations(small, few), _operations(large, many)))


def _compare(
    few: dict[str, Callable[[int], object]], many: dict[str, Callable[[int], object]]
) -> Iterator[tuple[str, float, float]]:
    for name, operation in few.items():
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(1, WARM_UP + TIMES):
            for run, taken in zip((operation, many[name]), times, strict=True):
                began = time.perf_counter()
                run(turn)
                taken.append(time.perf_counter() - began)
        yield name, statistics.median(times[0][WARM_UP:]), statistics.median(times[1][WARM_UP:])


def main() -> None:
    print(f"{'':28}{FEW:>12,} {MANY:>12,} rows   ratio")
    for name, few, many in measure():
        print(f"{name:28}{few * 1e6:>10.0f}us {many * 1e6:>10.0f}us      {many / few:6.2f}")


if __name__ == "__main__":
    main()
