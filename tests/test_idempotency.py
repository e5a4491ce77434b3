"""One client order id, one order: twice, twelve times at once, restarted, with another body."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from acceptance.kit import Answer, Trader, in_time, wait_for
from httptrading.brokers.base import Window
from httptrading.brokers.journal_rows import OrderRequest
from httptrading.brokers.placing import unknown
from httptrading.errors import (
    BrokerUnavailable,
    Busy,
    HttpTradingError,
    InternalError,
    InvalidRequest,
    OrderNotFound,
    OutcomeUnknown,
    RateLimited,
    Rejected,
    TimedOut,
    Unsupported,
)
from httptrading.model import Lifecycle, OrderType, TimeInForce
from simulators.scripted import AAPL, LIMIT_ORDER, Script, ScriptedBroker, Stage, stage

REQUEST = OrderRequest(
    AAPL, OrderType.Limit, TimeInForce.DAY, Lifecycle.RTH, "BUY", 12, Decimal("200.01")
)


@pytest.fixture
def on(tmp_path: Path) -> Iterator[Stage]:
    # A call may hang for a while; no worker is to be replaced for it.
    with stage(tmp_path, hard_limit=60.0) as running:
        running.ready()
        yield running


def raising(error: BaseException) -> Callable[..., Any]:
    def operation(*_: Any, **__: Any) -> Any:
        raise error

    return operation


def same(first: Answer, again: Answer) -> None:
    """The stored answer, byte for byte, marked as such."""
    assert first.ok and not first.replayed, first
    assert again.ok and again.replayed, again
    assert again.text == first.text


# --- one order ------------------------------------------------------------------------------------
def test_twice(on: Stage) -> None:
    trader = on.trader()
    first = trader.place(LIMIT_ORDER, key="k")
    same(first, trader.place(LIMIT_ORDER, key="k"))
    same(first, trader.place(dict(reversed(LIMIT_ORDER.items())), key="k"))
    assert len(on.script.calls("place_order")) == 1
    placing = on.gateway.instance(on.brokers[0].instance_id)._placing
    assert not placing._in_flight, "what is answered is in the journal, and not in memory"


def test_an_order_costs_two_transactions(on: Stage) -> None:
    commits = on.gateway._journal._database._commits
    before = commits.ended
    trader = on.trader()
    assert trader.place(LIMIT_ORDER, key="k").ok
    assert commits.ended == before + 2  # before it is sent, and before it is answered
    assert trader.place(LIMIT_ORDER, key="k").replayed
    on.script.do["place_order"] = raising(Rejected("No."))
    assert trader.place(LIMIT_ORDER, key="refused").code == "BROKER_REJECTED"
    assert commits.ended == before + 4


def test_content_alone_is_no_duplicate(on: Stage) -> None:
    trader = on.trader()
    answers = [trader.place(LIMIT_ORDER), trader.place(LIMIT_ORDER)]
    answers += [trader.place(LIMIT_ORDER, key=key) for key in ("k", "K", "k.")]
    assert len({answer["orderId"] for answer in answers}) == 5
    assert len({answer["clientOrderId"] for answer in answers}) == 5
    # A name made by the gateway is a name like any other.
    same(answers[0], trader.place(LIMIT_ORDER, key=answers[0]["clientOrderId"]))


def test_header_and_body_are_one_name(on: Stage) -> None:
    trader = on.trader()
    header = {"Idempotency-Key": "one:2_3.4-5"}
    first = trader.place(LIMIT_ORDER, headers=header)
    assert first["clientOrderId"] == "one:2_3.4-5"
    same(first, trader.place(LIMIT_ORDER, headers=header))
    same(first, trader.place(LIMIT_ORDER, key="one:2_3.4-5"))
    same(first, trader.place(LIMIT_ORDER, key="one:2_3.4-5", headers=header))
    for bad in (
        trader.place(LIMIT_ORDER, key="other", headers=header),
        trader.place(LIMIT_ORDER, headers={"Idempotency-Key": "no spaces"}),
        trader.place(LIMIT_ORDER, headers={"Idempotency-Key": ""}),
        trader.place(LIMIT_ORDER, key="x" * 65),
        trader.place(LIMIT_ORDER, key=""),
    ):
        assert (bad.status, bad.code) == (400, "INVALID_REQUEST"), bad
    assert len(on.script.calls("place_order")) == 1


def test_each_instance_has_names_of_its_own(tmp_path: Path) -> None:
    with stage(tmp_path, count=2) as on:
        on.ready()
        first, second = (on.trader(number).place(LIMIT_ORDER, key="k") for number in (0, 1))
        assert not first.replayed and not second.replayed
        marks = {script.calls("place_order")[0].arguments["mark"] for script in on.scripts}
        assert len(marks) == 2


def test_other_content_is_refused(on: Stage) -> None:
    trader = on.trader()
    first = trader.place(LIMIT_ORDER, key="k")
    market = {**LIMIT_ORDER, "orderType": "Market"}
    del market["price"]
    for other in (
        {**LIMIT_ORDER, "qty": 13},
        {**LIMIT_ORDER, "price": 200.02},
        {**LIMIT_ORDER, "direction": "SELL"},
        {**LIMIT_ORDER, "timeInForce": "GTC"},
        {**LIMIT_ORDER, "lifecycle": "ETH"},
        {**LIMIT_ORDER, "ticker": "AAPL.B"},
        market,
    ):
        answer = trader.place(other, key="k")
        assert (answer.status, answer.code) == (422, "IDEMPOTENCY_CONFLICT"), answer
        assert answer.error["outcome"] == "none"
    same(first, trader.place({**LIMIT_ORDER, "ticker": "aapl"}, key="k"))
    assert trader.place({**LIMIT_ORDER, "price": Decimal("200.010")}, key="k").replayed
    assert len(on.script.calls("place_order")) == 1


def test_twelve_at_once(on: Stage) -> None:
    """Those who come while the order is being sent wait for its answer, and get it."""
    gate = threading.Barrier(13)

    def place(_: int) -> Answer:
        gate.wait(60)
        return on.trader().place(LIMIT_ORDER, key="k")

    with ThreadPoolExecutor(12) as pool:
        with on.script.hold("place_order"):
            futures = [pool.submit(place, number) for number in range(12)]
            gate.wait(60)
            on.script.arrived("place_order")
            conflict = on.trader().place({**LIMIT_ORDER, "qty": 13}, key="k")
        answers = [future.result(60) for future in futures]
    assert (conflict.status, conflict.code) == (422, "IDEMPOTENCY_CONFLICT")
    assert all(answer.ok for answer in answers), answers
    assert len({answer.text for answer in answers}) == 1
    assert sum(not answer.replayed for answer in answers) == 1
    assert len(on.script.calls("place_order")) == 1


@pytest.mark.parametrize(
    "error", [Rejected("No buying power."), RateLimited("Too fast."), unknown("k")]
)
def test_twelve_at_once_are_told_what_the_first_is(on: Stage, error: Exception) -> None:
    gate = threading.Barrier(13)

    def place(_: int) -> Answer:
        gate.wait(60)
        return on.trader().place(LIMIT_ORDER, key="k", timeout=30)

    instance = on.gateway.instance(on.brokers[0].instance_id)
    placing = instance._placing
    await_placement, waiting = placing._await_placement, []

    def counted(*arguments: Any, **keywords: Any) -> Any:
        waiting.append(1)
        return await_placement(*arguments, **keywords)

    placing._await_placement = counted
    on.script.do["place_order"] = raising(error)
    with ThreadPoolExecutor(12) as pool:
        with on.script.hold("place_order"):
            futures = [pool.submit(place, number) for number in range(12)]
            gate.wait(60)
            wait_for(lambda: len(waiting) >= 12, "all of them to wait")
        answers = [future.result(60) for future in futures]
    assert all(answer.body["ex"] == str(error) for answer in answers), answers
    assert sum(not answer.replayed for answer in answers) == 1
    # Not again into the broker's limit, nor, in doubt, at all.
    assert len(on.script.calls("place_order")) == 1


def test_after_a_restart(tmp_path: Path) -> None:
    with stage(tmp_path) as on:
        on.ready()
        first = on.trader().place(LIMIT_ORDER, key="k")
        on.script.do["place_order"] = raising(Rejected("No buying power."))
        refused = on.trader().place(LIMIT_ORDER, key="refused")
    with stage(tmp_path) as on:  # another process as far as anybody can tell
        trader = on.trader()
        same(first, trader.place(LIMIT_ORDER, key="k"))
        again = trader.place(LIMIT_ORDER, key="refused")
        assert (again.status, again.body["ex"]) == (422, refused.body["ex"]) and again.replayed
        other = trader.place({**LIMIT_ORDER, "qty": 13}, key="k")
        assert (other.status, other.code) == (422, "IDEMPOTENCY_CONFLICT")
        assert on.script.calls("place_order") == []


def test_a_stored_answer_needs_no_broker_and_no_permission(tmp_path: Path) -> None:
    with stage(tmp_path) as on:
        on.ready()
        first = on.trader().place(LIMIT_ORDER, key="k")

    def down(script: Any) -> None:
        script.do["connect"] = raising(BrokerUnavailable("XX is down"))

    with stage(tmp_path, before=down, read_only=True) as on:
        same(first, on.trader().place(LIMIT_ORDER, key="k"))
        new = on.trader().place(LIMIT_ORDER, key="new")
        assert (new.status, new.code, new.error["outcome"]) == (422, "UNSUPPORTED", "none")


# --- what uses the name up ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        RateLimited("The broker: too fast.", retry_after=1),
        BrokerUnavailable("The line is cut."),
        Busy("Come back later.", retry_after=1),
        Unsupported("Not in this market."),
        InvalidRequest("A bad price."),
    ],
)
def test_a_passing_error_does_not(on: Stage, error: Exception) -> None:
    trader = on.trader()
    on.script.do["place_order"] = raising(error)
    first = trader.place(LIMIT_ORDER, key="k")
    assert first.error["outcome"] == "none" and not first.replayed, first
    assert first.error["clientOrderId"] == "k"
    missing = trader.state(key="k")
    assert (missing.status, missing.code) == (404, "ORDER_NOT_FOUND")
    del on.script.do["place_order"]
    again = wait_for(
        lambda: (lambda a: a if a.ok else None)(trader.place(LIMIT_ORDER, key="k")), "the retry"
    )
    assert not again.replayed
    marks = [call.arguments["mark"] for call in on.script.calls("place_order")]
    assert len(marks) == len(set(marks)) == 2, "each attempt is told apart at the broker"
    changed = trader.place({**LIMIT_ORDER, "qty": 13}, key="k")
    assert changed.code == "IDEMPOTENCY_CONFLICT"


def test_the_brokers_refusal_does(on: Stage) -> None:
    trader = on.trader()
    on.script.do["place_order"] = raising(Rejected("No buying power."))
    first = trader.place(LIMIT_ORDER, key="k")
    del on.script.do["place_order"]
    again = trader.place(LIMIT_ORDER, key="k")
    for answer in (first, again):
        assert (answer.status, answer.code) == (422, "BROKER_REJECTED")
        assert answer.body["ex"] == "No buying power."
    assert (first.replayed, again.replayed) == (False, True)
    assert len(on.script.calls("place_order")) == 1
    node = trader.order(key="k")
    assert (node["errorReason"], node["isCompleted"]) == ("No buying power.", True)
    assert trader.cancel(key="k").code == "ORDER_NOT_FOUND"


def test_a_queue_that_is_full_or_too_slow_does_not(tmp_path: Path) -> None:
    with stage(tmp_path, queue_size=1, hard_limit=60.0) as on:
        on.ready()
        trader = on.trader()
        with ThreadPoolExecutor(3) as pool:
            with on.script.hold("place_order"):
                sent = pool.submit(on.trader().place, LIMIT_ORDER, key="sent", timeout=30)
                on.script.arrived("place_order")
                late = in_time(
                    lambda seconds: trader.place(LIMIT_ORDER, key="late", timeout=seconds),
                    lambda answer: answer.code != "BUSY",  # the disk was too slow to record it
                )
                queued = pool.submit(on.trader().place, LIMIT_ORDER, key="queued", timeout=30)
                wait_for(
                    lambda: trader.get("instance/state")["state"]["connections"][0]["queued"],
                    "a full queue",
                )
                busy = trader.place(LIMIT_ORDER, key="busy")
            assert sent.result(60).ok and queued.result(60).ok
        assert (late.status, late.code, late.error["outcome"]) == (504, "TIMEOUT", "none")
        assert busy.status == 503 and "Retry-After" in busy.headers
        for key in ("late", "busy"):
            again = trader.place(LIMIT_ORDER, key=key)
            assert again.ok and not again.replayed, again
        assert len(on.script.calls("place_order")) == 4


def test_a_connection_that_takes_too_long_does_not(tmp_path: Path) -> None:
    made = threading.Event()

    def slowly(script: Script) -> None:
        script.do["connect"] = lambda: made.wait(300)

    with stage(tmp_path, before=slowly) as on:
        try:
            answer = in_time(
                lambda seconds: on.trader().place(LIMIT_ORDER, key="k", timeout=seconds),
                lambda answer: answer.code != "BUSY",  # the disk was too slow to record it
            )
        finally:
            made.set()
        assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE"), answer
        assert answer.error["outcome"] == "none"
        on.ready()
        assert not on.trader().place(LIMIT_ORDER, key="k").replayed
        assert len(on.script.calls("place_order")) == 1


def test_one_whose_time_is_up_leaves_the_others_their_try(on: Stage) -> None:
    """Two requests under one name: the first gives up before its order was sent."""
    instance = on.gateway.instance(on.brokers[0].instance_id)
    with ThreadPoolExecutor(3) as pool:
        with on.script.hold("place_order"):
            sent = pool.submit(on.trader().place, LIMIT_ORDER, key="sent", timeout=30)
            on.script.arrived("place_order")
            first = pool.submit(instance.place, REQUEST, "k", time.monotonic() + 0.5)
            wait_for(
                lambda: "k" in instance._placing._in_flight or first.done(), "the first request"
            )
            second = pool.submit(instance.place, REQUEST, "k", time.monotonic() + 30)
            error = first.exception(60)
        assert sent.result(60).ok and not second.result(60).replayed
    assert isinstance(error, HttpTradingError) and error.outcome == "none", error
    assert [call.arguments["client_order_id"] for call in on.script.calls("place_order")] == [
        "sent",
        "k",
    ]


def test_the_others_need_not_wait_as_long_as_the_first(tmp_path: Path) -> None:
    """Whose order is not even on its way yet: its worth is asked for."""
    market = {**LIMIT_ORDER, "orderType": "Market"}
    del market["price"]
    with (
        stage(tmp_path, max_order_value={"USD": Decimal(1000)}, hard_limit=60.0) as on,
        ThreadPoolExecutor(1) as pool,
    ):
        on.ready()
        with on.script.hold("quote"):
            first = pool.submit(on.trader().place, market, key="k", timeout=30)
            on.script.arrived("quote")
            second = on.trader().place(market, key="k", timeout=1)
        assert (second.status, second.code) == (504, "OUTCOME_UNKNOWN"), second
        assert first.result(60).ok


def test_one_whose_time_is_up_leaves_the_others_the_answer(on: Stage) -> None:
    """Two requests under one name: the first gives up while its order is being sent."""
    placing = on.gateway.instance(on.brokers[0].instance_id)._placing
    with ThreadPoolExecutor(2) as pool:
        with on.script.hold("place_order"):
            first = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=1)
            wait_for(lambda: placing._in_flight or first.done(), "the first request")
            second = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=30)
            on.script.arrived("place_order")
            first.result(60)
        assert second.result(60).ok
    assert len(on.script.calls("place_order")) == 1


def test_one_whose_time_is_up_leaves_the_first_its_place(on: Stage) -> None:
    """Two requests under one name: the second gives up while the first one's order is queued."""
    placing = on.gateway.instance(on.brokers[0].instance_id)._placing
    with ThreadPoolExecutor(2) as pool:
        with on.script.hold("place_order"):
            sent = pool.submit(on.trader().place, LIMIT_ORDER, key="sent", timeout=30)
            on.script.arrived("place_order")
            first = pool.submit(on.trader().place, LIMIT_ORDER, key="k", timeout=30)
            wait_for(lambda: "k" in placing._in_flight, "the first request")
            second = on.trader().place(LIMIT_ORDER, key="k", timeout=1)
            assert (second.status, second.code) == (504, "OUTCOME_UNKNOWN"), second
        assert sent.result(60).ok and first.result(60).ok


