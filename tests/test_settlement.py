"""Orders of unknown outcome: found, or proved not to be there; never guessed, never re-sent.

Also what stands on the journal: a memory longer than the broker's, the stop switches, a disk that
takes nothing more.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest

from acceptance.kit import Answer, Trader, in_time, wait_for
from httptrading.brokers import settlement
from httptrading.brokers.base import OPERATIONS, BaseBroker
from httptrading.brokers.group_commit import GroupCommit
from httptrading.brokers.journal import Journal
from httptrading.brokers.journal_rows import OrderRequest, Outcome
from httptrading.brokers.journal_tables import NOT_PLACED, PLACED, REFUSED, UNKNOWN
from httptrading.brokers.worker import Call
from httptrading.errors import (
    BrokerUnavailable,
    Busy,
    HttpTradingError,
    OrderNotFound,
    OutcomeUnknown,
    RateLimited,
    Rejected,
    TimedOut,
)
from httptrading.model import (
    Contract,
    Fill,
    Lifecycle,
    Order,
    OrderReport,
    OrderType,
    Quote,
    TimeInForce,
    TradeType,
)
from simulators.scripted import AAPL, LIMIT_ORDER, Script, ScriptedBroker, Stage, stage

INSTANCE = "ScriptedBroker0000"
REQUEST = OrderRequest(
    AAPL, OrderType.Limit, TimeInForce.DAY, Lifecycle.RTH, "BUY", 12, Decimal("200.01")
)
CROWD = 12


@pytest.fixture
def on(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, hard_limit=60.0) as running:
        running.ready()
        yield running


def raising(error: BaseException) -> Callable[..., Any]:
    def operation(**_: Any) -> Any:
        raise error

    return operation


def accepting(script: Script, then: Callable[..., Any]) -> Callable[..., Any]:
    def place_order(**arguments: Any) -> Any:
        script.usual("place_order", arguments)
        return then(**arguments)

    return place_order


LOST = raising(OutcomeUnknown("The line was cut."))


def until(answer: Callable[[], Answer], code: str) -> Answer:
    """Asks until the answer has this code ("" for a success)."""
    return wait_for(lambda: (lambda a: a if a.code == code else None)(answer()), code or "success")


def unknown(answer: Answer, key: str = "k") -> None:
    assert (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN"), answer
    assert answer.error["outcome"] == "unknown"
    assert answer.error["clientOrderId"] == key


def left_at_the_broker(on: Stage) -> None:
    """Places an order that a hanging broker has taken up when its client's time is over."""
    trader = on.trader()
    unknown(
        in_time(
            lambda seconds: trader.place(LIMIT_ORDER, key="k", timeout=seconds),
            lambda answer: on.script.calls("place_order"),
        )
    )


# --- after an unknown outcome -------------------------------------------------------------------
def test_accepted_and_cut(on: Stage) -> None:
    trader = on.trader()
    on.script.do["place_order"] = accepting(on.script, LOST)
    unknown(trader.place(LIMIT_ORDER, key="k"))
    answer = until(lambda: trader.state(key="k"), "")
    assert answer["order"]["orderId"] == on.script.orders[0].order.order_id
    again = trader.place(LIMIT_ORDER, key="k")
    assert again.replayed and again["orderId"] == answer["order"]["orderId"]
    assert len(on.script.calls("place_order")) == 1


def test_never_arrived(on: Stage) -> None:
    """Unknown until the broker has listed its orders twice without it; then the name is free."""
    trader = on.trader()
    on.script.do["place_order"] = LOST
    before = len(on.script.calls("recent_orders"))
    with on.script.hold("recent_orders"):
        unknown(trader.place(LIMIT_ORDER, key="k"))
        unknown(trader.state(key="k"))
        unknown(trader.cancel(key="k"))
    missing = until(lambda: trader.state(key="k"), "ORDER_NOT_FOUND")
    assert missing.status == 404 and "not placed" in missing.body["ex"]
    assert len(on.script.calls("recent_orders")) >= before + 2
    assert len(on.script.calls("place_order")) == 1, "the gateway itself sends nothing again"
    del on.script.do["place_order"]
    again = trader.place(LIMIT_ORDER, key="k")
    assert again.ok and not again.replayed
    first, second = (call.arguments["mark"] for call in on.script.calls("place_order"))
    assert first != second
    assert trader.order(key="k")["orderId"] == again["orderId"]


def test_a_repetition_waits_for_the_settlement_and_then_sends(on: Stage) -> None:
    on.script.do["place_order"] = LOST
    unknown(on.trader().place(LIMIT_ORDER, key="k"))
    del on.script.do["place_order"]
    with ThreadPoolExecutor(CROWD) as pool:
        answers = list(
            pool.map(lambda _: on.trader().place(LIMIT_ORDER, key="k", timeout=30), range(CROWD))
        )
    assert all(answer.ok for answer in answers), answers
    assert len({answer["orderId"] for answer in answers}) == 1
    assert len(on.script.calls("place_order")) == 2 and len(on.script.orders) == 1


@pytest.mark.parametrize(
    "error",
    [
        BrokerUnavailable("Down."),
        TimedOut("Slow."),
        RateLimited("Too fast.", retry_after=1),
        ValueError("cut in the middle of the listing"),
    ],
)
def test_a_listing_that_fails_proves_nothing(on: Stage, error: Exception) -> None:
    trader = on.trader()

    def lost(**_: Any) -> Any:
        # Only now: a listing that is just ending may not cost the connection beforehand.
        on.script.do["recent_orders"] = raising(error)
        return LOST()

    on.script.do["place_order"] = accepting(on.script, lost)
    unknown(trader.place(LIMIT_ORDER, key="k"))
    before = len(on.script.calls("recent_orders"))
    on.script.arrived("recent_orders", before + 2)
    unknown(trader.state(key="k"))
    del on.script.do["recent_orders"]
    until(lambda: trader.state(key="k"), "")


@pytest.mark.parametrize("filled", [0, 12])
def test_a_listing_without_any_order_proves_nothing_when_there_are_some(
    on: Stage, monkeypatch: pytest.MonkeyPatch, filled: int
) -> None:
    """Tiger leaves out the data of an answer that has none, and of one that is broken."""
    monkeypatch.setattr(settlement, "GROWTH", 1.0)
    trader = on.trader()
    known = Order(trader.placed(LIMIT_ORDER), "USD", 12, filled, 200 if filled else 0)
    on.script.orders[0] = replace(on.script.orders[0], order=known)
    assert trader.orders()["orders"][0]["isFilled"] is bool(filled)
    on.script.do["recent_orders"] = lambda **_: []
    on.script.do["place_order"] = accepting(on.script, LOST)
    unknown(trader.place(LIMIT_ORDER, key="k"))
    on.script.arrived("recent_orders", len(on.script.calls("recent_orders")) + 4)
    unknown(trader.state(key="k"))
    del on.script.do["recent_orders"]
    until(lambda: trader.state(key="k"), "")


def test_a_listing_without_any_order_need_not_have_one_from_before_it(
    on: Stage, tmp_path: Path
) -> None:
    trader = on.trader()
    trader.placed(LIMIT_ORDER)
    with closing(sqlite3.connect(tmp_path / "journal.sqlite", timeout=30)) as database, database:
        database.execute("UPDATE orders SET created = created - 2 * 86400")
    on.script.do |= {"recent_orders": lambda **_: [], "place_order": LOST}
    unknown(trader.place(LIMIT_ORDER, key="k"))
    until(lambda: trader.state(key="k"), "ORDER_NOT_FOUND")


def test_a_call_still_running_is_never_given_up(tmp_path: Path) -> None:
    """Its answer is late, the listings of a fresh connection lack the order: it may still come."""
    with stage(tmp_path) as on:
        on.ready()
        trader = on.trader()
        with on.script.hold("place_order"):
            left_at_the_broker(on)
            before = len(on.script.calls("recent_orders"))
            on.script.arrived("recent_orders", before + 4)  # on the lane that replaced it
            unknown(trader.state(key="k"))
            unknown(trader.place(LIMIT_ORDER, key="k", timeout=1))
        answer = until(lambda: trader.state(key="k"), "")
        assert answer["order"]["orderId"] == "69788888"
        assert len(on.script.calls("place_order")) == 1


def test_one_whose_time_is_up_as_it_comes_to_be_sent_was_not_sent(on: Stage) -> None:
    """That needs no settlement."""
    on.script.do["recent_orders"] = raising(TimedOut("Slow."))
    instance = on.gateway.instance(INSTANCE)
    stale, deadline = instance.on_stale, time.monotonic() + 1.0

    def late() -> None:
        wait_for(lambda: time.monotonic() >= deadline, "its time to be up")
        stale()

    instance.on_stale = late
    with pytest.raises(HttpTradingError):
        instance.place(REQUEST, "k", deadline)
    until(lambda: on.trader().state(key="k"), "ORDER_NOT_FOUND")
    assert on.script.calls("place_order") == []


class ShowsLate(ScriptedBroker):
    listing_delay = 0.5


