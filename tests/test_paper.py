"""The paper broker without a gateway: its exchange, its market, and the adapter on a bare loop."""

from __future__ import annotations

import _sqlite3
import asyncio
import ctypes
import errno
import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, date, datetime
from datetime import time as clock_time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from httptrading.brokers.paper import Paper
from httptrading.brokers.paper_exchange import (
    FEES,
    NO_FEES,
    Fee,
    PaperExchange,
    PaperOrder,
    Status,
)
from httptrading.brokers.paper_market import (
    AlwaysOpen,
    ExchangeHours,
    MadeUpPrices,
    book_side,
    day_prices,
    epoch_of,
    local_time,
    made_up_price,
    on_step,
    price_step,
    session,
)
from httptrading.errors import BrokerUnavailable, Busy, OrderNotFound, Rejected, Unsupported
from httptrading.model import (
    Contract,
    Fill,
    Lifecycle,
    OrderReport,
    OrderType,
    Quote,
    TimeInForce,
    TradeType,
    UnifiedStatus,
)

MONDAY = datetime(2026, 3, 2, 15, 0, tzinfo=UTC).timestamp()  # 10:00 in New York
CASH = {"USD": Decimal(100000), "HKD": Decimal(800000), "CNY": Decimal(700000)}


class Tape:
    """Prices that a test sets, and a clock that it moves."""

    def __init__(self) -> None:
        self.now = MONDAY
        self.price: Decimal | None = Decimal(100)

    def latest(self, region: str, ticker: str, epoch: float) -> Decimal | None:
        return self.price

    def moments(self, since: float, now: float, most: int) -> list[float]:
        return [now]


class Desk:
    """A trader at a paper exchange with a tape."""

    def __init__(self, path: Path, hours: Any = None, fees: Any = NO_FEES) -> None:
        self.tape = Tape()
        self.path = path
        self.hours = hours or AlwaysOpen()
        self.fees = fees
        self.exchange = self.open()

    def open(self) -> PaperExchange:
        return PaperExchange(
            self.path, CASH, self.tape, self.hours, self.fees, lambda: self.tape.now
        )

    def reopen(self) -> None:
        self.exchange.close()
        self.exchange = self.open()

    def place(
        self,
        direction: str = "BUY",
        qty: int = 10,
        price: str | None = None,
        *,
        region: str = "US",
        ticker: str = "AAPL",
        tif: TimeInForce = TimeInForce.DAY,
        lifecycle: Lifecycle = Lifecycle.RTH,
        mark: str = "",
    ) -> PaperOrder:
        return self.exchange.place(
            region,
            ticker,
            direction,
            OrderType.Market if price is None else OrderType.Limit,
            qty,
            None if price is None else Decimal(price),
            tif,
            lifecycle,
            mark,
        )

    def later(self, seconds: float, price: str | None = None) -> None:
        self.tape.now += seconds
        if price is not None:
            self.tape.price = Decimal(price)
        self.exchange.advance()

    def order(self, order: PaperOrder) -> PaperOrder:
        return self.exchange.order(order.order_id)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "paper.sqlite")
    yield desk
    desk.exchange.close()


# --- orders ---------------------------------------------------------------------------------
def test_a_market_order_pays_the_ask_and_shows_in_cash_and_holdings(desk: Desk) -> None:
    order = desk.place(qty=10)
    assert (order.status, order.filled) == (Status.FILLED, 10)
    assert order.avg_price == Decimal("100.01") == book_side("US", "AAPL", "BUY", Decimal(100))
    assert desk.exchange.spendable("USD") == Decimal(100000) - 10 * Decimal("100.01")
    assert desk.exchange.spendable("HKD") == Decimal(800000)
    (held,) = desk.exchange.holdings()
    assert (held.ticker, held.qty, held.cost) == ("AAPL", Decimal(10), Decimal("100.01"))
    assert [fill.qty for fill in desk.exchange.fills(order.order_id)] == [10]


def test_a_limit_order_waits_for_its_price_or_better(desk: Desk) -> None:
    order = desk.place(qty=10, price="90")
    assert order.status is Status.WORKING
    assert desk.exchange.spendable("USD") == 100000 - 900, "set aside while it works"
    desk.later(5, "90.01")
    assert desk.order(order).filled == 0
    desk.later(5, "89")
    found = desk.order(order)
    assert (found.status, found.avg_price) == (Status.FILLED, Decimal("89.01"))
    assert desk.exchange.spendable("USD") == 100000 - 10 * Decimal("89.01")