def test_a_bug_of_ours_does_not_use_the_name_up(on: Stage) -> None:
    trader = on.trader()
    journal = on.gateway._journal
    look_up = journal.by_client_order_id
    journal.by_client_order_id = raising(ZeroDivisionError())
    assert trader.place(LIMIT_ORDER, key="k").code == "INTERNAL"
    journal.by_client_order_id = look_up
    assert trader.place(LIMIT_ORDER, key="k").ok


class Limited(ScriptedBroker):
    windows = {"place": Window(1, 1.5)}
    costs = {"place_order": ("place",)}


def test_our_own_limit_does_not(tmp_path: Path) -> None:
    with stage(tmp_path, kind=Limited, hard_limit=60.0) as on, ThreadPoolExecutor(1) as pool:
        on.ready()
        # While the first runs, the second's turn is a whole window away, however slow the machine.
        with on.script.hold("place_order"):
            first = pool.submit(on.trader().place, LIMIT_ORDER, key="first", timeout=30)
            on.script.arrived("place_order")
            trader = on.trader()
            refused = trader.place(LIMIT_ORDER, key="k", timeout=1)
        assert first.result().ok
        assert (refused.status, refused.code) == (429, "RATE_LIMITED")
        again = trader.place(LIMIT_ORDER, key="k", timeout=30)
        assert again.ok and not again.replayed


