"""The journal: durable, exact, found by index, and never going backwards."""

from __future__ import annotations

import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import mysql, postgresql
from sqlalchemy.schema import CreateIndex, CreateTable

from acceptance.kit import wait_for
from httptrading.brokers import group_commit, journal_database, journal_tables
from httptrading.brokers.group_commit import GroupCommit
from httptrading.brokers.journal import Journal
from httptrading.brokers.journal_rows import JournalOrder, OrderRequest, Outcome, merge
from httptrading.brokers.journal_tables import NOT_PLACED, PLACED, REFUSED, SEEN, SENDING, UNKNOWN
from httptrading.errors import Busy
from httptrading.model import (
    Contract,
    Fill,
    Lifecycle,
    Order,
    OrderReport,
    OrderType,
    TimeInForce,
    TradeType,
)

ID = "JournalInstance01"
AAPL = Contract(TradeType.Securities, "AAPL", "US")
REQUEST = OrderRequest(
    AAPL, OrderType.Limit, TimeInForce.DAY, Lifecycle.RTH, "BUY", 10, Decimal("200.01")
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with closing(Journal(f"sqlite:///{path}")) as journal:
        yield journal


def begin(journal: Journal, key: str = "a", attempt: int = 1, **changes: Any) -> int:
    row_id, _ = journal.begin(ID, key, attempt, replace(REQUEST, **changes)).result(60)
    return row_id


def settle(journal: Journal, row_id: int, state: str, text: str = "") -> None:
    """`text`: the order id of a placed order, else the reason."""
    told = {"order_id" if state == PLACED else "reason": text}
    journal.settle(row_id, Outcome(state, **told), soon=True).result(60)


def row_of(journal: Journal, row_id: int) -> JournalOrder:
    row = journal.by_row_id(row_id)
    assert row is not None
    return row


def order(order_id: str = "1", **fields: Any) -> Order:
    return replace(Order(order_id, "USD", 10), **fields)


def report(journal: Journal, row_id: int, **fields: Any) -> OrderReport:
    """What the broker says of the row's order."""
    return OrderReport(order(**fields), mark=row_of(journal, row_id).mark or "")


# --- placing ------------------------------------------------------------------------------------
def test_a_row_is_there_before_anything_is_sent(journal: Journal, path: Path) -> None:
    begin(journal)
    with closing(sqlite3.connect(path)) as other:
        (found,) = other.execute(
            "SELECT state, direction, qty, price, ticker, order_type FROM orders"
        ).fetchall()
    assert found == ("sending", "BUY", "10", "200.01", "AAPL", "Limit")


def test_a_key_names_one_attempt(journal: Journal) -> None:
    begin(journal)
    with pytest.raises(Busy):  # the database itself refuses it
        begin(journal)
    begin(journal, attempt=2)
    begin(journal, "A")  # case matters
    newest = journal.by_client_order_id(ID, "a")
    assert newest is not None and newest.attempt == 2
    assert journal.by_client_order_id("AnotherInstance01", "a") is None


def test_an_earlier_attempt_that_came_to_light_is_the_order(journal: Journal) -> None:
    first, second = begin(journal), 0
    settle(journal, first, NOT_PLACED, "not there")
    second = begin(journal, attempt=2)
    journal.record(ID, [report(journal, first)])
    for _ in range(2):  # while the second is being sent, and when it has failed
        found = journal.by_client_order_id(ID, "a")
        assert found is not None
        if found.state == SENDING:
            assert found.row_id == second
            settle(journal, second, NOT_PLACED, "Busy.")
    assert (found.row_id, found.order_id) == (first, "1")


def test_marks_are_short_and_unlike(journal: Journal, tmp_path: Path) -> None:
    with closing(Journal(f"sqlite:///{tmp_path / 'other.sqlite'}")) as other:
        marks = [
            one.mark(instance, key, attempt)
            for one in (journal, other)
            for instance in (ID, "AnotherInstance01")
            for key in ("a", "A", "a1")
            for attempt in (1, 2, 11)
        ]
    assert len(set(marks)) == len(marks)
    assert all(len(mark) == 20 and mark.isascii() and mark.isalnum() for mark in marks)
    assert journal.mark(ID, "a", 1) == journal.mark(ID, "a", 1)


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"price": Decimal("200.010")}, True),
        ({"price": Decimal("200.02")}, False),
        ({"price": None}, False),
        ({"qty": 11}, False),
        ({"direction": "SELL"}, False),
        ({"lifecycle": Lifecycle.ETH}, False),
        ({"time_in_force": TimeInForce.GTC}, False),
        ({"order_type": OrderType.Market}, False),
        ({"contract": Contract(TradeType.Securities, "AAPL", "HK")}, False),
    ],
)
def test_same_content(journal: Journal, changes: dict[str, Any], same: bool) -> None:
    row = row_of(journal, begin(journal))
    assert row.same_content(replace(REQUEST, **changes)) is same


def test_an_order_changed_in_the_brokers_app_keeps_what_was_asked(journal: Journal) -> None:
    row_id = begin(journal)
    settle(journal, row_id, PLACED, "1")
    journal.record(ID, [report(journal, row_id, qty=5)])
    row = row_of(journal, row_id)
    assert row.order.qty == 5 and row.same_content(REQUEST)