@pytest.mark.parametrize(
    ("fails", "takes", "booked_within"),
    [(False, 0.0, 0.0), (True, 0.0, 0.0), (False, 1.6, 0.0), (False, 0.0, 1.0)],
)
def test_two_listings_that_must_have_it_prove_that_it_is_not_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
    takes: float,
    booked_within: float,
) -> None:
    """Both from when the broker shows its orders, the last from when it surely does."""
    delay = ShowsLate.listing_delay
    monkeypatch.setattr(ShowsLate, "booked_within", booked_within)
    over: list[float] = []
    listed: list[float] = []  # seconds since the call was over, as they reached the broker

    def place_order(**_: Any) -> Any:
        wait_for(lambda: time.monotonic() >= began + takes, "its answer to be due")
        over.append(max(time.monotonic(), began + booked_within))
        return LOST()

    def recent_orders(**_: Any) -> list[OrderReport]:
        since = time.monotonic() - over[0] if over else 0.0
        if fails and delay <= since < 3 * delay:
            raise TimedOut("Slow.")
        listed.append(since)
        return []

    def state() -> Answer:
        if not fails:
            on.script.brokers[-1].restored()  # which asks for a listing now
        return on.trader().state(key="k")

    with stage(tmp_path, kind=ShowsLate, hard_limit=60.0) as on:
        on.ready()
        on.script.do |= {"place_order": place_order, "recent_orders": recent_orders}
        began = time.monotonic()
        unknown(on.trader().place(LIMIT_ORDER, key="k"))
        until(state, "ORDER_NOT_FOUND")
        counted = [since for since in listed if since >= delay]
        assert len(counted) >= 2 and counted[-1] >= 3 * delay, listed


@pytest.mark.parametrize("minutes", [0, 7])
def test_listings_prove_nothing_of_what_they_do_not_reach(
    on: Stage, minutes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An order of last week may have been filled, and be in no list of today; nor need one of a few
    minutes after midnight be, as our clock has it."""
    trader = on.trader()
    back = timedelta(minutes=minutes)
    with monkeypatch.context() as only_today:
        only_today.setattr(BaseBroker, "listed_since", lambda self, now: now - back)
        on.script.do["place_order"] = raising(OutcomeUnknown("Lost."))
        unknown(trader.place(LIMIT_ORDER, key="k"))
        wait_for(lambda: "do not reach back" in caplog.text, "a listing that proves nothing")
        again = trader.place(LIMIT_ORDER, key="k", timeout=1)
        unknown(again)
        assert again["ex"] == trader.state(key="k")["ex"]
        assert ("in the broker's own app" in again["ex"]) is (minutes == 0)
        assert len(on.script.calls("place_order")) == 1
    del on.script.do["place_order"]
    assert until(lambda: trader.place(LIMIT_ORDER, key="k"), "").ok  # settled by the lists
    assert len(on.script.calls("place_order")) == 2


def test_a_time_without_a_zone_is_this_machines(on: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """As somebody's own `listed_since` may have it."""
    trader = on.trader()
    since = datetime.now() - timedelta(days=1)
    monkeypatch.setattr(BaseBroker, "listed_since", lambda self, now: since)
    on.script.do["place_order"] = raising(OutcomeUnknown("Lost."))
    with on.script.hold("recent_orders"):
        unknown(trader.place(LIMIT_ORDER, key="k"))
        unknown(trader.state(key="k"))
    del on.script.do["place_order"]
    assert until(lambda: trader.place(LIMIT_ORDER, key="k"), "").ok


def test_listings_prove_nothing_while_the_clock_is_behind(on: Stage, tmp_path: Path) -> None:
    """A machine without a clock of its own starts with the time at which it was switched off, and
    asks the broker for orders until then."""
    trader = on.trader()
    on.script.do["place_order"] = raising(OutcomeUnknown("Lost."))

    def move(days: int) -> None:
        with (
            closing(sqlite3.connect(tmp_path / "journal.sqlite", timeout=30)) as database,
            database,
        ):
            database.execute("UPDATE orders SET created = created + ?", (days * 86400,))

    with on.script.hold("recent_orders"):
        unknown(trader.place(LIMIT_ORDER, key="k"))
        move(1)
    on.script.arrived("recent_orders", len(on.script.calls("recent_orders")) + 4)
    unknown(trader.state(key="k"))
    unknown(trader.place(LIMIT_ORDER, key="k", timeout=1))
    move(-1)  # the clock is right again
    del on.script.do["place_order"]
    assert until(lambda: trader.place(LIMIT_ORDER, key="k"), "").ok
    assert len(on.script.calls("place_order")) == 2


def test_found_while_the_call_still_runs(tmp_path: Path) -> None:
    with stage(tmp_path) as on:
        on.ready()
        trader = on.trader()
        stuck = threading.Event()
        on.script.do["place_order"] = accepting(on.script, lambda **_: stuck.wait(300))
        try:
            left_at_the_broker(on)
            assert until(lambda: trader.state(key="k"), "")["order"]["orderId"] == "69788888"
            again = trader.place(LIMIT_ORDER, key="k")
            assert again.replayed and again["orderId"] == "69788888"
            assert again.seconds < 20, "it does not wait for the call"
        finally:
            stuck.set()


def test_found_while_a_repetition_waits_for_the_call(on: Stage) -> None:
    """A push tells of the order; the answer to the call itself is lost."""
    placing = on.gateway.instance(INSTANCE)._placing
    await_placement, pushed = placing._await_placement, threading.Event()

    def waiting(placement: Any, deadline: float, *, replayed: bool) -> Any:
        if replayed:
            on.script.brokers[-1].report(on.script.orders[0])
            journal = on.gateway._journal
            wait_for(lambda: journal.by_client_order_id(INSTANCE, "k").state == PLACED, "the push")
            pushed.set()
        return await_placement(placement, deadline, replayed=replayed)

    placing._await_placement = waiting
    on.script.do["place_order"] = accepting(on.script, lambda **_: pushed.wait(300) and LOST())
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=30)
        wait_for(lambda: on.script.orders, "the order to reach the broker")
        again = on.trader().place(LIMIT_ORDER, key="k", timeout=30)
        unknown(first.result(60))
    assert again.replayed and again["orderId"] == "69788888", again


class TwoLines(ScriptedBroker):
    connections = {
        "trade": tuple(set(OPERATIONS) - {"recent_orders"}),
        "list": ("recent_orders",),
    }


def test_a_listing_beside_a_running_call(tmp_path: Path) -> None:
    with stage(tmp_path, kind=TwoLines, hard_limit=60.0) as on:
        on.ready()
        trader = on.trader()
        with on.script.hold("place_order"):
            left_at_the_broker(on)
            before = len(on.script.calls("recent_orders"))
            on.script.arrived("recent_orders", before + 4)
            unknown(trader.state(key="k"))
        assert until(lambda: trader.state(key="k"), "")["order"]["orderId"] == "69788888"


def test_a_listing_that_began_before_the_order_proves_nothing(tmp_path: Path) -> None:
    with stage(tmp_path, kind=TwoLines, hard_limit=60.0) as on:
        on.ready()
        trader = on.trader()
        assert trader.orders().ok  # and with it the gateway's own first listing has ended
        lists = on.gateway.instance(INSTANCE).workers["list"]
        before = len(on.script.calls("recent_orders"))
        empty: list[OrderReport] = []
        early, later = threading.Event(), threading.Event()

        def listing(**_: Any) -> list[OrderReport]:
            """The two that were asked for before the order know nothing of it."""
            if len(on.script.calls("recent_orders")) - before <= 2:
                early.wait(300)
                return empty
            later.wait(300)
            return list(on.script.orders)

        on.script.do["recent_orders"] = listing
        try:
            with ThreadPoolExecutor(2) as pool:
                asked = [pool.submit(on.trader().orders) for _ in range(2)]
                on.script.arrived("recent_orders", before + 1)
                wait_for(lists.queued, "the second to queue")
                on.script.do["place_order"] = accepting(on.script, LOST)
                unknown(trader.place(LIMIT_ORDER, key="k"))
                early.set()
                assert all(one.result(60).ok for one in asked)
            unknown(trader.state(key="k"))
            on.script.arrived("recent_orders", before + 3)  # settlement's own
            unknown(trader.state(key="k"))
        finally:
            early.set()
            later.set()
        until(lambda: trader.state(key="k"), "")


def test_a_call_that_ends_in_the_middle_of_a_look_is_over_from_then_on(tmp_path: Path) -> None:
    """That look has not read its row, and does not forget its end."""

    class ShowsLateBeside(TwoLines):
        listing_delay = 0.5

    with (
        stage(tmp_path, kind=ShowsLateBeside, hard_limit=60.0) as on,
        ThreadPoolExecutor(1) as pool,
    ):
        on.ready()
        lost, told = threading.Event(), threading.Event()
        over: list[float] = []
        listed: list[float] = []

        def place_order(**_: Any) -> Any:
            lost.wait(300)
            over.append(time.monotonic())
            return LOST()

        def recent_orders(**_: Any) -> list[OrderReport]:
            listed.append(time.monotonic())
            told.wait(300)
            return []

        def state() -> Answer:
            on.script.brokers[-1].restored()
            return on.trader().state(key="k")

        on.script.do["place_order"] = place_order
        try:
            sent = pool.submit(on.trader().place, LIMIT_ORDER, key="k")
            on.script.arrived("place_order")
            on.script.do["recent_orders"] = recent_orders
            on.script.brokers[-1].restored()
            wait_for(lambda: listed, "the look")
            lost.set()
            unknown(sent.result(60))
        finally:
            lost.set()
            told.set()
        until(state, "ORDER_NOT_FOUND")
        assert listed[-1] - over[0] >= 3 * ShowsLateBeside.listing_delay, (over, listed)


def test_a_record_that_fails_late_ends_no_other_call_under_its_name(on: Stage) -> None:
    """Both have the same mark: the journal knows of no earlier order."""
    journal, settling = on.gateway._journal, on.gateway.instance(INSTANCE).settlement
    begin, late = journal.begin, Future[Any]()
    journal.begin = lambda *order: late
    assert on.trader().place(LIMIT_ORDER, key="k", timeout=1).error["outcome"] == "none"
    journal.begin = begin
    with ThreadPoolExecutor(1) as pool:
        with on.script.hold("place_order"):
            sent = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=30)
            on.script.arrived("place_order")
            late.set_exception(Busy("The disk is full.", retry_after=5))
            mark = on.script.calls("place_order")[0].arguments["mark"]
            assert mark in settling._calls, "nobody may look for an order that is being sent"
        assert sent.result(60).ok