def test_a_large_order_fills_in_parts(desk: Desk) -> None:
    order = desk.place(qty=900)
    seen = [order.filled]
    assert 100 <= seen[0] < 900, "one slice of the book offers 100 to 999 shares"
    assert desk.exchange.order(order.order_id).filled == seen[0], "the offer is taken"
    for _ in range(10):
        desk.later(1)
        seen.append(desk.order(order).filled)
    assert seen == sorted(seen) and seen[-1] == 900
    assert sum(fill.qty for fill in desk.exchange.fills(order.order_id)) == 900


def test_two_orders_share_the_book(desk: Desk) -> None:
    first, second = desk.place(qty=900), desk.place(qty=5)
    assert first.filled < 900 and second.filled == 0
    while desk.order(first).status is Status.WORKING:
        desk.later(1)
    desk.later(1)
    assert desk.order(second).filled == 5


def test_the_average_is_that_of_all_fills(desk: Desk) -> None:
    order = desk.place(qty=9, price="50")
    for qty, price in ((5, "49.99"), (4, "50")):
        desk.exchange.execute(order.order_id, qty, Decimal(price))
    assert desk.order(order).avg_price == Decimal("49.99444444")
    assert desk.order(order).status is Status.FILLED


def test_cancelling_keeps_what_was_filled_and_frees_the_rest(desk: Desk) -> None:
    order = desk.place(qty=10, price="50")
    desk.exchange.execute(order.order_id, 4, Decimal(50))
    found = desk.exchange.cancel(order.order_id)
    assert (found.status, found.filled) == (Status.CANCELED, 4)
    assert desk.exchange.spendable("USD") == 100000 - 200
    with pytest.raises(Rejected, match="it is canceled"):
        desk.exchange.cancel(order.order_id)
    filled = desk.place(qty=1)
    with pytest.raises(Rejected, match="it is filled"):
        desk.exchange.cancel(filled.order_id)


@pytest.mark.parametrize("order_id", ["1", "", "x", "１２", "1_0", " 1", "9" * 40, "-1"])
def test_unknown_orders(desk: Desk, order_id: str) -> None:
    for ask in (desk.exchange.order, desk.exchange.cancel, desk.exchange.fills):
        with pytest.raises(OrderNotFound):
            ask(order_id)


# --- refusals -------------------------------------------------------------------------------
def test_buying_power(desk: Desk) -> None:
    with pytest.raises(Rejected, match=r"needs up to 100,100\.00 USD .* 100,000\.00 can be spent"):
        desk.place(qty=1001, price="100")
    desk.place(qty=600, price="90")
    with pytest.raises(Rejected, match="46,000.00 can be spent"):
        desk.place(qty=506, price="91")
    assert desk.place(qty=100, price="300", region="HK", ticker="00700").currency == "HKD"


def test_no_short_sales(desk: Desk) -> None:
    with pytest.raises(Rejected, match="0 AAPL held"):
        desk.place("SELL", 1)
    desk.place(qty=10)
    desk.place("SELL", 6, "200")
    with pytest.raises(Rejected, match="10 AAPL held, 6 of them in open sell orders"):
        desk.place("SELL", 5)
    sold = desk.place("SELL", 4)
    assert sold.status is Status.FILLED or sold.filled < 4
    desk.later(30)
    assert [held.qty for held in desk.exchange.holdings()] == [6]


def test_price_steps(desk: Desk) -> None:
    with pytest.raises(Rejected, match=r"12\.345 is not a multiple of 0\.01"):
        desk.place(price="12.345")
    assert desk.place(price="0.1234").price == Decimal("0.1234")
    with pytest.raises(Rejected, match=r"multiple of 0\.2,"):
        desk.place(price="400.1", region="HK", ticker="00700")


def test_a_refused_order_leaves_nothing(desk: Desk) -> None:
    with pytest.raises(Rejected):
        desk.place(qty=10**6)
    assert desk.exchange.orders(0) == []
    assert desk.exchange.spendable("USD") == 100000


def test_a_market_buy_that_runs_out_of_money_says_so(desk: Desk) -> None:
    order = desk.place(qty=970)
    assert 0 < order.filled < 970
    for _ in range(20):
        desk.later(1, "300")
    found = desk.order(order)
    assert (found.status, found.reason) == (
        Status.REJECTED,
        "Not enough USD for the rest of the order.",
    )
    assert order.filled <= found.filled < 970
    assert 0 <= desk.exchange.spendable("USD") < 301