def test_outcomes(journal: Journal) -> None:
    placed, refused, unknown, not_placed = (begin(journal, key) for key in "abcd")
    assert [row.row_id for row in journal.unsettled(ID)] == [placed, refused, unknown, not_placed]
    settle(journal, placed, PLACED, "1")
    settle(journal, refused, REFUSED, "no funds")
    settle(journal, unknown, UNKNOWN)
    settle(journal, not_placed, NOT_PLACED, "not there")
    rows = [row_of(journal, row) for row in (placed, refused, unknown, not_placed)]
    assert [(row.state, row.is_open, row.order.error_reason) for row in rows] == [
        (PLACED, True, ""),
        (REFUSED, False, "no funds"),
        (UNKNOWN, True, ""),
        (NOT_PLACED, False, "not there"),
    ]
    assert [row.row_id for row in journal.unsettled(ID)] == [unknown]
    # What is settled is not unsettled by a late word, and what is placed was not "not placed".
    settle(journal, placed, UNKNOWN)
    settle(journal, placed, NOT_PLACED, "not there")
    assert row_of(journal, placed).state == PLACED
    since = row_of(journal, unknown).updated
    settle(journal, unknown, UNKNOWN)
    assert row_of(journal, unknown).updated == since, "settlement counts from there"
    settle(journal, unknown, NOT_PLACED, "not there")
    assert row_of(journal, unknown).state == NOT_PLACED and journal.unsettled(ID) == []
    settle(journal, not_placed, PLACED, "4")  # the truth came late
    row = row_of(journal, not_placed)
    assert (row.state, row.order_id, row.is_open, row.order.error_reason) == (PLACED, "4", True, "")


def test_a_refusal_does_not_undo_a_fill(journal: Journal) -> None:
    row_id = begin(journal)
    journal.record(ID, [report(journal, row_id, filled_qty=3, avg_price=200)])
    settle(journal, row_id, REFUSED, "no funds")
    row = row_of(journal, row_id)
    assert (row.state, row.order.filled_qty, row.order.error_reason) == (PLACED, 3, "")


# --- what the broker says -----------------------------------------------------------------------
def test_found_by_mark(journal: Journal) -> None:
    row_id = begin(journal)
    journal.record(ID, [report(journal, row_id)])
    (row,) = journal.joined(ID, [report(journal, row_id)])
    assert (row.row_id, row.state, row.order_id) == (row_id, PLACED, "1")
    journal.record(ID, [report(journal, row_id, order_id="", filled_qty=3)])  # by the mark alone
    assert row_of(journal, row_id).order.filled_qty == 3


def test_somebody_elses_mark_that_comes_later_makes_no_second_order(journal: Journal) -> None:
    journal.record(ID, [OrderReport(order("9"))])
    journal.record(ID, [OrderReport(order("9", filled_qty=3), mark="theirs")])
    (row,) = journal.orders(ID, open_=None, since=None, limit=9)
    assert row.order.filled_qty == 3


def test_a_mark_that_somebody_has_changed_makes_no_second_order(journal: Journal) -> None:
    """In the broker's own app, say; another gateway's mark is another order's."""
    row_id = begin(journal)
    settle(journal, row_id, PLACED, "1")
    journal.record(ID, [OrderReport(order(filled_qty=10), mark="theirs")])
    (row,) = journal.orders(ID, open_=None, since=None, limit=9)
    assert (row.row_id, row.is_open, row.order.filled_qty) == (row_id, False, 10)
    journal.record(ID, [OrderReport(order(), mark="ht0123456789abcdef01")])
    assert len(journal.orders(ID, open_=None, since=None, limit=9)) == 2


def test_a_report_without_an_id_settles_nothing(journal: Journal) -> None:
    row_id = begin(journal)
    journal.record(ID, [report(journal, row_id, order_id="")])
    journal.record(ID, [OrderReport(order(""))])
    assert [row.state for row in journal.unsettled(ID)] == [SENDING]
    assert journal.orders(ID, open_=None, since=None, limit=10) == []


def test_a_push_before_the_answer_without_a_mark_is_joined(journal: Journal) -> None:
    row_id = begin(journal)
    journal.record(ID, [OrderReport(order(filled_qty=4, avg_price=200))])
    assert [row.state for row in journal.orders(ID, open_=None, since=None, limit=9)] == [SEEN]
    settle(journal, row_id, PLACED, "1")
    (row,) = journal.orders(ID, open_=None, since=None, limit=9)
    assert (row.row_id, row.state, row.order.filled_qty) == (row_id, PLACED, 4)


def test_a_push_without_a_mark_is_joined_when_a_listing_settles_the_row(journal: Journal) -> None:
    row_id = begin(journal)
    journal.record(ID, [OrderReport(order(filled_qty=4, avg_price=200))])
    journal.record(ID, [report(journal, row_id, filled_qty=2, avg_price=200)])
    (row,) = journal.orders(ID, open_=None, since=None, limit=9)
    assert (row.row_id, row.state, row.order.filled_qty) == (row_id, PLACED, 4)