def test_an_order_that_begins_in_the_middle_of_a_look_is_not_missing_from_it(
    tmp_path: Path,
) -> None:
    """Its row is there when those of earlier orders are read, and its call has just begun."""
    with stage(tmp_path, kind=TwoLines, hard_limit=60.0) as on, ThreadPoolExecutor(1) as pool:
        on.ready()
        journal, settling = on.gateway._journal, on.gateway.instance(INSTANCE).settlement
        unsettled, judge, sent = journal.unsettled, settling._judge, threading.Event()
        sending: list[Any] = []
        missing: list[str | None] = []

        def read(instance_id: str) -> Any:
            if unsettled(instance_id) and not sending:
                on.script.do["place_order"] = lambda **_: sent.wait(300) and LOST()
                sending.append(pool.submit(on.trader().place, LIMIT_ORDER, key="k"))
                on.script.arrived("place_order", 2)
            return unsettled(instance_id)

        def judging(rows: list[Any], *about: Any) -> Any:
            missing.extend(row.client_order_id for row in rows)
            return judge(rows, *about)

        journal.unsettled, settling._judge = read, judging
        on.script.do["place_order"] = LOST
        try:
            unknown(on.trader().place(LIMIT_ORDER, key="before"), "before")
            wait_for(lambda: missing, "the listing to be judged")
            assert set(missing) == {"before"}
        finally:
            sent.set()
        unknown(sending[0].result(60))


def test_an_order_whose_time_passes_in_the_middle_of_a_look_is_looked_for(tmp_path: Path) -> None:
    """Its call hangs on, so nothing else brings the next look."""
    with stage(tmp_path, kind=TwoLines, hard_limit=60.0) as on:
        on.ready()
        settling = on.gateway.instance(INSTANCE).settlement
        looking, hanging = threading.Event(), threading.Event()
        before = len(on.script.calls("recent_orders"))

        def listing(**_: Any) -> list[OrderReport]:
            listed = list(on.script.orders)
            looking.wait(300)
            return listed

        on.script.do["recent_orders"] = listing
        on.script.do["place_order"] = accepting(on.script, lambda **_: hanging.wait(300))
        try:
            settling.connected()
            on.script.arrived("recent_orders", before + 1)
            unknown(on.trader().place(LIMIT_ORDER, key="k", timeout=1))
            looking.set()
            find = on.gateway._journal.by_client_order_id
            wait_for(lambda: find(INSTANCE, "k").state == PLACED, "it to be found")
        finally:
            looking.set()
            hanging.set()


def test_deadlines_that_pass_at_any_moment(tmp_path: Path) -> None:
    """In the queue, while it is recorded, while it is sent, just after: what a client is told is
    true at that moment, and in the end each order is there once."""
    with stage(tmp_path, hard_limit=0.2) as on:
        on.ready()
        instance = on.gateway.instance(INSTANCE)
        lock = threading.Lock()
        keys_there: list[str] = []
        refused: set[str] = set()

        def place_order(**arguments: Any) -> str:
            chance = random.Random(arguments["mark"])
            time.sleep(chance.uniform(0, 0.02))
            what = chance.random()
            key = arguments["client_order_id"]
            if what < 0.1:
                with lock:
                    refused.add(key)
                raise Rejected("No.")
            if what < 0.2:
                raise OutcomeUnknown("Cut before it arrived.")
            if what < 0.25:
                raise RateLimited("Too fast.")
            with lock:
                keys_there.append(key)
                order_id: str = on.script.usual("place_order", arguments)
            time.sleep(chance.uniform(0, 0.02))
            if what < 0.35:
                raise OutcomeUnknown("Cut after it arrived.")
            return order_id

        on.script.do["place_order"] = place_order
        problems: list[str] = []

        def trade(number: int) -> None:
            chance = random.Random(number)
            for key in (f"{number}-{each}" for each in range(12)):
                in_doubt = False
                end = time.monotonic() + 120
                for turn in itertools.count():
                    patience = chance.uniform(0, 0.08) if turn < 4 else 30.0
                    if time.monotonic() > end:
                        problems.append(f"{key}: never answered")
                        break
                    try:
                        placed = instance.place(REQUEST, key, time.monotonic() + patience)
                    except Rejected:
                        if key not in refused or key in keys_there:
                            problems.append(f"{key}: refused, they say")
                        break
                    except HttpTradingError as error:
                        in_doubt = in_doubt or error.outcome == "unknown"
                        if not in_doubt and key in keys_there:
                            problems.append(f"{key}: not sent, they say: {error!r}")
                        time.sleep(0.01)  # a connection that is being made again refuses at once
                        continue
                    marks = [call.arguments for call in on.script.calls("place_order")]
                    mine = {one["mark"] for one in marks if one["client_order_id"] == key}
                    there = [one for one in list(on.script.orders) if one.mark in mine]
                    if [one.order.order_id for one in there] != [placed.order_id]:
                        problems.append(f"{key}: {placed} is not {there}")
                    break

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(trade, range(8)))
        assert not problems, problems
        assert max(Counter(keys_there).values()) == 1
        assert len(keys_there) + len(refused - set(keys_there)) == 8 * 12
        wait_for(lambda: instance.state().unsettled == 0 or None, "every row to be settled")


# --- marks --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "told",
    [
        lambda now: {"time": now},
        lambda now: {"time": now.replace(tzinfo=None)},
        lambda now: {"time": now - timedelta(minutes=3)},  # by the broker's clock
        lambda now: {"contract": None},
        lambda now: {"order": Order("69788888", "USD", 0)},
    ],
)
def test_an_order_like_it_without_a_mark_keeps_it_unknown(
    on: Stage, told: Callable[[datetime], dict[str, Any]]
) -> None:
    """A broker that drops the tag: the listing may or may not have the order. Nobody guesses."""
    trader = on.trader()

    def unmarked(**arguments: Any) -> str:
        arguments["mark"] = ""
        on.script.usual("place_order", arguments)
        on.script.orders[0] = replace(on.script.orders[0], **told(datetime.now(UTC)))
        raise OutcomeUnknown("The line was cut.")

    on.script.do["place_order"] = unmarked
    unknown(trader.place(LIMIT_ORDER, key="k"))
    before = len(on.script.calls("recent_orders"))
    on.script.arrived("recent_orders", before + 4)
    unknown(trader.state(key="k"))
    unknown(trader.place(LIMIT_ORDER, key="k", timeout=1))
    assert len(on.script.calls("place_order")) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"contract": Contract(TradeType.Securities, "MSFT", "US")},
        {"direction": "SELL"},
        {"order": Order("77", "USD", 13)},
        {"mark": "somebody else's"},
        {"order_type": OrderType.Market},
        {"time": datetime.now(UTC) - timedelta(hours=1)},
    ],
)
def test_a_persons_own_order_beside_it_is_no_hindrance(on: Stage, changes: dict[str, Any]) -> None:
    trader = on.trader()
    by_hand = OrderReport(Order("77", "USD", 12), contract=AAPL, direction="BUY")
    on.script.orders.append(replace(by_hand, **changes))
    on.script.do["place_order"] = LOST
    unknown(trader.place(LIMIT_ORDER, key="k"))
    until(lambda: trader.state(key="k"), "ORDER_NOT_FOUND")


def test_an_order_that_is_listed_without_an_id_is_looked_for_until_it_has_one(on: Stage) -> None:
    before = len(on.script.calls("recent_orders"))

    def recent_orders(**_: Any) -> list[OrderReport]:
        [there] = on.script.orders
        late = len(on.script.calls("recent_orders")) > before + 4
        return [there if late else replace(there, order=replace(there.order, order_id=""))]

    on.script.do |= {
        "place_order": accepting(on.script, LOST),
        "recent_orders": recent_orders,
    }
    unknown(on.trader().place(LIMIT_ORDER, key="k"))
    assert until(lambda: on.trader().state(key="k"), "")["order"]["orderId"] == "69788888"


def test_a_listing_from_before_the_refusal_does_not_call_it_in_question(tmp_path: Path) -> None:
    with stage(tmp_path, kind=TwoLines, hard_limit=60.0) as on, ThreadPoolExecutor(1) as pool:
        on.ready()
        refused, told = threading.Event(), threading.Event()

        def refuse(**_: Any) -> Any:
            refused.wait(300)
            raise Rejected("No buying power.")

        def recent_orders(**_: Any) -> list[OrderReport]:
            listed = list(on.script.orders)
            told.wait(300)
            on.script.orders.clear()
            return listed

        on.script.do["place_order"] = accepting(on.script, refuse)
        try:
            answer = pool.submit(on.trader().place, LIMIT_ORDER, key="k")
            wait_for(lambda: on.script.orders, "the order to be there for a moment")
            on.script.do["recent_orders"] = recent_orders
            before = len(on.script.calls("recent_orders"))
            on.script.brokers[-1].restored()
            on.script.arrived("recent_orders", before + 1)
            refused.set()
            assert answer.result(60).code == "BROKER_REJECTED"
            told.set()
            on.script.brokers[-1].restored()
            on.script.arrived("recent_orders", before + 2)  # so the first has been recorded
            node = on.trader().order(key="k")
            assert (node["errorReason"], node["isCompleted"]) == ("No buying power.", True)
        finally:
            refused.set()
            told.set()


def test_an_earlier_order_of_the_same_content_is_no_hindrance(on: Stage) -> None:
    trader = on.trader()
    on.script.orders.append(OrderReport(Order("77", "USD", 12), contract=AAPL, direction="BUY"))
    assert [row["orderId"] for row in trader.orders()["orders"]] == ["77"]
    on.script.do["place_order"] = LOST
    unknown(trader.place(LIMIT_ORDER, key="k"))
    until(lambda: trader.state(key="k"), "ORDER_NOT_FOUND")