def test_without_a_price(desk: Desk) -> None:
    desk.tape.price = None
    with pytest.raises(Rejected, match="There is no price"):
        desk.place()
    order = desk.place(price="100")
    assert order.status is Status.WORKING
    desk.later(1, "99")
    assert desk.order(order).filled > 0


# --- fees -------------------------------------------------------------------------------------
def test_fees_are_per_order_and_never_more_than_a_sale_brings(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "paper.sqlite", fees=FEES)
    order = desk.place(qty=400, price="50")
    assert desk.exchange.spendable("USD") == 100000 - 20000 - 2
    for qty in (100, 100, 200):
        desk.exchange.execute(order.order_id, qty, Decimal(50))
    assert desk.order(order).fees == 2, "0.005 a share, at least 1"
    assert desk.exchange.spendable("USD") == 100000 - 20002
    desk.later(1, "0.5")
    sale = desk.place("SELL", 1)
    assert sale.fees == sale.value < 1
    assert Fee(of_value=Decimal("0.0003"), minimum=Decimal(5)).total(100, Decimal("33333.3")) == 10
    desk.exchange.close()


# --- time ---------------------------------------------------------------------------------------
def test_a_day_order_ends_with_its_day_and_gtc_does_not(desk: Desk) -> None:
    day = desk.place(qty=10, price="50")
    gtc = desk.place(qty=10, price="50", tif=TimeInForce.GTC)
    desk.exchange.execute(day.order_id, 4, Decimal(50))
    desk.later(14 * 3600 - 1)  # 23:59:59 in New York
    assert desk.order(day).status is Status.WORKING
    desk.later(1)
    found = desk.order(day)
    assert (found.status, found.filled, found.reason) == (
        Status.EXPIRED,
        4,
        "The order's day has ended.",
    )
    assert desk.order(gtc).status is Status.WORKING
    assert desk.exchange.spendable("USD") == 100000 - 200 - 500


def test_real_hours(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "paper.sqlite", ExchangeHours())
    assert desk.place(qty=1).status is Status.FILLED  # 10:00
    desk.later(7 * 3600)  # 17:00
    market = desk.place(qty=1)
    early = desk.place(qty=1, price="101", lifecycle=Lifecycle.ETH)
    night = desk.place(qty=1, price="101", lifecycle=Lifecycle.OVERNIGHT)
    states = [desk.order(order).status.name for order in (market, early, night)]
    assert states == ["WORKING", "FILLED", "WORKING"]
    desk.later(4 * 3600)  # 21:00
    states = [desk.order(order).status.name for order in (market, night)]
    assert states == ["WORKING", "FILLED"]
    desk.later(12.6 * 3600)  # 9:36 on Tuesday
    assert desk.order(market).status is Status.FILLED
    resting = desk.place(qty=1, price="50")
    desk.later(6.4 * 3600)  # 16:00
    assert desk.order(resting).status is Status.EXPIRED
    desk.exchange.close()


def test_what_was_missed_is_made_up_for(tmp_path: Path) -> None:
    """Down for hours: what the made-up prices would have filled meanwhile is filled, at its time,
    and an order whose day ended first is expired, not filled."""
    now = MONDAY
    exchange = PaperExchange(
        tmp_path / "paper.sqlite", CASH, MadeUpPrices(), AlwaysOpen(), NO_FEES, lambda: now
    )
    start = made_up_price("US", "QQQ", now)
    path = [made_up_price("US", "QQQ", now + 60 * step) for step in range(0, 24 * 60)]
    low = min(path)
    reach = on_step("US", "QQQ", (start + low) / 2) if low < start - 1 else start - 1

    def place(price: Decimal) -> PaperOrder:
        limit, day = OrderType.Limit, TimeInForce.DAY
        return exchange.place("US", "QQQ", "BUY", limit, 10, price, day, Lifecycle.RTH, "")

    far, near = place(Decimal("1")), place(reach)
    now += 3 * 86400
    assert exchange.order(far.order_id).status is Status.EXPIRED
    found = exchange.order(near.order_id)
    assert found.updated < now - 86400, "it ended in its own time"
    assert found.status in (Status.FILLED, Status.EXPIRED)
    assert found.status is Status.EXPIRED or found.avg_price <= reach
    exchange.close()