def test_an_order_id_used_again_is_another_order(journal: Journal) -> None:
    """A broker that counts from 1 after a restart: yesterday's order is not today's."""
    journal.record(ID, [OrderReport(order(filled_qty=10, avg_price=200))])
    first = begin(journal, "first")
    settle(journal, first, PLACED, "1")
    journal.record(ID, [report(journal, first, is_canceled=True)])
    second = begin(journal, "second")
    settle(journal, second, PLACED, "1")
    row = row_of(journal, second)
    assert (row.order.filled_qty, row.order.is_canceled, row.is_open) == (0, False, True)
    journal.record(ID, [report(journal, second, filled_qty=1, avg_price=3)])
    assert row_of(journal, first).order.filled_qty == 0
    found = journal.by_order_id(ID, "1")
    assert found is not None and found.row_id == second


def test_another_order_under_the_same_mark_is_another_order(journal: Journal) -> None:
    row_id = begin(journal)
    settle(journal, row_id, PLACED, "1")
    journal.record(ID, [report(journal, row_id, order_id="2", filled_qty=10, avg_price=1)])
    assert row_of(journal, row_id).order == order("1", qty=Decimal(10), filled_qty=0, avg_price=0)
    assert len(journal.orders(ID, open_=None, since=None, limit=9)) == 2