def test_a_push_settles(on: Stage) -> None:
    """Before the answer, without a listing."""
    trader = on.trader()
    on.script.do["recent_orders"] = raising(TimedOut("Slow."))
    pushed: list[OrderReport] = []

    def push(**_: Any) -> Any:
        pushed.append(on.script.orders[-1])
        on.script.brokers[-1].report(pushed[-1])
        raise OutcomeUnknown("The line was cut.")

    on.script.do["place_order"] = accepting(on.script, push)
    unknown(trader.place(LIMIT_ORDER, key="k"))
    answer = until(lambda: trader.state(key="k"), "")
    assert answer["order"]["orderId"] == pushed[0].order.order_id


def test_a_push_that_comes_between_two_repetitions_answers_both(on: Stage) -> None:
    """The second has not found the order yet and waits for the first, which then finds it."""
    trader = on.trader()
    on.script.do |= {
        "place_order": accepting(on.script, LOST),
        "recent_orders": raising(TimedOut("Slow.")),
    }
    unknown(trader.place(LIMIT_ORDER, key="k"))
    placing, journal = on.gateway.instance(INSTANCE)._placing, on.gateway._journal
    await_placement, look_up = placing._await_placement, journal.by_client_order_id
    looking, waiting = threading.Event(), threading.Event()

    def awaiting(*arguments: Any, **options: Any) -> Any:
        waiting.set()
        return await_placement(*arguments, **options)

    def looking_up(*names: Any) -> Any:
        if not looking.is_set():
            looking.set()
            waiting.wait(60)
            on.script.brokers[-1].report(on.script.orders[0])
            wait_for(lambda: look_up(*names).state == PLACED, "the push to be recorded")
        return look_up(*names)

    placing._await_placement, journal.by_client_order_id = awaiting, looking_up
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=30)
        looking.wait(60)
        second = trader.place(LIMIT_ORDER, key="k", timeout=30)
        assert first.result(60).replayed and second.replayed
    assert second.seconds < 20, "not its own 30 s"


class NoListing(ScriptedBroker):
    recent_orders = BaseBroker.recent_orders  # type: ignore[assignment]


def test_without_a_listing_it_stays_unknown(tmp_path: Path) -> None:
    with stage(tmp_path, kind=NoListing) as on:
        trader = on.trader()
        until(trader.cash, "")
        on.script.do["place_order"] = accepting(on.script, LOST)
        unknown(trader.place(LIMIT_ORDER, key="k"))
        again = trader.place(LIMIT_ORDER, key="k", timeout=30)
        unknown(again)
        assert again.seconds < 20, "there is nothing to wait for"
        assert on.gateway.instance(INSTANCE).settlement._look() is None, "nor to look for again"
        on.script.brokers[-1].report(on.script.orders[0])
        until(lambda: trader.state(key="k"), "")
        assert len(on.script.calls("place_order")) == 1


# --- restarts -----------------------------------------------------------------------------------
def test_rows_of_an_earlier_life(tmp_path: Path) -> None:
    """What a crash leaves, whatever line it struck at."""
    with closing(Journal(f"sqlite:///{tmp_path / 'journal.sqlite'}")) as journal:
        rows = {
            key: journal.begin(INSTANCE, key, 1, REQUEST).result(60)[0]
            for key in ("arrived", "lost", "unknown", "placed", "refused", "never")
        }
        for key, outcome in (
            ("unknown", Outcome(UNKNOWN)),
            ("placed", Outcome(PLACED, order_id="3")),
            ("refused", Outcome(REFUSED, reason="No buying power.")),
            ("never", Outcome(NOT_PLACED, reason="Busy.")),
        ):
            journal.settle(rows[key], outcome).result(60)
        marks = {key: journal.mark(INSTANCE, key, 1) for key in rows}

    def remember(script: Script) -> None:
        script.orders += [
            OrderReport(Order(order_id, "USD", 12), mark=marks[key], contract=AAPL)
            for order_id, key in (("1", "arrived"), ("2", "unknown"), ("3", "placed"))
        ]

    with stage(tmp_path, before=remember) as on:
        trader = on.trader()
        for key, order_id in (("arrived", "1"), ("unknown", "2"), ("placed", "3")):
            answer = until(lambda key=key: trader.state(key=key), "")  # type: ignore[misc]
            assert answer["order"]["orderId"] == order_id
            again = trader.place(LIMIT_ORDER, key=key)
            assert again.replayed and again["orderId"] == order_id
        until(lambda: trader.state(key="lost"), "ORDER_NOT_FOUND")
        assert on.script.calls("place_order") == []
        refused = trader.place(LIMIT_ORDER, key="refused")
        assert refused.replayed and refused.body["ex"] == "No buying power."
        for key in ("lost", "never"):
            assert not trader.place(LIMIT_ORDER, key=key).replayed
        assert len(on.script.calls("place_order")) == 2
        assert trader.get("instance/state").ok


def test_the_time_since_a_crash_counts_over_restarts(tmp_path: Path) -> None:
    """However soon they follow each other: a lost order does not stay unknown for ever."""

    class BooksLate(ScriptedBroker):
        booked_within = 3600.0

    path = tmp_path / "journal.sqlite"
    with closing(Journal(f"sqlite:///{path}")) as journal:
        journal.begin(INSTANCE, "lost", 1, REQUEST).result(60)
    with stage(tmp_path, kind=BooksLate) as on:
        on.ready()
        wait_for(lambda: len(on.script.calls("recent_orders")) >= 3, "listings without it")
        unknown(on.trader().state(key="lost"), "lost")
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE orders SET updated = updated - 3700")  # an hour later
    with stage(tmp_path, kind=BooksLate) as on:
        until(lambda: on.trader().state(key="lost"), "ORDER_NOT_FOUND")


def test_a_call_of_before_was_not_over_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row may be old: nobody knows how long it was being sent. (The journal was just too busy
    for a note of that.)"""

    class BooksLate(ScriptedBroker):
        booked_within = 3600.0

    path = tmp_path / "journal.sqlite"
    with closing(Journal(f"sqlite:///{path}")) as journal:
        journal.begin(INSTANCE, "lost", 1, REQUEST).result(60)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("UPDATE orders SET updated = updated - 3700")
    monkeypatch.setattr(settlement.Settlement, "_note_calls_of_before", lambda self: None)
    with stage(tmp_path, kind=BooksLate) as on:
        on.ready()
        on.script.arrived("recent_orders", 3)
        unknown(on.trader().state(key="lost"), "lost")


CRASH = """
import os, sys
from pathlib import Path
from httptrading.brokers.journal import Journal
from httptrading.brokers.settlement import Settlement
from simulators.scripted import LIMIT_ORDER, stage

folder, place = Path(sys.argv[1]), sys.argv[2]

def crash(*_, **__):
    os._exit(9)

with stage(folder / "data") as on:
    on.ready()
    def at_the_broker(**arguments):
        if place == "before the SDK is called":
            crash()
        with open(folder / "broker", "a") as book:
            book.write(arguments["mark"] + chr(10))
        if place == "before the SDK returns":
            crash()
        return "1"
    on.script.do["place_order"] = at_the_broker
    if place == "before the row is durable":
        on.gateway._journal._database._commits._commit = crash
    if place == "before the outcome is durable":
        Journal.settle = crash
    if place == "before the answer":
        Settlement.call_ended = crash
    on.trader().place(LIMIT_ORDER, key="k")