# --- durability -----------------------------------------------------------------------------
def test_everything_survives(desk: Desk) -> None:
    filled, resting = desk.place(qty=10), desk.place(qty=10, price="50", mark="m-1")
    before = (
        desk.exchange.orders(0),
        desk.exchange.holdings(),
        desk.exchange.spendable("USD"),
        desk.exchange.fills(filled.order_id),
    )
    desk.reopen()
    assert before == (
        desk.exchange.orders(0),
        desk.exchange.holdings(),
        desk.exchange.spendable("USD"),
        desk.exchange.fills(filled.order_id),
    )
    assert desk.order(resting).mark == "m-1"
    assert int(desk.place(price="50").order_id) > int(resting.order_id)
    assert {order.order_id for order in desk.exchange.orders(desk.tape.now + 9)} == {
        order.order_id for order in desk.exchange.orders(0) if order.status is Status.WORKING
    }


def test_the_file_is_wal_with_full_sync_and_decimals_are_text(desk: Desk) -> None:
    desk.place(qty=3, price="0.1234")
    with sqlite3.connect(desk.path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert db.execute("SELECT price FROM paper_order").fetchone() == ("0.1234",)
    db.close()
    with desk.exchange._transaction() as inside:
        assert inside.exec_driver_sql("PRAGMA synchronous").scalar() == 2


CRASHER = """
import sys
from decimal import Decimal
from pathlib import Path
from httptrading.brokers.paper_exchange import *
from httptrading.brokers.paper_market import *
import time
exchange = PaperExchange(
    Path(sys.argv[1]), {"USD": Decimal(10**9)}, MadeUpPrices(), AlwaysOpen(), FEES, time.time
)
while True:
    order = exchange.place(
        "US", "AAPL", "BUY", OrderType.Limit, 1, Decimal(1), TimeInForce.GTC, Lifecycle.RTH, ""
    )
    print(order.order_id, flush=True)
"""


def test_a_killed_process_loses_no_order_it_has_told_of(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CRASHER, str(tmp_path / "paper.sqlite")],
        stdout=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert child.stdout is not None
    with child.stdout:
        told = [next(child.stdout).strip() for _ in range(20)]
        child.kill()
        told += [line.strip() for line in child.stdout if line.endswith("\n")]
    child.wait()
    desk = Desk(tmp_path / "paper.sqlite")
    known = {order.order_id for order in desk.exchange.orders(0)}
    assert set(told) <= known and len(known) <= len(told) + 1
    assert desk.exchange.spendable("USD") == 10**9 - 2 * len(known), "1 and the least fee each"
    desk.exchange.close()


def test_a_file_that_cannot_be_written_refuses_orders_and_still_reads(desk: Desk) -> None:
    order = desk.place(price="50")
    with desk.exchange._transaction() as db:
        pages = db.exec_driver_sql("PRAGMA page_count").scalar()
        db.exec_driver_sql(f"PRAGMA max_page_count = {pages}")  # as if the disk were full
    with pytest.raises(BrokerUnavailable, match="nothing was changed"):
        for _ in range(1000):
            desk.place(price="50", mark="x" * 1000)
    assert desk.order(order).status is Status.WORKING
    assert all(known.mark in ("", "x" * 1000) for known in desk.exchange.orders(0))


class _Vfs(ctypes.Structure):
    """SQLite's way to the disk, as far as its `xSetSystemCall` (sqlite.org/c3ref/vfs.html)."""

    _fields_ = (
        [(name, ctypes.c_int) for name in ("version", "file_size", "longest_path")]
        + [(f"field_{number}", ctypes.c_void_p) for number in range(16)]
        + [
            (
                "set_system_call",
                ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p),
            )
        ]
    )


@contextmanager
def a_commit_fails_late() -> Iterator[None]:
    """The disk reports an error for the last write of a commit, although it has kept it: what a
    failing fsync leaves as well."""
    # The library that Python's own module is linked with; None: Python itself.
    sqlite = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    sqlite.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
    vfs = sqlite.sqlite3_vfs_find(None)
    commits = False

    def pwrite(file: int, address: int, size: int, offset: int) -> int:
        nonlocal commits
        data = ctypes.string_at(address, size)
        os.pwrite(file, data, offset)
        if commits:
            commits = False
            ctypes.set_errno(errno.EIO)
            return -1
        # A frame's header tells the size of the database if it is the last of its transaction
        # (sqlite.org/fileformat2.html, 4.1).
        commits = size == 24 and data[4:8] != bytes(4)
        return size

    kind = ctypes.CFUNCTYPE(
        ctypes.c_ssize_t,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int64,
        use_errno=True,
    )
    failing = kind(pwrite)
    for name in (b"pwrite64", b"pwrite"):
        vfs.contents.set_system_call(vfs, name, ctypes.cast(failing, ctypes.c_void_p))
    try:
        yield
    finally:
        for name in (b"pwrite64", b"pwrite"):
            vfs.contents.set_system_call(vfs, name, None)