def test_an_order_that_is_alive_after_all(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    for key, state in (("a", REFUSED), ("b", NOT_PLACED)):
        row_id = begin(journal, key)
        before = time.time() - 60
        settle(journal, row_id, state, "no")
        overtaken = report(journal, row_id, order_id=key)
        journal.record(ID, [overtaken], before)  # a push from before the answer
        assert row_of(journal, row_id).state == state
        journal.record(ID, [report(journal, row_id, order_id=key, error_reason="failed")])
        assert row_of(journal, row_id).state == state
        journal.record(ID, [overtaken])
        row = row_of(journal, row_id)
        assert (row.state, row.order_id, row.is_open) == (PLACED, key, True)
        assert row.order.error_reason == ""
        assert f"counted as {state}" in caplog.text


@pytest.mark.parametrize("end", [{"error_reason": "DISABLED"}, {"is_canceled": True}])
def test_an_end_that_the_broker_takes_back(
    journal: Journal, caplog: pytest.LogCaptureFixture, end: dict[str, Any]
) -> None:
    """An overtaken push says the same as a broker that has taken an order up again, but at once."""
    row_id = begin(journal)
    settle(journal, row_id, PLACED, "1")
    ended = report(journal, row_id, filled_qty=3, avg_price=5, **end)
    journal.record(ID, [ended])
    for open_again, later in (
        (replace(ended, order=order(filled_qty=3, avg_price=5)), 50),
        (replace(ended, order=order(filled_qty=2, avg_price=5)), 70),
    ):
        journal.record(ID, [open_again], time.time() + later)
        assert row_of(journal, row_id).order == ended.order
    again = order(filled_qty=4, avg_price=6)
    assert journal.orders(ID, open_=True, since=None, limit=9) == []
    journal.record(ID, [replace(ended, order=again)], time.time() + 70)
    row = row_of(journal, row_id)
    assert (row.order, row.is_open, row.state) == (again, True, PLACED)
    assert "order 1 had ended" in caplog.text
    journal.record(ID, [replace(ended, order=order(filled_qty=10, avg_price=6))])
    journal.record(ID, [replace(ended, order=again)], time.time() + 70)
    row = row_of(journal, row_id)
    assert row.order.is_filled and not row.is_open, "what is filled stays so"


def test_a_partly_filled_then_cancelled_order_that_counted_as_not_placed(journal: Journal) -> None:
    row_id = begin(journal)
    settle(journal, row_id, NOT_PLACED, "not there")
    journal.record(ID, [report(journal, row_id, filled_qty=3, avg_price=5, is_canceled=True)])
    row = row_of(journal, row_id)
    assert (row.state, row.is_open, row.order.is_canceled) == (PLACED, False, True)
    assert row.order.filled_qty == 3


def test_no_news_is_not_written(journal: Journal, path: Path) -> None:
    row_id = begin(journal)
    settle(journal, row_id, PLACED, "1")
    said = report(journal, row_id, filled_qty=2.5, avg_price=200.10)
    journal.record(ID, [said])
    updated = row_of(journal, row_id).updated
    size = path.with_name(path.name + "-wal").stat().st_size
    for _ in range(20):
        journal.record(ID, [said])
        (row,) = journal.joined(ID, [said])
    assert row.updated == updated
    assert path.with_name(path.name + "-wal").stat().st_size == size


def test_pushes_that_are_recorded_together_end_with_the_last(journal: Journal) -> None:
    """A cancellation that was asked for and refused within one batch of the recorder."""
    row_id = begin(journal)
    settle(journal, row_id, PLACED, "1")
    asked = report(journal, row_id, is_pending_cancel=True)
    journal.record(ID, [asked, OrderReport(order())])
    assert row_of(journal, row_id).order.is_pending_cancel is False


def test_a_long_list_is_joined_as_its_parts_are(journal: Journal) -> None:
    """More than one statement takes; marks, ids and both, known and new."""
    marked = [begin(journal, f"k{number}") for number in range(30)]
    settle(journal, marked[0], PLACED, "0")
    said = [
        OrderReport(order(str(number)), mark=row_of(journal, row).mark or "")
        for number, row in enumerate(marked)
    ]
    said += [OrderReport(order(str(number)), mark="foreign") for number in range(30, 700)]
    said += [OrderReport(order(str(number))) for number in range(700, 1300)]
    for _ in range(2):
        journal.record(ID, said)
        together = journal.joined(ID, said)
        assert [row.order_id for row in together] == [str(number) for number in range(1300)]
        assert [row.row_id for row in together[:30]] == marked
        assert [row.state for row in together] == [PLACED] * 30 + [SEEN] * 1270
    alone = [row for one in said[::9] for row in journal.joined(ID, [one])]
    assert alone == together[::9]
    one_by_one = OrderReport(order("31"), mark="another")
    assert journal.joined(ID, [one_by_one, *said])[1:] == together  # and finds no row of its own


def test_numbers_are_exact(journal: Journal) -> None:
    row_id = begin(journal, price=Decimal("0.000000000000001"), qty=999_999_999_999)
    row = row_of(journal, row_id)
    assert row.price == Decimal("0.000000000000001") and row.asked_qty == 999_999_999_999
    journal.record(ID, [report(journal, row_id, filled_qty=1, avg_price=1e-7)])
    assert row_of(journal, row_id).order.avg_price == Decimal("0.0000001")


def test_a_fill_that_is_corrected(journal: Journal) -> None:
    """A broker tells the same execution again, with another quantity or price."""
    now = datetime.now(UTC)
    journal.record_fills(ID, [Fill("f", "1", 5, Decimal("1.1"), now)])
    journal.record_fills(ID, [Fill("f", "1", 10, Decimal("1.1"), now)])
    journal.record_fills(ID, [Fill("f", "1", 10, Decimal("1.2"), now)])
    (fill,) = journal.fills(ID, "1")
    assert (fill.qty, fill.price) == (10, Decimal("1.2"))
    journal.record_fills(ID, [Fill("f", "1", 0, Decimal("1.2"), now)])
    assert journal.fills(ID, "1") == []


def test_fills(journal: Journal) -> None:
    now = datetime.now(UTC)
    fills = [
        Fill("f2", "1", 3, Decimal("1.10"), now + timedelta(seconds=1)),
        Fill("f1", "1", 2, 1.1, now),
        Fill("f3", "2", 2, 1.1, now),
        Fill("f4", "1", 2, 1.1, now + timedelta(seconds=2)),  # like another, and one of its own
    ]
    for _ in range(2):
        journal.record_fills(ID, [*fills, fills[0]])
    assert [fill.fill_id for fill in journal.fills(ID, "1")] == ["f1", "f2", "f4"]
    assert journal.fills(ID, "1")[1].price == Decimal("1.1")
    assert journal.fills("AnotherInstance01", "1") == []


def test_lists(journal: Journal) -> None:
    start = datetime.now(UTC)
    rows = [begin(journal, str(number)) for number in range(6)]
    for number, row_id in enumerate(rows[:4]):
        settle(journal, row_id, PLACED, str(number))
    settle(journal, rows[4], REFUSED, "no")
    journal.record(ID, [report(journal, rows[0], order_id="0", is_canceled=True)])
    journal.record(
        ID, [OrderReport(order("old", is_canceled=True), time=start - timedelta(days=3))]
    )

    def ids(open_: bool | None, since: datetime | None = None, limit: int = 100) -> list[str]:
        return [row.order_id for row in journal.orders(ID, open_=open_, since=since, limit=limit)]

    assert ids(None) == ["3", "2", "1", "0", "old"]  # newest first; what is no order is not there
    assert ids(True) == ["3", "2", "1"]
    assert ids(False) == ["0", "old"]
    assert ids(None, start) == ["3", "2", "1", "0"]
    assert ids(None, limit=2) == ["3", "2"]


def test_what_cannot_be_written_can_still_be_joined(journal: Journal) -> None:
    row_id = begin(journal)
    settle(journal, row_id, PLACED, "1")
    told = [
        report(journal, row_id, filled_qty=4, avg_price=2),
        OrderReport(order("2"), contract=AAPL, direction="SELL"),
    ]
    ours, foreign = journal.joined(ID, told)
    assert (ours.row_id, ours.order.filled_qty) == (row_id, 4)
    assert (foreign.state, foreign.contract, foreign.direction) == (SEEN, AAPL, "SELL")
    assert row_of(journal, row_id).order.filled_qty == 0


def test_what_a_push_did_not_tell_is_learned_from_a_list(journal: Journal) -> None:
    """Tiger's pushes tell no session: ETH or OVERNIGHT is known from its lists."""
    push = OrderReport(order("2"), contract=AAPL, direction="SELL")
    listed = replace(push, lifecycle=Lifecycle.ETH, direction=None)
    for told in (push, listed, push):
        journal.record(ID, [told])
    foreign = journal.by_order_id(ID, "2")
    assert foreign is not None
    assert (foreign.lifecycle, foreign.direction) == (Lifecycle.ETH, "SELL")


# --- never backwards ----------------------------------------------------------------------------
@st.composite
def lives(draw: st.DrawFn) -> list[Order]:
    """What a broker says of one order from its acceptance to its end: fills and average grow
    together, then it is filled, cancelled or expired."""
    fills = draw(st.lists(st.integers(1, 5), max_size=6))
    qty = sum(fills) + draw(st.integers(0, 3))
    qty = max(qty, 1)
    said = [Order("1", "USD", qty)]
    filled, paid = 0, Decimal(0)
    for part in fills:
        filled += part
        paid += part * draw(st.integers(1, 500))
        said.append(
            replace(
                said[-1],
                filled_qty=filled,
                avg_price=paid / filled,
                is_pending_cancel=draw(st.booleans()) and filled < qty,
            )
        )
    if filled < qty:
        end = draw(st.sampled_from(["is_canceled", "error_reason"]))
        value: Any = True if end == "is_canceled" else "expired"
        said.append(replace(said[-1], is_pending_cancel=False, **{end: value}))
    return said


@given(lives(), st.randoms(use_true_random=False))
@settings(max_examples=200)
def test_the_order_of_pushes_does_not_matter(said: list[Order], chance: random.Random) -> None:
    pushes = [chance.choice(said) for _ in range(5)] + said
    chance.shuffle(pushes)
    known = Order("1", "USD", said[0].qty)
    for news in pushes:
        before, known = known, merge(known, news)
        assert known.filled_qty >= before.filled_qty
        assert known.avg_price or not before.avg_price
        if known.filled_qty == before.filled_qty and before.avg_price:
            assert known.avg_price == before.avg_price
        if before.is_completed:
            assert known.is_completed and known.is_canceled == before.is_canceled
            assert known.error_reason == before.error_reason
        assert merge(known, news) == known  # a second time changes nothing
    assert known == said[-1]


orders = st.builds(
    Order,
    st.just("1"),
    st.just("USD"),
    st.integers(0, 12),
    st.integers(0, 12),
    st.sampled_from([0, 1, Decimal("2.5"), 7.25]),
    st.sampled_from(["", "expired"]),
    st.booleans(),
    st.booleans(),
)


@given(st.lists(orders, max_size=8))
@settings(max_examples=200)
def test_whatever_a_broker_says_nothing_goes_backwards(said: list[Order]) -> None:
    known = Order("1", "USD", 10)
    for news in said:
        before, known = known, merge(known, news, not known.is_completed)
        assert known.filled_qty >= before.filled_qty
        assert bool(known.avg_price) >= bool(before.avg_price)
        assert known.is_completed >= before.is_completed
        assert not (known.is_completed and known.is_pending_cancel)
        if before.is_completed:
            assert (known.is_canceled, known.error_reason, known.qty) == (
                before.is_canceled,
                before.error_reason,
                before.qty,
            )


@given(st.lists(orders, min_size=1, max_size=5))
@example([Order("1", "USD", 10, 4, 2), Order("1", "USD", 10, 9, 0), Order("1", "USD", 10, 9, 3)])
@settings(max_examples=40)
def test_the_journal_joins_as_merge_does(said: list[Order]) -> None:
    with (
        TemporaryDirectory() as folder,
        closing(Journal(f"sqlite:///{folder}/journal.sqlite")) as journal,
    ):
        row_id = begin(journal)
        settle(journal, row_id, PLACED, "1")
        known, priced, is_open = Order("1", "USD", 10), Decimal(0), True
        for news in said:
            journal.record(ID, [report(journal, row_id, **vars(news))])
            merged = merge(known, news, is_open, priced)
            if merged.avg_price != known.avg_price:
                priced = Decimal(news.filled_qty)
            known, is_open = merged, is_open and not merged.is_completed
            row = row_of(journal, row_id)
            assert row.order == known and row.is_open == is_open


def test_an_end_is_believed_whatever_fills_it_counts() -> None:
    """Executions may be told before it; else the order would be open for ever."""
    known = order(filled_qty=5, avg_price=2)
    for end in ({"is_canceled": True}, {"error_reason": "expired"}):
        assert merge(known, order(filled_qty=3, avg_price=9, **end)) == replace(known, **end)
    overtaken = order(filled_qty=3, avg_price=9, qty=8, is_pending_cancel=True)
    assert merge(known, overtaken) == known


def test_a_price_that_comes_later_than_its_fill(journal: Journal) -> None:
    row_id = begin(journal)
    for filled, price in ((4, 2), (9, 0), (9, 3), (9, 5)):
        journal.record(ID, [report(journal, row_id, filled_qty=filled, avg_price=price)])
    assert row_of(journal, row_id).order == order("1", filled_qty=9, avg_price=3)
    for filled, price in ((9, 0), (9, 3), (9, 5)):  # an order of somebody else
        journal.record(ID, [OrderReport(order("7", filled_qty=filled, avg_price=price))])
    found = journal.by_order_id(ID, "7")
    assert found is not None and found.order == order("7", filled_qty=9, avg_price=3)


def test_the_currency_is_what_the_broker_says(journal: Journal) -> None:
    """Hong Kong's counters in yuan; what says none leaves it."""
    row_id = begin(journal)
    for currency in ("CNY", ""):
        journal.record(ID, [report(journal, row_id, currency=currency)])
        assert row_of(journal, row_id).order.currency == "CNY"


# --- the database -------------------------------------------------------------------------------
def test_durable_and_private(journal: Journal, path: Path) -> None:
    with journal._database._writer.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_each_write_outlives_the_process_before_it_counts(path: Path) -> None:
    """What reaches the disk itself, and when, is the next two tests' affair."""
    with closing(Journal(f"sqlite:///{path}")) as journal:
        row_id = begin(journal)
        wal = path.with_name(path.name + "-wal")
        before = wal.stat().st_size
        settle(journal, row_id, PLACED, "1")
        assert wal.stat().st_size > before
        # A copy of the files as they are now, as a crash would leave them, has everything.
        for name in (path.name, wal.name):
            (path.parent / f"crashed-{name}").write_bytes((path.parent / name).read_bytes())
    with closing(Journal(f"sqlite:///{path.with_name('crashed-' + path.name)}")) as crashed:
        assert row_of(crashed, row_id).state == PLACED


def test_what_is_waited_for(journal: Journal) -> None:
    """An order is on the disk before it is sent. That it was placed is on its way there when the
    client is told, and gets there without any other order's help; a refusal is there."""
    row_id = begin(journal)
    driver = journal._database._commits._driver()
    said: list[str] = []
    driver.set_trace_callback(said.append)
    other = begin(journal, "b")
    for row, state in ((row_id, PLACED), (other, REFUSED)):
        settle(journal, row, state, "1")
    driver.set_trace_callback(None)
    modes = {}
    for number, text in enumerate(said):
        if text.startswith(("INSERT", "UPDATE")):
            [*_, mode] = [one for one in said[:number] if one.startswith("PRAGMA synchronous")]
            modes[next(word for word in ("placed", "refused", "sending") if word in text)] = mode
    full, normal = "PRAGMA synchronous=FULL", "PRAGMA synchronous=NORMAL"
    assert modes == {"sending": full, "placed": normal, "refused": full}


def test_what_was_not_waited_for_reaches_the_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    reached = threading.Event()
    fsync = os.fsync

    def remember(file: int) -> None:
        synced.append(os.fstat(file).st_ino)
        fsync(file)
        reached.set()

    monkeypatch.setattr(group_commit, "SYNC_AFTER", 1.0)
    with closing(Journal(f"sqlite:///{path}")) as journal:
        row_id = begin(journal)
        monkeypatch.setattr(os, "fsync", remember)
        settle(journal, row_id, PLACED, "1")
        with pytest.raises(Busy):
            begin(journal)  # what fails in between does not make it forgotten
        assert reached.wait(60)
        assert synced == [os.stat(f"{path}-wal").st_ino]


def test_it_survives(path: Path) -> None:
    with closing(Journal(f"sqlite:///{path}")) as journal:
        row_id, gateway = begin(journal), journal._database.gateway_id
        mark = journal.mark(ID, "a", 1)
    with closing(Journal(f"sqlite:///{path}")) as journal:
        assert row_of(journal, row_id).state == SENDING
        assert (journal._database.gateway_id, journal.mark(ID, "a", 1)) == (gateway, mark)


def test_a_newer_schema_is_refused(path: Path) -> None:
    Journal(f"sqlite:///{path}").close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE about SET value = '99' WHERE name = 'schema_version'")
    with pytest.raises(ValueError, match="newer version"):
        Journal(f"sqlite:///{path}")


def test_an_older_schema_is_upgraded_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Journal(f"sqlite:///{path}")) as journal:
        row_id, gateway = begin(journal), journal._database.gateway_id
    monkeypatch.setattr(
        journal_tables,
        "MIGRATIONS",
        (*journal_tables.MIGRATIONS, ("ALTER TABLE orders ADD COLUMN note VARCHAR(9)",)),
    )
    for _ in range(2):
        with closing(Journal(f"sqlite:///{path}")) as journal:
            assert journal._database.gateway_id == gateway
            assert row_of(journal, row_id).state == SENDING
            with journal._database._reader.connect() as connection:
                columns = [one["name"] for one in sa.inspect(connection).get_columns("orders")]
    assert columns.count("note") == 1