"""


@pytest.mark.parametrize(
    ("place", "sent"),
    [
        ("before the row is durable", 0),
        ("before the SDK is called", 0),
        ("before the SDK returns", 1),
        ("before the outcome is durable", 1),
        ("before the answer", 1),
    ],
)
def test_a_crash_between_any_two_steps(tmp_path: Path, place: str, sent: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path), place],
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin"},
        timeout=300,
    )
    assert done.returncode == 9
    book = tmp_path / "broker"
    marks = book.read_text().split() if book.exists() else []
    assert len(marks) == sent

    def remember(script: Script) -> None:
        script.orders += [OrderReport(Order("1", "USD", 12), mark=mark) for mark in marks]

    with stage(tmp_path / "data", before=remember) as on:
        trader = on.trader()
        answer = until(lambda: trader.place(LIMIT_ORDER, key="k", timeout=30), "")
        assert answer.replayed is bool(sent)
        assert len(on.script.calls("place_order")) + sent == 1
        assert answer["orderId"] == on.script.orders[0].order.order_id
        assert trader.order(key="k")["orderId"] == answer["orderId"]


def test_a_stop_while_an_order_is_being_sent(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        with stage(tmp_path, hard_limit=60.0) as on:
            on.ready()
            gate = threading.Event()
            on.script.do["place_order"] = accepting(on.script, lambda **_: gate.wait(300))
            sending = pool.submit(on.trader().place, LIMIT_ORDER, key="sent", timeout=30)
            on.script.arrived("place_order")
            queued = pool.submit(on.trader().place, LIMIT_ORDER, key="queued", timeout=30)
            instance = on.gateway.instance(INSTANCE)
            wait_for(lambda: instance.workers["trade"].queued() or None, "the second to queue")
            on.gateway.drain()
            busy = queued.result(60)
            assert (busy.status, busy.code, busy.error["outcome"]) == (503, "BUSY", "none")
            unknown(sending.result(60), "sent")
            gate.set()
            # As long as it runs, nobody else may have the instance.
            wait_for(lambda: not instance.is_stuck, "the call to end")
            there = list(on.script.orders)

    def remember(script: Script) -> None:
        script.orders += there

    with stage(tmp_path, before=remember) as on:
        trader = on.trader()
        assert until(lambda: trader.state(key="sent"), "")["order"]["orderId"] == "69788888"
        assert not trader.place(LIMIT_ORDER, key="queued").replayed


def test_a_stop_does_not_wait_for_a_settlement(tmp_path: Path) -> None:
    with stage(tmp_path, hard_limit=60.0) as on, ThreadPoolExecutor(1) as pool:
        on.ready()
        on.script.do["recent_orders"] = raising(TimedOut("Slow."))
        on.script.do["place_order"] = LOST
        unknown(on.trader().place(LIMIT_ORDER, key="k"))
        waiting = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=30)
        on.script.arrived("recent_orders", 3)
        on.gateway.drain()
        answer = waiting.result(60)
        unknown(answer)
        assert answer.seconds < 25, "not its own 30 s"


def test_a_stuck_order_keeps_its_instance(tmp_path: Path) -> None:
    """Whoever came next would conclude that the order is not there, and the call still runs."""
    with stage(tmp_path) as on:
        on.ready()
        gate = threading.Event()
        on.script.do["place_order"] = accepting(on.script, lambda **_: gate.wait(300))
        left_at_the_broker(on)
        on.gateway.close(0.2)
        with stage(tmp_path) as other:
            answer = other.trader().place(LIMIT_ORDER, key="k")
            assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE"), answer
            assert other.script.received == []
        gate.set()


def test_a_broker_that_is_down_is_not_asked_without_pause(on: Stage) -> None:
    down = raising(BrokerUnavailable("Down."))
    instance = on.gateway.instance(INSTANCE)
    asked: list[float] = []
    list_recent = instance.list_recent

    def counted(deadline: float) -> Any:
        asked.append(time.monotonic())
        return list_recent(deadline)

    def cut(**_: Any) -> Any:
        # All at once: no listing comes through that would settle it.
        on.script.do |= {"connect": down, "recent_orders": down}
        on.script.brokers[-1].lost("The line was cut")
        return LOST()

    instance.list_recent = counted
    on.script.do["place_order"] = cut
    unknown(on.trader().place(LIMIT_ORDER, key="k"))
    wait_for(lambda: len(asked) >= 3 or None, "settlement to try again")
    assert asked[2] - asked[0] >= 1.0
    del on.script.do["connect"], on.script.do["recent_orders"]
    trader = on.trader()
    until(lambda: trader.state(key="k"), "ORDER_NOT_FOUND")


def test_a_broker_is_not_asked_for_one_list_right_after_the_other(tmp_path: Path) -> None:
    class ShowsVeryLate(ScriptedBroker):
        listing_delay = 3600.0

    with stage(tmp_path, kind=ShowsVeryLate, hard_limit=60.0) as on:
        on.ready()
        before = len(on.script.calls("recent_orders"))
        on.script.do["place_order"] = LOST
        for _ in range(2):
            unknown(on.trader().place(LIMIT_ORDER, key="k", timeout=1))
        assert len(on.script.calls("recent_orders")) == before


def test_what_happened_while_away_is_looked_up(on: Stage) -> None:
    """Fills of an order that the listing does not show any more are asked for after a reconnect,
    even if the first listing fails."""
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    filled = replace(on.script.orders[0], order=Order(order_id, "USD", 12, 12, 200.5))
    failing = iter([raising(TimedOut("Slow."))])
    on.script.do["recent_orders"] = lambda **_: next(failing, list)()
    on.script.do["order"] = lambda **_: filled
    before = len(on.script.calls("recent_orders"))
    on.script.brokers[-1].restored()
    on.script.arrived("recent_orders", before + 1)

    def closed() -> Any:
        return trader.orders(status="closed")["orders"] or None

    (node,) = wait_for(closed, "the order to be known as filled")
    assert (node["orderId"], node["filledQty"], node["isFilled"]) == (order_id, 12, True)


def test_a_reconnect_in_the_middle_of_a_look_is_not_overlooked(on: Stage) -> None:
    """Another order is unsettled, and its row is just being read."""
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    filled = replace(on.script.orders[0], order=Order(order_id, "USD", 12, 12, 200.5))
    on.script.do["recent_orders"] = lambda **_: []
    on.script.do["order"] = lambda **_: filled
    journal = on.gateway._journal
    unsettled, reconnects = journal.unsettled, iter([on.script.brokers[-1].restored])

    def read(instance_id: str) -> Any:
        rows = unsettled(instance_id)
        if rows:
            next(reconnects, lambda: None)()
        return rows

    journal.unsettled = read
    on.script.do["place_order"] = LOST
    unknown(on.trader().place(LIMIT_ORDER, key="k"))

    def closed() -> Any:
        return trader.orders(status="closed")["orders"] or None

    (node,) = wait_for(closed, "the order to be known as filled")
    assert (node["orderId"], node["filledQty"], node["isFilled"]) == (order_id, 12, True)


# --- a memory longer than the broker's ----------------------------------------------------------
def test_orders_stay_when_the_broker_has_forgotten_them(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    with stage(tmp_path) as on:
        on.ready()
        trader = on.trader()
        ids = [trader.placed({**LIMIT_ORDER, "qty": qty}, key=f"k{qty}") for qty in (1, 2, 3)]
        done = replace(on.script.orders[0], order=Order(ids[0], "USD", 1, 1, 200))
        on.script.brokers[-1].report(done)
        fill = Fill("f1", ids[0], 1, 200, now)
        on.script.brokers[-1].report_fills(fill)
        wait_for(lambda: trader.order(ids[0])["isFilled"] or None, "the push to be recorded")
        wait_for(lambda: trader.fills(ids[0])["fills"] or None, "the fill to be recorded")
    with stage(tmp_path) as on:  # and the new broker knows nothing
        on.ready()
        trader = on.trader()
        for name in ({"order_id": ids[0]}, {"key": "k1"}):
            node = trader.order(**name)
            assert (node["filledQty"], node["avgPrice"], node["isFilled"]) == (1, 200, True)
        assert [one["qty"] for one in trader.fills(ids[0])["fills"]] == [1]
        nodes = trader.orders()["orders"]
        assert [node["orderId"] for node in nodes] == ids[::-1]
        assert nodes[0]["clientOrderId"] == "k3" and nodes[0]["price"] == Decimal("200.01")
        assert [node["orderId"] for node in trader.orders(status="open")["orders"]] == ids[:0:-1]
        assert [node["orderId"] for node in trader.orders(status="closed")["orders"]] == ids[:1]
        assert len(trader.orders(limit=1)["orders"]) == 1
        later = (now + timedelta(hours=1)).isoformat()
        assert trader.orders(since=later)["orders"] == []
        assert trader.cancel(ids[0]).code == "BROKER_REJECTED"
        nobody = trader.state("nobody-knows-it")
        assert (nobody.status, nobody.code) == (404, "ORDER_NOT_FOUND")
        assert trader.fills("nobody-knows-it").code == "ORDER_NOT_FOUND"


def test_a_filled_order_is_told_with_the_price_of_all_fills(on: Stage) -> None:
    """TWS's list of what is completed says before the executions, and without a price, how much."""
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    on.script.do["order"] = raising(BrokerUnavailable("down"))
    for pushed in (Order(order_id, "USD", 12, 3, 12), Order(order_id, "USD", 12, 12, 0)):
        on.script.brokers[-1].report(OrderReport(pushed))
        wait_for(
            lambda qty=pushed.filled_qty: trader.orders()["orders"][0]["filledQty"] == qty or None,
            "the push to be recorded",
        )
    node = trader.order(order_id)
    assert (node["isFilled"], node["avgPrice"]) == (True, 12), "what is known, while it is down"
    on.script.do["order"] = lambda **_: Order(order_id, "USD", 12, 12, Decimal("12.3"))
    assert trader.order(order_id)["avgPrice"] == Decimal("12.3")
    on.script.do["order"] = raising(BrokerUnavailable("down"))
    assert trader.order(order_id)["avgPrice"] == Decimal("12.3")


def test_the_same_answer_again_is_news_after_another_word(on: Stage) -> None:
    """A push says that it is being cancelled, and the broker, asked again, that it is not."""
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    working = Order(order_id, "USD", 12)
    on.script.do["order"] = lambda **_: replace(working)  # equal, but not the same

    def is_pending() -> bool:
        (node,) = on.gateway.instance(INSTANCE).orders(
            open_=True, since=None, limit=1, deadline=time.monotonic() + 30
        )
        return node.order.is_pending_cancel

    on.script.do["recent_orders"] = lambda **_: []
    for _ in range(3):
        assert trader.order(order_id)["qty"] == 12
    on.script.brokers[-1].report(OrderReport(replace(working, is_pending_cancel=True)))
    wait_for(lambda: is_pending() or None, "the push to be recorded")
    assert trader.order(order_id)["qty"] == 12
    assert not is_pending()


def test_nothing_goes_backwards(on: Stage) -> None:
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    on.script.do["order"] = lambda **_: Order(order_id, "USD", 12, 8, 200.5)
    assert trader.order(order_id)["filledQty"] == 8
    for stale in (
        Order(order_id, "USD", 12, 3, 200.1, is_pending_cancel=True),
        Order(order_id, "USD", 12, 8, 0),
        Order(order_id, "USD", 12),
    ):
        on.script.do["order"] = lambda stale=stale, **_: stale
        node = trader.order(order_id)
        assert (node["filledQty"], node["avgPrice"]) == (8, Decimal("200.5"))
    on.script.do["order"] = lambda **_: Order(order_id, "USD", 12, 8, 200.5, is_canceled=True)
    assert trader.order(order_id)["isCanceled"] is True
    on.script.do["order"] = lambda **_: Order(order_id, "USD", 12, 8, 200.5)
    node = trader.order(order_id)
    assert (node["isCanceled"], node["isCompleted"]) == (True, True)