@pytest.mark.skipif(sys.platform != "linux", reason="another SQLite, perhaps without the way in")
def test_after_a_failed_commit_a_crash_brings_nothing_back(desk: Desk, tmp_path: Path) -> None:
    """SQLite finds a whole transaction in its log when it opens the file, although the one that
    wrote it was told that it failed and has not shown it since."""
    desk.place(price="50")
    with a_commit_fails_late(), pytest.raises(sa.exc.OperationalError, match="disk I/O error"):
        desk.place(price="60", mark="failed")
    shown = [order.mark for order in desk.exchange.orders(0)]
    crashed = tmp_path / "crashed.sqlite"
    for ending in ("", "-wal"):
        if (left := Path(f"{desk.path}{ending}")).exists():
            shutil.copy(left, f"{crashed}{ending}")
    restarted = Desk(crashed)
    assert [order.mark for order in restarted.exchange.orders(0)] == shown
    restarted.exchange.close()


def test_a_file_of_another_version_is_left_alone(desk: Desk) -> None:
    with desk.exchange._transaction() as db:
        db.exec_driver_sql("UPDATE paper_note SET value = 2 WHERE name = 'version'")
    with pytest.raises(BrokerUnavailable, match="is of version 2, this program wants 1"):
        desk.reopen()


def test_another_writer_is_seen(desk: Desk) -> None:
    """A second object on the same file: its fills come up in the first one's changes."""
    order = desk.place(price="50")
    desk.exchange.changes()
    other = desk.open()
    other.execute(order.order_id, 4, Decimal(50))
    other.close()
    changes = desk.exchange.changes()
    assert [one.filled for one in changes.orders] == [4]
    assert [one.qty for one in changes.fills] == [4]
    assert desk.exchange.changes().orders == []


# --- invariants -----------------------------------------------------------------------------
STEPS = st.one_of(
    st.tuples(
        st.just("place"),
        st.sampled_from(["BUY", "SELL"]),
        st.integers(1, 1500),
        st.none() | st.integers(9000, 11000),
    ),
    st.tuples(st.just("time"), st.integers(0, 5), st.integers(9000, 11000)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("reopen")),
)
_files = itertools.count()