# --- what is in doubt -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error",
    [
        OutcomeUnknown("No answer."),
        TimedOut("No answer."),  # promised by nobody to mean "not sent" when placing
        OrderNotFound("What order?"),
        InternalError("Oops."),
        ValueError("something odd in the SDK"),
        ConnectionResetError(),
        NotImplementedError(),  # of the SDK, which does not know what the broker answered
    ],
)
def test_any_other_error_leaves_it_open(on: Stage, error: BaseException) -> None:
    trader = on.trader()
    usual = on.script.usual

    def accept_then_fail(**arguments: Any) -> Any:
        usual("place_order", arguments)
        raise error

    on.script.do["place_order"] = accept_then_fail
    answer = trader.place(LIMIT_ORDER, key="k")
    assert (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN"), answer
    assert answer.error["outcome"] == "unknown" and answer.error["clientOrderId"] == "k"
    assert "Retry-After" not in answer.headers and answer.error["retryable"] is False
    again = trader.place(LIMIT_ORDER, key="k")
    assert again.ok and again.replayed and again["orderId"] == "69788888"
    assert len(on.script.calls("place_order")) == 1


class Sdk:
    def place_order(self) -> str:
        raise NotImplementedError  # what the broker answered


class LeavesOut(ScriptedBroker):
    def place_order(self, qty: int, **arguments: Any) -> str:  # type: ignore[override]
        if qty == 13:
            raise NotImplementedError
        return Sdk().place_order()


def test_only_what_the_broker_itself_leaves_out_was_not_sent(tmp_path: Path) -> None:
    with stage(tmp_path, kind=LeavesOut) as on:
        on.ready()
        assert on.trader().place({**LIMIT_ORDER, "qty": 13}).code == "UNSUPPORTED"
        assert on.trader().place(LIMIT_ORDER).code == "OUTCOME_UNKNOWN"


@pytest.mark.parametrize("nothing", [None, "", " ", 0, "0", True, 1.5])
def test_an_answer_without_an_id_leaves_it_open(on: Stage, nothing: Any) -> None:
    usual = on.script.usual

    def accept_then_mumble(**arguments: Any) -> Any:
        usual("place_order", arguments)
        return nothing

    on.script.do["place_order"] = accept_then_mumble
    trader = on.trader()
    assert trader.place(LIMIT_ORDER, key="k").code == "OUTCOME_UNKNOWN"
    assert trader.place(LIMIT_ORDER, key="k")["orderId"] == "69788888"


def test_a_cancel_in_doubt_says_so(on: Stage) -> None:
    trader: Trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    for error in (TimedOut("No answer."), ValueError(), OutcomeUnknown("No answer.")):
        on.script.do["cancel_order"] = raising(error)
        answer = trader.cancel(order_id)
        assert (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN"), answer
        assert answer.error["outcome"] == "unknown"