def test_more_filled_than_ordered_is_told_as_the_broker_tells_it(on: Stage) -> None:
    """FIX knows it as an overfill. Cut to the order's quantity, or left out, the shares beyond it
    would be in the account, and nobody would be told why."""
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    on.script.do["order"] = lambda **_: Order(order_id, "USD", 12, 15, 200.5)
    for _ in range(2):
        node = trader.order(order_id)
        assert (node["qty"], node["filledQty"], node["isFilled"]) == (12, 15, True)
    assert not node["isCanceled"] and not node["errorReason"]


def test_orders_of_others_are_listed_too(on: Stage) -> None:
    trader = on.trader()
    mine = trader.placed(LIMIT_ORDER, key="mine")
    on.script.orders.append(
        OrderReport(
            Order("by-hand", "HKD", 100), contract=Contract(TradeType.Securities, "00700", "HK")
        )
    )
    nodes = {node["orderId"]: node for node in trader.orders()["orders"]}
    assert set(nodes) == {mine, "by-hand"}
    assert nodes["by-hand"]["clientOrderId"] is None and nodes[mine]["clientOrderId"] == "mine"


class ListingBroker(ScriptedBroker):
    """Has a list, and no question for a single order."""

    order = BaseBroker.order  # type: ignore[assignment]


def test_an_order_that_can_only_be_looked_for_in_the_list(tmp_path: Path) -> None:
    with stage(tmp_path, kind=ListingBroker) as on:
        on.ready()
        trader = on.trader()
        order_id = trader.placed(LIMIT_ORDER, key="k")
        on.script.orders[0] = replace(
            on.script.orders[0], order=Order(order_id, "USD", 12, 12, 200, "")
        )
        assert trader.order(key="k")["filledQty"] == 12
        assert trader.state("by-hand").code == "ORDER_NOT_FOUND"


# --- stop switches ------------------------------------------------------------------------------
def test_cancel_all(on: Stage) -> None:
    trader = on.trader()
    ids = [trader.placed({**LIMIT_ORDER, "qty": qty}) for qty in (1, 2, 3)]
    lost = accepting(on.script, LOST)
    on.script.do["recent_orders"] = raising(TimedOut("Slow."))
    on.script.do["place_order"] = lost
    unknown(trader.place(LIMIT_ORDER, key="k"))
    del on.script.do["recent_orders"]
    hidden = on.script.orders[-1].order.order_id  # found by the listing that comes first
    done = replace(on.script.orders[0], order=Order(ids[0], "USD", 1, 1, 200))
    on.script.orders[0] = done
    canceled: list[str] = []

    def cancel(order_id: str) -> None:
        if order_id == ids[2]:
            raise Rejected("Too late.")
        canceled.append(order_id)

    on.script.do["cancel_order"] = cancel
    nodes = {node["orderId"]: node for node in trader.post("order/cancel-all", {})["orders"]}
    assert set(nodes) == {ids[1], ids[2], hidden}
    assert sorted(canceled) == sorted([ids[1], hidden])
    assert nodes[ids[1]]["requested"] is True and nodes[ids[1]]["ex"] is None
    assert nodes[ids[2]]["requested"] is False and nodes[ids[2]]["ex"] == "Too late."


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ('{"region": "HK", "ticker": "00700"}', 400),  # there is no such choice
        ("[]", 400),
        ("{", 400),
        ('{"a": "' + "x" * 70_000 + '"}', 413),
    ],
)
def test_cancel_all_takes_no_choice(on: Stage, text: str, status: int) -> None:
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    answer = trader.request("POST", "order/cancel-all", text=text)
    assert (answer.status, answer.code) == (status, "INVALID_REQUEST"), answer
    assert "cancel_order" not in [call.operation for call in list(on.script.received)]
    assert trader.order(order_id)["isCompleted"] is False


def test_cancel_all_takes_no_choice_in_a_query_either(on: Stage) -> None:
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    query = {"region": "HK", "ticker": "00700"}
    answer = trader.request("POST", "order/cancel-all", query=query)
    assert (answer.status, set(answer.error["fields"])) == (400, {"region", "ticker"}), answer
    assert "cancel_order" not in [call.operation for call in list(on.script.received)]
    assert trader.order(order_id)["isCompleted"] is False


def test_cancel_all_needs_no_body(on: Stage) -> None:
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    [node] = trader.request("POST", "order/cancel-all")["orders"]
    assert (node["orderId"], node["requested"]) == (order_id, True)


def open_orders(on: Stage, count: int) -> list[str]:
    """So many more at the broker, which the journal has not heard of."""
    ids = [str(80_000_000 + number) for number in range(count)]
    on.script.orders += [OrderReport(Order(order_id, "USD", 10), contract=AAPL) for order_id in ids]
    return ids


def test_cancel_all_does_not_wait_for_the_disk(on: Stage) -> None:
    trader: Trader = on.trader()
    ids = [trader.placed(LIMIT_ORDER), *open_orders(on, 2)]
    gate = threading.Event()
    on.gateway._journal._database._commits.post(lambda connection: gate.wait(300))
    try:
        nodes = trader.post("order/cancel-all", {})["orders"]
    finally:
        gate.set()
    assert {node["orderId"] for node in nodes if node["requested"]} == set(ids), nodes
    assert len(on.script.calls("cancel_order")) == 3


def test_cancel_all_leaves_none_out(on: Stage) -> None:
    ids = open_orders(on, 1001)
    nodes = on.trader().post("order/cancel-all", {}, timeout=30)["orders"]
    assert {node["orderId"] for node in nodes} == set(ids)


def test_cancel_all_ends_by_its_deadline(on: Stage) -> None:
    open_orders(on, 3)
    with on.script.hold("cancel_order"):
        answer = on.trader().post("order/cancel-all", {}, timeout=1)
    begun, *others = answer["orders"]
    assert not begun["requested"] and "no clear answer" in begun["ex"], answer
    assert all("nothing was sent" in node["ex"] for node in others), answer
    assert len(on.script.calls("cancel_order")) == 1


@pytest.mark.parametrize("error", [TimedOut("Slow."), ZeroDivisionError()])
def test_cancel_all_without_a_listing_cancels_what_is_known(
    on: Stage, error: BaseException
) -> None:
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    on.script.do["recent_orders"] = raising(error)
    done, rest = trader.post("order/cancel-all", {})["orders"]
    assert (done["orderId"], done["requested"]) == (order_id, True)
    assert (rest["orderId"], rest["requested"]) == ("", False)
    assert "others may be open" in rest["ex"]


class AccountBroker(ScriptedBroker):
    """Lists its orders over a connection of their own, as Tiger does."""

    connections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "trade": tuple(name for name in OPERATIONS if name != "recent_orders"),
        "account": ("recent_orders",),
    }


def test_cancel_all_leaves_time_for_cancelling(tmp_path: Path) -> None:
    with stage(tmp_path, kind=AccountBroker, hard_limit=60.0) as on:
        on.ready()
        trader = on.trader()
        order_id = trader.placed(LIMIT_ORDER)
        with on.script.hold("recent_orders"):
            answer = in_time(
                lambda seconds: trader.post("order/cancel-all", {}, timeout=seconds),
                lambda answer: answer.ok and answer["orders"][0]["requested"],
            )
    assert answer["orders"][0]["orderId"] == order_id, answer


def test_cancel_all_tells_of_what_it_cannot_reach(tmp_path: Path) -> None:
    with stage(tmp_path) as on:
        on.ready()
        trader = on.trader()
        order_id = trader.placed(LIMIT_ORDER)
        on.script.received.clear()
        with on.script.hold("place_order"):
            left_at_the_broker(on)
            reached, hidden = trader.post("order/cancel-all", {})["orders"]
            assert (reached["orderId"], reached["requested"]) == (order_id, True)
            assert (hidden["orderId"], hidden["requested"]) == ("", False)
            assert "clientOrderId=k" in hidden["ex"]


def test_read_only(tmp_path: Path) -> None:
    with stage(tmp_path, read_only=True) as on:
        offered = on.trader().get("instance/state")["state"]["operations"]
        assert "cash" in offered and not {"place_order", "cancel_order"} & set(offered)
        on.ready()
        trader = on.trader()
        for answer in (
            trader.place(LIMIT_ORDER, key="k"),
            trader.cancel("1"),
            trader.post("order/cancel-all", {}),
        ):
            assert (answer.status, answer.code) == (422, "UNSUPPORTED"), answer
            assert "read_only" in answer.body["ex"] and answer.error["outcome"] == "none"
        assert trader.state(key="k").code == "ORDER_NOT_FOUND"
        assert on.script.calls("place_order") + on.script.calls("cancel_order") == []
        assert trader.cash().ok and trader.orders().ok


def test_max_order_value(tmp_path: Path) -> None:
    limits = {"USD": Decimal("1000.00"), "*": Decimal("50")}
    with stage(tmp_path, max_order_value=limits) as on:
        on.ready()
        trader = on.trader()
        too_much = trader.place({**LIMIT_ORDER, "price": 100, "qty": 11}, key="k")
        assert (too_much.status, too_much.code) == (422, "UNSUPPORTED")
        assert "1100 USD" in too_much.body["ex"] and "1000" in too_much.body["ex"]
        assert trader.state(key="k").code == "ORDER_NOT_FOUND", "nothing was journaled"
        assert trader.place({**LIMIT_ORDER, "price": 100, "qty": 10}, key="k").ok
        hong_kong = {**LIMIT_ORDER, "region": "HK", "ticker": "700", "price": 1, "qty": 51}
        assert trader.place(hong_kong).code == "UNSUPPORTED"
        for counter in ("09839", "80700"):  # in dollars, and in yuan
            order = {**hong_kong, "ticker": counter}
            assert trader.place({**order, "qty": 1001}).code == "UNSUPPORTED"
            assert trader.place({**order, "qty": 1000}).ok == (counter == "09839")
        market = {**LIMIT_ORDER, "orderType": "Market", "qty": 87}  # the quote is 11.53
        del market["price"]
        assert trader.place(market).code == "UNSUPPORTED"
        assert trader.place({**market, "qty": 86}).ok
        on.script.do["quote"] = raising(OrderNotFound("no quote"))
        unpriced = trader.place({**market, "qty": 1, "ticker": "MSFT"})
        assert unpriced.code == "UNSUPPORTED" and "limit order" in unpriced.body["ex"]
        on.script.do["quote"] = raising(TimedOut("Slow."))
        later = trader.place({**market, "qty": 1, "ticker": "QQQ"})
        assert (later.code, later.error["outcome"]) == ("TIMEOUT", "none"), "may work next time"