@settings(
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@example(
    # A part is filled so far above the price at the time of the order that the rest costs too much.
    steps=[
        ("time", 0, 9000),
        ("place", "BUY", 112, None),
        ("place", "BUY", 888, None),
        ("cancel", 0),
        ("time", 4, 10875),
    ]
)
@given(steps=st.lists(STEPS, min_size=5, max_size=25))
def test_money_and_shares_are_conserved(tmp_path: Path, steps: list[Any]) -> None:
    desk = Desk(tmp_path / f"{next(_files)}.sqlite", fees=FEES)
    placed: list[PaperOrder] = []
    filled: dict[str, int] = {}
    for step in steps:
        try:
            match step:
                case ("place", direction, qty, cents):
                    price = None if cents is None else str(Decimal(cents) / 100)
                    placed.append(desk.place(direction, qty, price))
                case ("time", seconds, cents):
                    desk.later(seconds, str(Decimal(cents) / 100))
                case ("cancel", index) if index < len(placed):
                    desk.exchange.cancel(placed[index].order_id)
                case ("reopen",):
                    desk.reopen()
        except Rejected:
            pass
        orders = [desk.order(order) for order in placed]
        paid, shares = Decimal(0), 0
        for order in orders:
            fills = desk.exchange.fills(order.order_id)
            assert sum(fill.qty for fill in fills) == order.filled <= order.qty
            assert sum((fill.qty * fill.price for fill in fills), Decimal(0)) == order.value
            assert order.filled >= filled.get(order.order_id, 0), "never backwards"
            filled[order.order_id] = order.filled
            buys = order.direction == "BUY"
            for fill in fills:
                if order.price is not None:
                    assert fill.price <= order.price if buys else fill.price >= order.price
            paid += order.value + order.fees if buys else order.fees - order.value
            shares += order.filled if buys else -order.filled
        with desk.exchange._transaction() as db:
            amount, reserved = (
                Decimal(text)
                for text in db.exec_driver_sql(
                    "SELECT amount, reserved FROM paper_cash WHERE currency = 'USD'"
                ).one()
            )
        assert amount == 100000 - paid
        assert reserved == sum((order.reserved for order in orders), Decimal(0))
        assert 0 <= reserved <= amount
        assert [held.qty for held in desk.exchange.holdings()] == ([shares] if shares else [])
        assert shares >= 0
    desk.exchange.close()


# --- the market -----------------------------------------------------------------------------
@given(
    st.sampled_from([("US", "AAPL"), ("US", "ZZZZ"), ("HK", "00700"), ("CN", "000001")]),
    st.floats(1.6e9, 2.5e9),
)
def test_prices_are_plausible_on_their_step_and_always_the_same(
    place: tuple[str, str], epoch: float
) -> None:
    price = made_up_price(*place, epoch)
    assert price > 0 and price == made_up_price(*place, epoch)
    assert price % price_step(*place, price) == 0
    bid, ask = (book_side(*place, side, price) for side in ("SELL", "BUY"))
    assert bid < price < ask < price * Decimal("1.01")
    day = day_prices(*place, epoch)
    assert day.low_price <= min(price, day.open_price)
    assert day.high_price >= max(price, day.open_price)
    assert abs(day.pre_close / price - 1) < Decimal("0.3")


def test_prices_are_lively() -> None:
    prices = {made_up_price("US", "AAPL", MONDAY + second) for second in range(120)}
    assert len(prices) > 20
    assert 150 < min(prices) and max(prices) < 320


@pytest.mark.parametrize(
    ("region", "utc", "status"),
    [
        ("US", "2026-03-06 14:29", "PRE_HOURS"),  # Friday, winter time
        ("US", "2026-03-06 14:30", "RTH"),
        ("US", "2026-03-06 21:00", "AFTER_HOURS"),
        ("US", "2026-03-07 01:00", "CLOSED"),  # Friday evening leads to no trading day
        ("US", "2026-03-09 00:00", "OVERNIGHT"),  # Sunday 20:00, summer time since that morning
        ("US", "2026-03-09 13:30", "RTH"),
        ("US", "2026-03-09 07:59", "OVERNIGHT"),
        ("US", "2026-03-09 08:00", "PRE_HOURS"),
        ("US", "2026-11-02 14:29", "PRE_HOURS"),  # winter time again
        ("HK", "2026-03-09 01:29", "CLOSED"),
        ("HK", "2026-03-09 01:30", "RTH"),
        ("HK", "2026-03-09 04:30", "REST"),
        ("HK", "2026-03-09 08:00", "CLOSED"),
        ("CN", "2026-03-09 03:30", "REST"),
        ("CN", "2026-03-09 06:59", "RTH"),
        ("CN", "2026-03-08 03:00", "CLOSED"),
    ],
)
def test_sessions(region: str, utc: str, status: str) -> None:
    epoch = datetime.fromisoformat(utc).replace(tzinfo=UTC).timestamp()
    assert session(region, epoch) is UnifiedStatus[status]


@given(
    st.sampled_from(["US", "HK", "CN"]), st.datetimes(datetime(2010, 1, 1), datetime(2060, 1, 1))
)
def test_local_time_there_and_back(region: str, moment: datetime) -> None:
    epoch = moment.replace(tzinfo=UTC, microsecond=0).timestamp()
    here = local_time(region, epoch)
    back = epoch_of(region, here.date(), here.time())
    assert back == epoch or abs(back - epoch) == 3600  # the doubled hour in autumn


def test_the_end_of_the_day() -> None:
    hours = ExchangeHours()
    friday = datetime(2026, 3, 6, 21, 0, tzinfo=UTC).timestamp()  # 16:00, the close
    assert hours.day_end("US", Lifecycle.RTH, friday) == epoch_of(
        "US", date(2026, 3, 9), clock_time(16)
    )
    assert hours.day_end("US", Lifecycle.ETH, friday) == friday + 4 * 3600
    assert hours.day_end("US", Lifecycle.OVERNIGHT, friday) == epoch_of(
        "US", date(2026, 3, 9), clock_time(4)
    )
    assert AlwaysOpen().day_end("HK", Lifecycle.RTH, friday) == epoch_of(
        "HK", date(2026, 3, 8), clock_time(0)
    )


# --- the adapter ----------------------------------------------------------------------------
class Told:
    """A link that keeps what the broker tells, and gives another instance's quotes."""

    def __init__(self) -> None:
        self.reports: list[OrderReport] = []
        self.fills: list[Fill] = []
        self.stales = 0
        self.quote: Quote | BrokerUnavailable = BrokerUnavailable("down")
        self.news = asyncio.Event()

    def report(self, reports: Any) -> None:
        self.reports += reports
        self.news.set()

    def fill(self, fills: Any) -> None:
        self.fills += fills

    def stale(self) -> None:
        self.stales += 1

    def lost(self, reason: str) -> None:
        raise AssertionError(reason)

    def restored(self) -> None:
        raise AssertionError

    def take(self, window: str) -> None:
        raise AssertionError

    def quote_of(self, instance_id: str, contract: Contract) -> Quote:
        assert instance_id == "TheOtherInstance1"
        if isinstance(self.quote, BrokerUnavailable):
            raise self.quote
        return self.quote


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await test

    asyncio.run(bounded())


async def connected(tmp_path: Path, **broker_args: Any) -> tuple[Paper, Told]:
    paper, told = Paper(broker_args, "PaperInstance0001"), Told()
    paper.data_dir, paper._link = tmp_path / "new", told
    await paper.connect()
    return paper, told


AAPL = Contract(TradeType.Securities, "AAPL", "US")
LIMIT = (AAPL, OrderType.Limit, TimeInForce.DAY, Lifecycle.ETH)
MARKET = (AAPL, OrderType.Market, TimeInForce.DAY, Lifecycle.RTH)


def test_the_adapter_from_order_to_cash(tmp_path: Path) -> None:
    async def test() -> None:
        paper, told = await connected(tmp_path)
        assert await paper.ping()
        order_id = await paper.place_order(*MARKET, "BUY", 12, mark="mark-1", client_order_id="c")
        report = await paper.order(order_id)
        assert report.order.is_filled and report.mark == "mark-1" and report.contract == AAPL
        assert report.time is not None and report.time.tzinfo is not None
        assert told.reports[-1] == report and told.stales
        assert [fill.qty for fill in told.fills] == [
            fill.qty for fill in await paper.fills(order_id)
        ]
        (position,) = await paper.positions()
        assert (position.broker, position.broker_display) == ("paper", "模拟交易")
        assert (position.contract, position.qty, position.currency) == (AAPL, 12, "USD")
        fee = Decimal(1)
        spent = 12 * Decimal(str(report.order.avg_price)) + fee
        assert (await paper.cash()).amount == 100000 - spent
        assert (await paper.cash("HKD")).amount == 800000
        resting = await paper.place_order(*LIMIT, "BUY", 1, 1.15)
        assert (await paper.order(resting)).price == Decimal("1.15")
        assert {one.order.order_id for one in await paper.recent_orders()} == {order_id, resting}
        await paper.cancel_order(resting)
        assert told.reports[-1].order.is_canceled
        quote = await paper.quote(AAPL)
        assert quote.low_price <= quote.latest <= quote.high_price and quote.is_tradable
        states = (await paper.market_status())["securities"]
        assert set(states) == {"US", "HK", "CN"}
        assert "ALWAYS_OPEN" in states["US"].origin_status
        await paper.close()
        assert not await paper.ping()

    run(test())


def test_a_resting_order_is_filled_and_told_of_while_nobody_asks(tmp_path: Path) -> None:
    async def test() -> None:
        paper, told = await connected(tmp_path, cash={"USD": 10**6})  # whatever the price is now
        large = await paper.place_order(*MARKET, "BUY", 400)
        while True:
            done = [report for report in told.reports if report.order.order_id == large]
            if done[-1].order.is_filled:
                break
            told.news.clear()
            await told.news.wait()
        assert sum(Decimal(str(fill.qty)) for fill in told.fills) == 400
        await paper.close()

    run(test())


def test_prices_of_another_instance(tmp_path: Path) -> None:
    async def test() -> None:
        paper, told = await connected(tmp_path, quotes_from="TheOtherInstance1", fees=False)
        borrowed = paper._borrowed
        assert borrowed is not None
        with pytest.raises(Rejected, match="There is no price"):
            await paper.place_order(*MARKET, "BUY", 10)
        with pytest.raises(Busy, match="another instance, which has none now: down"):
            await paper.quote(AAPL)
        resting = await paper.place_order(*LIMIT, "BUY", 10, 80.0)
        assert not (await paper.order(resting)).order.is_completed

        async def quoted(is_tradable: bool) -> None:
            while borrowed._waiting:  # an answer on its way would be the old one
                await asyncio.sleep(0.01)
            borrowed._known.clear()
            now = datetime.now(UTC)
            told.quote = Quote(AAPL, "USD", is_tradable, 77.5, 77, 77, 78, 76, now)

        await quoted(True)
        assert await paper.quote(AAPL) == told.quote
        order_id = await paper.place_order(*MARKET, "BUY", 10)
        assert (await paper.order(order_id)).order.avg_price == Decimal("77.51")
        while not (await paper.order(resting)).order.is_filled:
            told.news.clear()
            await told.news.wait()
        assert (await paper.order(resting)).order.avg_price == Decimal("77.51")
        await quoted(False)
        with pytest.raises(Rejected, match="There is no price"):
            await paper.place_order(*MARKET, "BUY", 10)
        await paper.close()

    run(test())


def test_a_silent_source_holds_nothing_up(tmp_path: Path) -> None:
    async def test() -> None:
        paper, told = await connected(tmp_path, quotes_from="TheOtherInstance1", fees=False)
        release = threading.Event()
        told.quote_of = lambda *_: release.wait(300)  # type: ignore[method-assign,assignment]
        resting = await paper.place_order(*LIMIT, "BUY", 10, 80.0)
        with pytest.raises(Rejected, match="There is no price"):
            await paper.place_order(*MARKET, "BUY", 10)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await paper.quote(AAPL)
        await paper.cancel_order(resting)
        assert (await paper.order(resting)).order.is_canceled
        await paper.close()
        release.set()

    run(test())


def test_arguments() -> None:
    for wrong, words in (
        ({"cahs": {}}, "no argument 'cahs'"),
        ({"hours": "sometimes"}, "hours must be"),
        ({"cash": 5}, "cash must be a table"),
        ({"cash": {"EUR": 5}}, "no currency 'EUR'"),
        ({"cash": {"USD": "many"}}, "must be a number"),
        ({"cash": {"USD": "5"}}, "must be a number"),
        ({"cash": {"USD": True}}, "must be a number"),
        ({"cash": {"USD": -1}}, "0 or more"),
        ({"cash": {"USD": float("nan")}}, "0 or more"),
        ({"fees": "no"}, "fees must be true or false"),
        ({"fees": 0}, "fees must be true or false"),
        ({"hours": ["always"]}, "hours must be"),
        ({"quotes_from": "PaperInstance0001"}, "another instance"),
        ({"quotes_from": ""}, "another instance"),
        ({"quotes_from": 5}, "another instance"),
    ):
        with pytest.raises(ValueError, match=words):
            Paper(wrong, "PaperInstance0001")
    assert Paper({"cash": {"USD": 5.5}})._initial_cash == {
        "USD": Decimal("5.5"),
        "HKD": 0,
        "CNY": 0,
    }


def test_an_unusable_directory_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("a file")

    async def test() -> None:
        with pytest.raises(BrokerUnavailable, match="cannot be made"):
            await connected(tmp_path)

    run(test())


def test_what_it_takes() -> None:
    paper = Paper()
    hong_kong = Contract(TradeType.Securities, "00700", "HK")
    with pytest.raises(Unsupported, match="HK Limit DAY RTH"):
        paper.check_order(
            hong_kong, OrderType.Limit, TimeInForce.DAY, Lifecycle.ETH, "BUY", 100, 400.0
        )
    with pytest.raises(Unsupported):
        paper.check_order(AAPL, OrderType.Market, TimeInForce.GTC, Lifecycle.RTH, "BUY", 1, None)
    paper.check_order(AAPL, OrderType.Limit, TimeInForce.GTC, Lifecycle.OVERNIGHT, "BUY", 1, 1.0)


def test_importing_it_is_light() -> None:
    program = "import sys, httptrading.brokers.paper; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "httptrading.brokers.paper" in loaded
    assert not loaded & {"pandas", "numpy", "futu", "ib_insync", "longport", "tigeropen"}


def test_reads_are_quick_with_many_orders(tmp_path: Path) -> None:
    """Many resting orders do not make a place or a look-up slow: the processor's time is measured,
    neither the disk's nor that of others (bounds are generous)."""
    desk = Desk(tmp_path / "paper.sqlite")
    for _ in range(300):
        desk.place(qty=1, price="0.01", tif=TimeInForce.GTC)
    began = time.thread_time()
    for _ in range(100):
        order = desk.place(qty=1, price="0.01")
        desk.order(order)
    assert time.thread_time() - began < 10
    desk.exchange.close()