def test_another_program_that_looks_at_an_upgraded_journal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes a SQLite file last deletes its log; who that is, is told by locks."""
    Journal(f"sqlite:///{path}").close()
    monkeypatch.setattr(journal_tables, "MIGRATIONS", (*journal_tables.MIGRATIONS, ()))
    look = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('SELECT * FROM orders')"
    with closing(Journal(f"sqlite:///{path}")) as journal:
        subprocess.run([sys.executable, "-c", look, str(path)], check=True, timeout=60)
        row_id = begin(journal)
        with closing(sqlite3.connect(path)) as database:
            assert database.execute("SELECT id FROM orders").fetchall() == [(row_id,)]


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_journal_that_forgets_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="outlives"):
        Journal(url)


@pytest.mark.parametrize("dialect", [postgresql.dialect(), mysql.dialect()])
def test_other_databases(dialect: sa.Dialect) -> None:
    """What only a server would tell: types that are exact there, names in which case matters."""
    for table in journal_tables.metadata.sorted_tables:
        text = str(CreateTable(table).compile(dialect=dialect))
        assert "FLOAT" not in text  # 24 bits in MySQL: a time would be off by minutes
        if dialect.name == "mysql" and "client_order_id" in text:
            assert "client_order_id VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin" in text
        for index in table.indexes:
            str(CreateIndex(index).compile(dialect=dialect))


def test_every_query_uses_an_index(journal: Journal) -> None:
    """With a million rows each costs what it costs with a thousand."""
    row_id = begin(journal)
    settle(journal, row_id, PLACED, "1")
    asked: list[tuple[str, Any]] = []

    def remember(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    for engine in (journal._database._reader, journal._database._writer):
        sa.event.listen(engine, "before_cursor_execute", remember)
    other = begin(journal, "b")
    journal.record(ID, [report(journal, other), OrderReport(order("7"), mark="foreign")])
    journal.record(ID, [OrderReport(order("7", filled_qty=3, avg_price=1))])
    settle(journal, other, PLACED, "1")
    for state in (UNKNOWN, REFUSED):
        settle(journal, begin(journal, state), state)
    journal.record_fills(ID, [Fill("f", "1", 1, 1, datetime.now(UTC))])
    journal.fills(ID, "1")
    journal.by_client_order_id(ID, "a")
    journal.by_order_id(ID, "1")
    journal.unsettled(ID)
    for open_ in (True, False, None):
        for since in (datetime.now(UTC), None):
            journal.orders(ID, open_=open_, since=since, limit=10)
    short = (journal_tables.HAS_KEY_SHORT, journal_tables.PLACED_SHORT)
    asked += [(one.text, ("1",) * len(one.names)) for one in short]
    tables = [(text, values) for text, values in asked if " orders" in text or " fills" in text]
    assert len({text for text, _ in tables}) >= 12
    with journal._database._reader.connect() as connection:
        for text, values in tables:
            if text.startswith("INSERT"):
                continue
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", values).all()
            steps = [row[3] for row in plan]
            assert all("SCAN" not in step for step in steps), (text, steps)
            if "LIMIT" in text:
                assert all("TEMP B-TREE" not in step for step in steps), (text, steps)


# --- writing together ---------------------------------------------------------------------------
@contextmanager
def writing_held(journal: Journal) -> Iterator[None]:
    """Inside, a transaction is under way: what is given meanwhile comes together after it."""
    begun, gate = threading.Event(), threading.Event()
    held = journal._database._commits.post(lambda connection: (begun.set(), gate.wait(60)))
    assert begun.wait(60)
    try:
        yield
    finally:
        gate.set()
        held.result(60)


def test_writes_that_come_together_are_committed_together(path: Path) -> None:
    with closing(Journal(f"sqlite:///{path}")) as journal:
        commits = []
        sa.event.listen(journal._database._writer, "commit", lambda connection: commits.append(1))
        with writing_held(journal):
            futures = [journal.begin(ID, str(number), 1, REQUEST) for number in range(50)]
        assert len({future.result(60)[0] for future in futures}) == 50
        assert len(commits) <= 5


def test_one_that_fails_takes_no_other_with_it(path: Path) -> None:
    with closing(Journal(f"sqlite:///{path}")) as journal:
        begin(journal, "twice")
        with writing_held(journal):
            before = journal.begin(ID, "before", 1, REQUEST)
            twice = journal.begin(ID, "twice", 1, REQUEST)
            after = journal.begin(ID, "after", 1, REQUEST)
        with pytest.raises(Busy):
            twice.result(60)
        for key, future in (("before", before), ("after", after)):
            row_id, _ = future.result(60)
            found = journal.by_client_order_id(ID, key)
            assert found is not None and found.row_id == row_id


def test_a_transaction_lost_on_the_way_is_not_taken_for_written(path: Path) -> None:
    """A full disk makes SQLite roll back everything, not only the statement that failed."""
    engine = sa.create_engine(f"sqlite:///{path}")
    sa.event.listen(engine, "connect", journal_database._sqlite_connect)
    sa.event.listen(engine, "begin", journal_database._sqlite_begin)
    commits = GroupCommit(engine, lambda error: Busy(str(error)))
    gate = threading.Event()

    def write(text: str) -> Any:
        return lambda connection: connection.exec_driver_sql(text).rowcount

    try:
        commits.post(write("CREATE TABLE t (a INTEGER)")).result(60)
        first = commits.post(lambda connection: gate.wait(60))  # the next three come together
        good = commits.post(write("INSERT INTO t VALUES (1)"))
        lost: Future[Any] = commits.post(
            lambda connection: (
                connection.exec_driver_sql("ROLLBACK"),
                connection.exec_driver_sql("SELECT * FROM missing"),
            )
        )
        last = commits.post(write("INSERT INTO t VALUES (3)"))
        gate.set()
        assert first.result(60)
        with pytest.raises(Busy):
            lost.result(60)
        assert (good.result(60), last.result(60)) == (1, 1)
    finally:
        commits.close(60)
        engine.dispose()
    with closing(sqlite3.connect(path)) as database:
        assert sorted(database.execute("SELECT a FROM t")) == [(1,), (3,)]


def test_after_the_end_nothing_is_written(path: Path) -> None:
    journal = Journal(f"sqlite:///{path}")
    row_id = begin(journal)
    journal.close()
    with pytest.raises(Busy):
        begin(journal, "late")
    assert row_of(journal, row_id).state == SENDING  # reading still works
    journal.close()


# --- a disk that does not take it ---------------------------------------------------------------
def test_a_locked_journal_is_said_to_be_busy(journal: Journal, path: Path) -> None:
    begin(journal, "first")
    journal._database._commits._driver().execute("PRAGMA busy_timeout=50").close()
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Busy, match="nothing was sent") as caught:
            begin(journal)
        assert len(journal.unsettled(ID)) == 1  # reads go on
    assert caught.value.retryable and caught.value.retry_after
    begin(journal)


def test_a_server_that_is_silent_holds_nobody_up(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is frozen, or behind a broken line, never answers, and does not refuse either."""
    row_id = begin(journal)
    journal._database._is_sqlite = False
    assert row_of(journal, row_id).client_order_id == "a"
    gate, asked = threading.Event(), threading.Semaphore(0)

    def hang(*_: Any) -> None:
        asked.release()
        gate.wait(300)

    sa.event.listen(journal._database._reader, "before_cursor_execute", hang)
    monkeypatch.setattr(journal_database, "READS_WITHIN", 0.05)
    monkeypatch.setattr(journal_database, "ASKS_AGAIN_AFTER", 0.5)
    with pytest.raises(Busy, match="does not answer"):
        journal.by_client_order_id(ID, "a")
    assert asked.acquire(timeout=60)
    with pytest.raises(Busy, match="does not answer"):
        journal.orders(ID, open_=True, since=None, limit=1)
    assert not asked.acquire(blocking=False), "it is not asked again at once"
    gate.set()
    wait_for(lambda: readable(journal, row_id), "the server to be asked again")