def test_max_order_value_and_an_sdks_own_numbers(tmp_path: Path) -> None:
    class Float64(float):
        """As numpy's: it has a text of its own."""

        def __repr__(self) -> str:
            return f"np.float64({super().__repr__()})"

    def quote(**arguments: Any) -> Quote:
        usual: Quote = on.script.usual("quote", arguments)
        return replace(usual, latest=Float64(11.53))

    with stage(tmp_path, max_order_value={"USD": Decimal(1000)}) as on:
        on.ready()
        on.script.do["quote"] = quote
        market = {**LIMIT_ORDER, "orderType": "Market", "qty": 86}
        del market["price"]
        answer = on.trader().place(market)
        assert answer.ok, answer


# --- a disk that takes nothing more -------------------------------------------------------------
FULL_DISK = """
import resource, signal, sys, time
from pathlib import Path
from acceptance.kit import wait_for
from httptrading.errors import OutcomeUnknown
from httptrading.model import Fill
from simulators.scripted import LIMIT_ORDER, stage
from datetime import UTC, datetime

folder = Path(sys.argv[1])
everything = resource.getrlimit(resource.RLIMIT_FSIZE)
def full(limit=0):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, everything[1]))
def free():
    resource.setrlimit(resource.RLIMIT_FSIZE, everything)

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with stage(folder) as on:
    on.ready()
    trader = on.trader()
    first = trader.place(LIMIT_ORDER, key="first")
    assert first.ok, first

    full()
    for _ in range(3):
        refused = trader.place(LIMIT_ORDER, key="k")
        assert (refused.status, refused.code) == (503, "BUSY"), refused
        assert refused.error["outcome"] == "none" and "journal" in refused.body["ex"], refused
        assert "Retry-After" in refused.headers
    assert len(on.script.calls("place_order")) == 1, "nothing is sent unrecorded"
    # Reads, cancels and replays go on, with what the broker says now.
    on.script.do["order"] = lambda **_: moved
    moved = on.script.orders[0].order.__class__(first["orderId"], "USD", 12, 5, 200)
    assert trader.order(first["orderId"])["filledQty"] == 5
    on.script.orders[0] = on.script.orders[0].__class__(moved, on.script.orders[0].mark)
    (node,) = trader.orders()["orders"]
    assert (node["filledQty"], node["clientOrderId"]) == (5, "first"), node
    on.script.do["fills"] = lambda **_: [Fill("f", first["orderId"], 5, 200, datetime.now(UTC))]
    assert len(trader.fills(first["orderId"])["fills"]) == 1
    assert trader.cash().ok and trader.positions().ok and trader.ping().ok
    assert trader.place(LIMIT_ORDER, key="first").replayed
    assert trader.cancel(first["orderId"]).ok
    on.script.brokers[-1].report(on.script.orders[0])  # waits for the disk

    free()
    again = trader.place(LIMIT_ORDER, key="k")
    assert again.ok and not again.replayed, again

    # The disk fills up while an order is with the broker.
    def fill_up(**arguments):
        found = on.script.usual("place_order", arguments)
        full()
        return found
    on.script.do["place_order"] = fill_up
    placed = trader.place(LIMIT_ORDER, key="during")
    assert placed.ok, placed
    doubt = trader.place(LIMIT_ORDER, key="during", timeout=1)
    assert doubt.code in ("OUTCOME_UNKNOWN", "") and doubt.body.get("orderId") in (
        None, placed["orderId"]), doubt
    on.script.do["recent_orders"] = lambda **_: 1 / 0  # not by looking, but by remembering
    free()
    replay = wait_for(
        lambda: (lambda a: a if a.ok else None)(trader.place(LIMIT_ORDER, key="during", timeout=1)),
        "the outcome to be written",
    )
    assert replay.replayed and replay["orderId"] == placed["orderId"]
    assert len(on.script.calls("place_order")) == 3
    del on.script.do["recent_orders"]
    found = on.script.orders[0]

full()
with stage(folder) as on:  # a start on a full disk
    trader = on.trader()
    wait_for(lambda: trader.cash().ok, "the broker")
    on.script.orders.append(found)
    assert trader.order(first["orderId"])["qty"] == 12
    refused = trader.place(LIMIT_ORDER, key="start")
    assert (refused.status, refused.code) == (503, "BUSY"), refused
    assert on.script.calls("place_order") == []
    free()
    assert trader.place(LIMIT_ORDER, key="start").ok
    assert trader.order(key="first")["orderId"] == first["orderId"]
print("as it should be")
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """In a process of its own: the limit on the size of files holds for the whole process."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env={"PYTHONPATH": str(Path(__file__).parent), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "as it should be" in done.stdout, done.stdout + done.stderr


def test_a_journal_that_cannot_even_be_read(on: Stage, tmp_path: Path) -> None:
    """No order is placed; what the broker itself can tell and cancel goes on."""
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER, key="first")
    path = tmp_path / "journal.sqlite"
    path.rename(tmp_path / "away")
    path.mkdir()
    on.gateway._journal._database._let_go()
    on.gateway._journal._database._reader.dispose()
    for key in ("first", "new"):
        answer = trader.place(LIMIT_ORDER, key=key)
        assert (answer.status, answer.code) == (503, "BUSY"), answer
        assert "journal" in answer.body["ex"]
    assert len(on.script.calls("place_order")) == 1
    assert trader.cash().ok and trader.positions().ok
    assert trader.order(order_id)["qty"] == 12
    fill = Fill("f1", order_id, 1, 200, datetime.now(UTC))
    on.script.do["fills"] = lambda **_: [fill]
    assert len(trader.fills(order_id)["fills"]) == 1
    assert trader.state(key="first").code == trader.orders().code == "BUSY"
    (node,) = trader.post("order/cancel-all", {})["orders"]
    assert (node["orderId"], node["requested"]) == (order_id, True)
    assert trader.cancel(order_id).ok
    path.rmdir()
    (tmp_path / "away").rename(path)
    assert trader.place(LIMIT_ORDER, key="first").replayed


def test_a_journal_that_cannot_be_read_makes_nothing_unsent(on: Stage) -> None:
    """Busy would say that there is no such order."""
    journal = on.gateway._journal
    looked_up: list[Any] = []

    def unreadable(*names: Any) -> Any:
        looked_up.append(names)
        raise Busy("The order journal cannot be read.", retry_after=5)

    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as disk:
        with on.script.hold("place_order"):
            first = pool.submit(on.trader().place, LIMIT_ORDER, key="sent", timeout=30)
            on.script.arrived("place_order")
            disk.setattr(journal, "by_client_order_id", unreadable)
            again = pool.submit(on.trader().place, LIMIT_ORDER, key="sent", timeout=30)
            wait_for(lambda: looked_up, "the repetition")
        assert first.result(60).ok and again.result(60).ok
        disk.undo()
        on.script.do |= {"place_order": LOST, "recent_orders": raising(TimedOut("Slow."))}
        unknown(on.trader().place(LIMIT_ORDER, key="k"))
        disk.setattr(journal, "by_row_id", unreadable)
        unknown(on.trader().place(LIMIT_ORDER, key="k"))


def test_a_disk_that_hangs(on: Stage) -> None:
    """The request ends by its deadline, nothing is sent, and what is written late is settled."""
    trader: Trader = on.trader()
    commits = on.gateway._journal._database._commits
    gate = threading.Event()
    commits.post(lambda connection: gate.wait(300))
    try:
        for _ in range(2):  # nobody has to wait for one that will never be sent
            answer = trader.place(LIMIT_ORDER, key="k", timeout=1)
            assert answer.code in ("BUSY", "TIMEOUT") and answer.error["outcome"] == "none", answer
            assert answer.seconds < 20
        assert trader.cash().ok
        with ThreadPoolExecutor(1) as pool:
            waiting = commits._queue.qsize()
            patient = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=30)
            wait_for(lambda: commits._queue.qsize() > waiting, "its record to wait for the disk")
            gate.set()
            answer = patient.result(60)
        # Its record is the second of its name, unless the first request was too late for its own.
        assert answer.code in ("BUSY", "") and answer.seconds < 20, answer
    finally:
        gate.set()
    again = until(lambda: trader.place(LIMIT_ORDER, key="k"), "")
    assert again.replayed is answer.ok, "what was given up is not sent later"
    assert len(on.script.calls("place_order")) == 1


def test_a_disk_that_comes_back_just_when_it_is_given_up(on: Stage) -> None:
    """The request and the journal's thread both have an end for the order; one of them counts."""
    placing = on.gateway.instance(INSTANCE)._placing
    forget, gate = placing._forget, threading.Event()
    request = threading.current_thread()

    def later(placement: Any) -> Any:
        if threading.current_thread() is request and placement.call is not None:
            gate.set()
            wait_for(placement.done, "what the journal's thread says")
        return forget(placement)

    placing._forget = later
    on.gateway._journal._database._commits.post(lambda connection: gate.wait(300))
    try:
        answer = on.trader().place(LIMIT_ORDER, key="k", timeout=1)
    finally:
        gate.set()
    assert answer.code in ("BUSY", "TIMEOUT") and answer.error["outcome"] == "none", answer