def readable(journal: Journal, row_id: int) -> bool:
    try:
        return journal.by_row_id(row_id) is not None
    except Busy:
        return False


def test_a_journal_that_cannot_be_made_is_tried_again(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the directory should be")
    journal = Journal(f"sqlite:///{tmp_path}/data/journal.sqlite")
    with closing(journal):
        for attempt in (lambda: journal.mark(ID, "a", 1), lambda: journal.unsettled(ID)):
            with pytest.raises(Busy):
                attempt()
        (tmp_path / "data").unlink()
        begin(journal)


def test_a_journal_that_was_read_only_is_written_again(journal: Journal) -> None:
    """As SQLite opens a file on a file system that is mounted read-only, or of another user."""
    begin(journal, "before")
    journal._database._commits._driver().execute("PRAGMA query_only=ON")  # of this connection alone
    with pytest.raises(Busy, match="cannot be written"):
        begin(journal, "meanwhile")
    assert row_of(journal, begin(journal, "after")).state == "sending"


def test_a_row_in_memory_is_not_used_once_a_commit_can_be_seen(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is counted: else one request would be told the order's next state, and a later one
    the state before."""
    told: list[Any] = []
    real = GroupCommit._begin

    def tell() -> None:
        (row,) = journal.orders(ID, open_=None, since=None, limit=9)
        known = journal.by_order_id(ID, "1")
        assert known is not None
        told.append((row.order.filled_qty, known.order.filled_qty))

    @contextmanager
    def committed(commits: GroupCommit) -> Iterator[sa.Connection]:
        with real(commits) as connection:
            yield connection
        tell()

    journal.record(ID, [OrderReport(order())])
    tell()
    monkeypatch.setattr(GroupCommit, "_begin", committed)
    journal.record(ID, [OrderReport(order(filled_qty=4, avg_price=5))])
    assert told == [(0, 0), (4, 4)]


def test_a_damaged_file_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"no database" * 1000)
    with closing(Journal(f"sqlite:///{path}")) as journal:
        with pytest.raises(Busy, match="damaged"):
            begin(journal)
    assert "file is not a database" in caplog.text


def test_an_existing_journal_opens_without_writing(path: Path) -> None:
    with closing(Journal(f"sqlite:///{path}")) as journal:
        row_id = begin(journal)
    with closing(sqlite3.connect(path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with closing(Journal(f"sqlite:///{path}")) as journal:
            assert row_of(journal, row_id).state == SENDING
            assert (
                journal._database._commits.ended == 0
            )  # not even tried, which would have taken 5 s


def test_a_secret_in_the_url_is_not_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkdir(tmp_path / "hunter2")
    with closing(Journal(f"sqlite:///{tmp_path}/hunter2")) as journal:
        with pytest.raises(Busy) as caught:
            begin(journal)
    assert "hunter2" not in caplog.text + str(caught.value)


def test_a_part_of_a_share_told_as_a_float_is_no_older_than_itself(journal: Journal) -> None:
    """0.3 as a float is less than Decimal("0.3"), as which it is recorded."""
    journal.record(ID, [OrderReport(Order("1", "USD", 1, 0.3, 200.5))])
    journal.record(ID, [OrderReport(Order("1", "USD", 2, 0.3, 200.5))])
    [row] = journal.orders(ID, open_=True, since=None, limit=1)
    assert (row.order.qty, row.order.filled_qty) == (2, Decimal("0.3"))