@pytest.mark.parametrize("is_there", [False, True])
def test_a_record_that_failed_is_no_order_on_its_way(on: Stage, is_there: bool) -> None:
    """It may be there after all, if the line to the journal's server broke just then."""
    journal = on.gateway._journal
    begin = journal.begin

    def failing(*order: Any) -> Future[Any]:
        if is_there:
            begin(*order).result(60)
        failed: Future[Any] = Future()
        failed.set_exception(Busy("The journal cannot be written.", retry_after=5))
        return failed

    trader = on.trader()
    journal.begin = failing
    busy = trader.place(LIMIT_ORDER, key="k")
    assert busy.code == "BUSY" and busy.seconds < 20, busy
    workers = on.gateway.instance(INSTANCE).workers
    assert workers["trade"].queued() == 0, "its place in the queue is free again"
    journal.begin = begin
    until(lambda: trader.state(key="k"), "ORDER_NOT_FOUND")
    on.script.do["place_order"] = LOST
    unknown(trader.place(LIMIT_ORDER, key="k"))
    until(lambda: trader.state(key="k"), "ORDER_NOT_FOUND")
    assert len(on.script.calls("place_order")) == 1


def test_an_outcome_that_the_journal_does_not_take_is_looked_for(on: Stage) -> None:
    """The client is answered all the same."""
    journal = on.gateway._journal
    settle = journal.settle

    def settling(row_id: int, outcome: Outcome, **options: Any) -> Any:
        if outcome.state != PLACED:
            return settle(row_id, outcome, **options)
        failed: Future[Any] = Future()
        failed.set_exception(Busy("The order journal does not take this."))
        return failed

    journal.settle = settling
    order_id = on.trader().placed(LIMIT_ORDER, key="k")
    assert until(lambda: on.trader().state(key="k"), "")["order"]["orderId"] == order_id
    assert on.trader().place(LIMIT_ORDER, key="k").replayed


def test_without_a_listing_a_repetition_waits_for_the_outcome_to_be_written(tmp_path: Path) -> None:
    """There is nothing else that it could be learned from."""
    with stage(tmp_path, kind=NoListing) as on, ThreadPoolExecutor(1) as pool:
        trader = on.trader()
        until(trader.cash, "")
        journal = on.gateway._journal
        settle, free = journal.settle, threading.Event()
        attempts: list[Any] = []

        def settling(*outcome: Any, **options: Any) -> Any:
            attempts.append(outcome)
            if free.is_set():
                return settle(*outcome, **options)
            failed: Future[Any] = Future()
            failed.set_exception(Busy("The disk is full.", retry_after=5))
            return failed

        journal.settle = settling
        order_id = trader.placed(LIMIT_ORDER, key="k")
        again = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=30)
        wait_for(lambda: len(attempts) >= 3 or again.done(), "the recorder to try again")
        free.set()
        assert again.result(60).replayed and again.result()["orderId"] == order_id


def test_a_disk_that_hangs_holds_no_question_up(on: Stage) -> None:
    """What the broker has just said is answered, joined to what is known, and written later."""
    trader: Trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    gate = threading.Event()
    on.gateway._journal._database._commits.post(lambda connection: gate.wait(300))
    try:
        for filled in (3, 4):
            known = replace(on.script.orders[0].order, filled_qty=filled)
            on.script.orders[0] = replace(on.script.orders[0], order=known)
            found = until(lambda: trader.state(order_id, timeout=1), "")
            assert found["order"]["filledQty"] == filled, found
            listed = until(lambda: trader.orders(timeout=1), "")
            assert [node["filledQty"] for node in listed["orders"]] == [filled], listed
            assert max(found.seconds, listed.seconds) < 20
    finally:
        gate.set()
    wait_for(
        lambda: on.gateway._journal.by_order_id(INSTANCE, order_id).order.filled_qty == 4,
        "what was seen to be written",
    )


def test_memory_is_not_older_than_the_journal(on: Stage) -> None:
    """A final state that the list has told is not taken back by what was asked before it."""
    trader: Trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)

    def state() -> dict[str, Any]:
        remembered = {"Cache-Control": "max-age=60"}
        query = {"orderId": order_id}
        return trader.request("GET", "order/state", query=query, headers=remembered)["order"]

    def at_the_broker(**fields: Any) -> None:
        now = replace(on.script.orders[0].order, **fields)
        on.script.orders[0] = replace(on.script.orders[0], order=now)

    at_the_broker(filled_qty=3)
    assert state()["filledQty"] == 3
    at_the_broker(filled_qty=5, is_canceled=True)
    assert trader.orders()["orders"][0]["isCanceled"] is True
    found = state()
    assert (found["filledQty"], found["isCanceled"], found["isCompleted"]) == (5, True, True)


@pytest.mark.parametrize(
    "odd",
    [
        OrderReport(Order("1", "USD", 1, error_reason="half \ud83d of it"), contract=AAPL),
        OrderReport(Order("1", "USD", 1), mark="\ud83d", contract=AAPL),
        OrderReport(Order("1", "USD", 1), contract=AAPL, time=datetime.min),
    ],
)
def test_one_odd_order_costs_no_other(on: Stage, odd: OrderReport) -> None:
    trader: Trader = on.trader()
    on.script.orders.append(odd)
    on.script.do["place_order"] = accepting(on.script, LOST)
    unknown(trader.place(LIMIT_ORDER, key="k"))
    placed = until(lambda: trader.state(key="k"), "")["order"]["orderId"]
    listed = trader.orders()["orders"]
    assert {node["orderId"] for node in listed} == {"1", placed}


def test_half_a_character_in_a_refusal(on: Stage) -> None:
    """json.loads makes one of an escape that was cut."""
    on.script.do["place_order"] = raising(Rejected("no margin \ud83d"))
    for _ in range(2):
        answer = on.trader().place(LIMIT_ORDER, key="k")
        assert (answer.status, answer.code) == (422, "BROKER_REJECTED"), answer
        assert answer["ex"] == "no margin ?"
    assert len(on.script.calls("place_order")) == 1


def test_a_deadline_that_has_passed_is_no_rate_limit(on: Stage) -> None:
    worker = on.gateway.instance(INSTANCE).worker("cash")
    with pytest.raises(TimedOut, match="nothing was sent"):
        worker.submit(Call("cash", {}, time.monotonic() - 0.01))


@pytest.mark.parametrize(("kind", "soon"), [(ScriptedBroker, True), (NoListing, False)])
def test_only_an_order_that_can_be_found_again_need_not_reach_the_disk(
    tmp_path: Path, kind: type[ScriptedBroker], soon: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the row says `sending`: without a listing nobody could tell its order."""
    asked: list[bool] = []
    post = GroupCommit.post

    def noting(commits: Any, body: Any, *, short: Any = None, soon: bool = False) -> Any:
        asked.append(soon)
        return post(commits, body, short=short, soon=soon)

    with stage(tmp_path, kind=kind, hard_limit=60.0) as on:
        wait_for(lambda: on.trader().cash().ok, "the broker")
        monkeypatch.setattr(GroupCommit, "post", noting)
        on.trader().placed(LIMIT_ORDER)
        monkeypatch.undo()
    assert asked[:2] == [False, soon]


def test_a_journal_that_is_locked_from_the_start_holds_nothing_up(tmp_path: Path) -> None:
    """Nothing is placed, the broker's own orders can be cancelled, and all ends in time."""
    locked = sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None)
    locked.execute("BEGIN EXCLUSIVE")
    try:
        with stage(tmp_path, hard_limit=60.0) as on:
            trader: Trader = on.trader()
            wait_for(lambda: trader.cash().ok, "the broker")
            (order_id,) = open_orders(on, 1)
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: trader.place(LIMIT_ORDER, timeout=1), range(4)))
            assert {answer.code for answer in answers} <= {"BUSY", "TIMEOUT"}, answers
            assert max(answer.seconds for answer in answers) < 20
            assert trader.cancel(order_id).ok
            assert on.script.calls("place_order") == []
            locked.execute("ROLLBACK")
            assert until(lambda: trader.place(LIMIT_ORDER, key="k"), "").ok
    finally:
        locked.close()


def test_a_data_directory_that_cannot_be_used_is_told_and_tried_again(tmp_path: Path) -> None:
    """A file stands where it belongs (root may write into any directory)."""
    folder = tmp_path / "data"
    folder.write_text("")
    with stage(folder) as on:
        trader: Trader = on.trader()
        before = threading.active_count()
        for answer in (trader.cash(), trader.place(LIMIT_ORDER, key="k"), trader.ping()):
            assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE"), answer
            assert answer.error["outcome"] == "none" and "data directory" in answer["ex"], answer
        assert threading.active_count() <= before
        folder.unlink()
        assert until(lambda: trader.place(LIMIT_ORDER, key="k"), "").ok


def test_on_a_read_only_disk_the_account_can_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its orders cancelled; still by one process only."""
    with stage(tmp_path) as on:
        order_id = on.trader().placed(LIMIT_ORDER)
    usual = os.open

    def read_only(path: Any, flags: int, *mode: int, **others: Any) -> int:
        if str(path).endswith(".lock") and flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return usual(path, flags, *mode, **others)

    monkeypatch.setattr(os, "open", read_only)
    with stage(tmp_path) as on:
        assert until(on.trader().cash, "").ok
        assert on.trader().cancel(order_id).ok
        with stage(tmp_path) as second:
            assert "Another process" in second.trader().cash()["ex"]
