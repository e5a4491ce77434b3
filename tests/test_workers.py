"""Workers: deadlines, order of service, shared reads, reconnects, and brokers that hang."""

from __future__ import annotations

import asyncio
import errno
import gc
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from acceptance.kit import PATIENCE, Answer, Trader, in_time, wait_for
from httptrading.brokers import gateway as gateway_module
from httptrading.brokers import worker as worker_module
from httptrading.brokers.base import OPERATIONS, Window
from httptrading.brokers.reads import ReadMemory
from httptrading.brokers.registry import broker_register
from httptrading.brokers.worker import BACK_OFF, Call, Worker, _Lane
from httptrading.errors import BrokerUnavailable, HttpTradingError, OutcomeUnknown, TimedOut
from httptrading.model import Cash, Fill, Order, OrderReport
from simulators.scripted import LIMIT_ORDER, Script, ScriptedBroker, Stage, stage

PATIENT = 20.0
"""Seconds within which an answer that is due at once must come on a machine that stands still for
seconds; less than the usual deadline of these tests (30), by which it would come anyway."""

UNHURRIED = 60.0
"""A limit for stuck calls that replaces no worker where none must be."""


@pytest.fixture
def on(tmp_path: Path) -> Iterator[Stage]:
    with stage(tmp_path, hard_limit=UNHURRIED) as running:
        running.ready()
        running.script.received.clear()
        yield running


@contextmanager
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as pool:
        yield pool


def worker_of(on: Stage, number: int = 0) -> Worker:
    workers = on.gateway.instance(on.brokers[number].instance_id).workers
    found: Worker = next(iter(workers.values()))
    return found


def ready_calls(on: Stage) -> int:
    """Queued calls that may run: an order has its place before its record is durable."""
    return sum(call.ready for _, _, call in list(worker_of(on)._queue))


def from_memory(trader: Trader, route: str, **query: Any) -> Answer:
    """A read that may be answered from memory (a `Trader` asks for fresh ones otherwise)."""
    return trader.request("GET", route, query=query, headers={"Cache-Control": ""})


@contextmanager
def busy_worker(on: Stage, pool: ThreadPoolExecutor) -> Iterator[Future[Answer]]:
    """Inside, the worker hangs in a read that has a long deadline."""
    with on.script.hold("cash"):
        future = pool.submit(on.trader().cash, timeout=30)
        on.script.arrived("cash")
        yield future


# --- deadlines -------------------------------------------------------------------------------
def test_a_read_that_hangs_is_answered_by_its_deadline(on: Stage) -> None:
    with on.script.hold("cash"):
        answer = on.trader().cash(timeout=1)
        assert answer.code == "TIMEOUT" and answer.error["outcome"] == "none"
        assert 1 <= answer.seconds < PATIENT


def test_a_call_whose_deadline_passes_in_the_queue_never_runs(on: Stage) -> None:
    """The proof that nothing was sent: the broker is asked afterwards, and had no order."""
    with clients() as pool:
        with busy_worker(on, pool) as first:
            cancelling = pool.submit(on.trader().cancel, "69788888", timeout=1)
            placing = in_time(
                lambda seconds: on.trader().place(LIMIT_ORDER, key="withdrawn", timeout=seconds),
                lambda answer: answer.code != "BUSY",  # the disk was too slow to record it
            )
            for answer in (placing, cancelling.result()):
                assert answer.code == "TIMEOUT" and answer.error["outcome"] == "none", answer
                assert "nothing was sent" in answer["ex"]
            assert worker_of(on).queued() == 0
        assert first.result().ok
    assert on.trader().cash().ok  # whatever was queued has had its turn
    assert not on.script.calls("place_order") and not on.script.calls("cancel_order")
    again = on.trader().place(LIMIT_ORDER, key="withdrawn")
    assert again.ok and not again.replayed  # the key was not used up
    assert len(on.script.calls("place_order")) == 1


def test_what_was_sent_before_its_deadline_is_unknown_and_recorded_late(on: Stage) -> None:
    with on.script.hold("place_order"):
        answer = in_time(
            lambda seconds: on.trader().place(LIMIT_ORDER, key="late", timeout=seconds),
            lambda answer: on.script.calls("place_order"),
        )
        assert (answer.code, answer.error["outcome"]) == ("OUTCOME_UNKNOWN", "unknown")
        assert answer.error["clientOrderId"] == "late"
    wait_for(lambda: on.trader().state(key="late").ok, "the late result")
    assert on.trader().order(key="late")["orderId"] == "69788888"
    replay = on.trader().place(LIMIT_ORDER, key="late")
    assert replay.ok and replay.replayed and replay["orderId"] == "69788888"
    assert len(on.script.calls("place_order")) == 1


# --- order of service ----------------------------------------------------------------------------
def test_cancels_go_before_places_and_places_before_reads(on: Stage) -> None:
    order_id = on.trader().placed(LIMIT_ORDER)
    on.script.received.clear()
    with clients() as pool:
        with busy_worker(on, pool):
            waiting = []
            for number, ask in enumerate(
                (
                    lambda: on.trader().positions(timeout=30),
                    lambda: on.trader().place(LIMIT_ORDER, timeout=30),
                    lambda: on.trader().quote("US", "AAPL", timeout=30),
                    lambda: on.trader().place(LIMIT_ORDER, timeout=30),
                    lambda: on.trader().cancel(order_id, timeout=30),
                ),
                start=1,
            ):
                waiting.append(pool.submit(ask))
                wait_for(lambda number=number: ready_calls(on) == number, "a call that may run")
        answers = [future.result() for future in waiting]
        assert all(answer.ok for answer in answers), answers
    served = [one.operation for one in on.script.received]
    assert served == ["cash", "cancel_order", "place_order", "place_order", "positions", "quote"]


def test_one_thread_runs_one_operation_at_a_time(on: Stage) -> None:
    inside: list[int] = []
    most: list[int] = []

    def cash() -> Cash:
        inside.append(1)
        most.append(len(inside))
        inside.pop()
        return Cash("USD", 1)

    on.script.do["cash"] = cash
    with clients() as pool:
        answers = list(pool.map(lambda _: on.trader().cash(), range(30)))
    assert all(answer.ok for answer in answers)
    assert set(most) == {1}
    assert len({one.thread for one in on.script.received}) == 1
    assert threading.get_ident() not in {one.thread for one in on.script.received}


def test_a_full_queue_refuses_at_once(tmp_path: Path) -> None:
    with stage(tmp_path, queue_size=3, hard_limit=UNHURRIED) as on, clients() as pool:
        on.ready()
        with busy_worker(on, pool):
            waiting = []
            for number in range(3):
                waiting.append(pool.submit(on.trader().positions, timeout=30))
                wait_for(lambda number=number: worker_of(on).queued() > number, "a queued call")
            answer = on.trader().place(LIMIT_ORDER, key="refused")
            assert (answer.status, answer.code) == (503, "BUSY")
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.seconds < PATIENT
        answers = [future.result() for future in waiting]
        assert all(answer.ok for answer in answers), answers
        assert on.trader().placed(LIMIT_ORDER, key="refused")


# --- reads from memory ---------------------------------------------------------------------------
def test_identical_reads_share_one_call(on: Stage) -> None:
    with clients() as pool:
        with on.script.hold("quote"):
            query = {"tradeType": "Securities", "region": "US", "ticker": "AAPL"}
            waiting = [
                pool.submit(from_memory, on.trader(), "market/quote", **query) for _ in range(12)
            ]
            on.script.arrived("quote")
            other = pool.submit(
                from_memory, on.trader(), "market/quote", **query | {"ticker": "MSFT"}
            )
            reads = on.gateway.instance(on.brokers[0].instance_id)._reads
            wait_for(
                lambda: sum(one.waiting for one in reads._under_way.values()) == 13,
                "thirteen waiting readers",
            )
        answers = [future.result() for future in waiting]
        assert other.result()["quote"]["contract"]["ticker"] == "MSFT"
    assert all(answer.ok for answer in answers)
    assert len({answer.text.partition('"ex"')[2] for answer in answers}) == 1
    assert len(on.script.calls("quote")) == 2  # AAPL once, MSFT once


def test_reads_at_the_same_moment_make_one_call(tmp_path: Path) -> None:
    with stage(tmp_path, ages={"cash": 600.0}, hard_limit=UNHURRIED) as on, clients() as pool:
        on.ready()
        together = threading.Barrier(16)

        def ask(_: int) -> Answer:
            trader = on.trader()
            together.wait()
            return from_memory(trader, "cash/state")

        for round_ in range(1, 6):
            answers = list(pool.map(ask, range(16)))
            assert all(answer.ok for answer in answers)
            assert len(on.script.calls("cash")) == round_
            on.script.brokers[-1].stale()


def begun_read() -> Call:
    call = Call("cash", {}, float("inf"))
    call.began = time.monotonic()
    return call


def test_a_read_that_came_too_late_to_share_takes_the_answer() -> None:
    """It looked when there was none, and asks when the call has just ended."""
    reads, call = ReadMemory({"cash": 600.0}), begun_read()
    reads.join("cash", "key", False, lambda: call)
    call.set_result(1)
    joined = reads.join("cash", "key", False, lambda: pytest.fail("asked again"))
    assert joined.call is call


def test_only_the_last_reader_takes_the_call_out_of_the_queue() -> None:
    """And nobody joins a call that is just being taken out."""
    reads, call = ReadMemory({}), begun_read()
    first, second = (reads.join("cash", "key", False, lambda: call) for _ in range(2))
    assert [reads.leave(first), reads.leave(second)] == [False, True]
    other = begun_read()
    assert reads.join("cash", "key", False, lambda: other).call is other


def test_the_call_that_began_last_is_shared_and_remembered() -> None:
    """Whichever ends first; and one that began before a change is not remembered at all."""

    def two_fresh(age: float) -> tuple[ReadMemory, Call, Call]:
        reads, earlier, later = ReadMemory({"cash": age}), begun_read(), begun_read()
        for call in (earlier, later):
            reads.join("cash", "key", True, lambda call=call: call)
        return reads, earlier, later

    reads, earlier, later = two_fresh(600.0)
    later.set_result(2)
    earlier.set_result(1)
    assert reads.answer("cash", "key") == (True, 2)
    reads, earlier, later = two_fresh(0.0)
    earlier.set_result(1)
    joined = reads.join("cash", "key", False, lambda: pytest.fail("asked again"))
    assert joined.call is later
    reads, earlier, later = two_fresh(600.0)
    reads.stale()
    later.set_result(2)
    assert reads.answer("cash", "key") == (False, None)


def test_the_memory_has_an_end() -> None:
    reads = ReadMemory({"cash": 600.0})
    for key in range(3000):
        call = begun_read()
        reads.join("cash", key, False, lambda call=call: call)
        call.set_result(key)
    assert reads.answer("cash", 2999) == (True, 2999)
    assert len(reads._answers) <= 1001


class SlowAtFirst(ScriptedBroker):
    """Its first answer never comes."""

    async def cash(self) -> Cash:
        self.script.run("cash", {})
        if len(self.script.calls("cash")) == 1:
            await asyncio.Event().wait()
        return Cash("USD", 2)


def test_one_reader_whose_time_is_up_takes_nothing_from_the_others(tmp_path: Path) -> None:
    def ask(on: Stage, seconds: str) -> Answer:
        headers = {"Cache-Control": "", "HT-TIMEOUT": seconds}
        return on.trader().request("GET", "cash/state", headers=headers)

    long = {"cash": 600.0}
    with (
        stage(tmp_path, kind=SlowAtFirst, ages=long, hard_limit=UNHURRIED) as on,
        clients() as pool,
    ):
        on.ready()
        while not on.script.calls("cash"):  # its time may be up before the broker is asked
            hasty = pool.submit(ask, on, "1")
            wait_for(lambda over=hasty.done: on.script.calls("cash") or over(), "a call that hangs")
        patient = [pool.submit(ask, on, "30") for _ in range(5)]
        assert hasty.result().code == "TIMEOUT"
        answers = [future.result() for future in patient]
        assert all(answer.ok for answer in answers), answers
        assert len(on.script.calls("cash")) == 2  # asked again once, for all of them


def test_a_young_answer_serves_again_and_no_cache_asks(tmp_path: Path) -> None:
    with stage(tmp_path, ages={"cash": 600.0, "positions": 0.0}, hard_limit=UNHURRIED) as on:
        on.ready()
        amounts = itertools.count(1)
        on.script.do["cash"] = lambda: Cash("USD", next(amounts))
        trader = on.trader()

        def amount(headers: str = "") -> Any:
            answer = trader.request("GET", "cash/state", headers={"Cache-Control": headers})
            return answer["cash"]["amount"]

        assert [amount() for _ in range(3)] == [1, 1, 1]
        assert amount("no-cache") == 2
        assert amount("max-age=0, No-Cache") == 3
        assert amount() == 3  # a fresh answer is the youngest
        for _ in range(3):
            assert from_memory(trader, "position/state").ok
        assert len(on.script.calls("positions")) == 3  # its age is 0


def test_an_answer_ages(tmp_path: Path) -> None:
    with stage(tmp_path, ages={"cash": 0.05}) as on:
        on.ready()
        wait_for(
            lambda: from_memory(on.trader(), "cash/state").ok and len(on.script.calls("cash")) > 2,
            "the broker to be asked again",
        )


CHANGES: dict[str, Callable[[Stage], object]] = {
    "placing": lambda on: on.trader().placed(LIMIT_ORDER),
    "a refused order": lambda on: on.trader().place({**LIMIT_ORDER, "qty": 13}),
    "cancelling": lambda on: on.trader().cancel("69788888"),
    "a push of an order": lambda on: on.script.brokers[-1].report(
        OrderReport(Order("1", "USD", 12), time=datetime.now(UTC))
    ),
    "a push of a fill": lambda on: on.script.brokers[-1].report_fills(
        Fill("f1", "1", 1, 1, datetime.now(UTC))
    ),
    "news from the broker": lambda on: on.script.brokers[-1].stale(),
    "a reconnect by the SDK": lambda on: on.script.brokers[-1].restored(),
    "a lost connection": lambda on: lose(on),
}


def lose(on: Stage) -> None:
    copies = len(on.script.brokers)
    on.script.brokers[-1].lost("The line was cut")
    wait_for(lambda: len(on.script.brokers) > copies, "a fresh connection")
    on.ready()


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_something_makes_the_memory_stale(tmp_path: Path, change: str) -> None:
    with stage(tmp_path, ages={"cash": 600.0}, hard_limit=UNHURRIED) as on:
        on.ready()
        amounts = itertools.count(1)
        on.script.do["cash"] = lambda: Cash("USD", next(amounts))
        trader = on.trader()
        before = from_memory(trader, "cash/state")["cash"]["amount"]
        assert from_memory(trader, "cash/state")["cash"]["amount"] == before
        CHANGES[change](on)
        assert from_memory(trader, "cash/state")["cash"]["amount"] > before


class CashApart(ScriptedBroker):
    connections = {"trade": tuple(set(OPERATIONS) - {"cash"}), "account": ("cash",)}


@pytest.mark.parametrize(
    ("change", "operation"), [("placing", "place_order"), ("cancelling", "cancel_order")]
)
def test_a_change_makes_the_memory_stale_before_it_is_sent_and_after(
    tmp_path: Path, change: str, operation: str
) -> None:
    """It may have happened at the broker at any moment of its call."""
    with (
        stage(tmp_path, kind=CashApart, ages={"cash": 600.0}, hard_limit=UNHURRIED) as on,
        clients() as pool,
    ):
        on.ready()
        amounts = itertools.count(1)
        on.script.do["cash"] = lambda: Cash("USD", next(amounts))
        trader = on.trader()
        before = from_memory(trader, "cash/state")["cash"]["amount"]
        with on.script.hold(operation):
            changing = pool.submit(CHANGES[change], on)
            on.script.arrived(operation)
            meanwhile = from_memory(trader, "cash/state")["cash"]["amount"]
            assert meanwhile > before
            assert from_memory(trader, "cash/state")["cash"]["amount"] == meanwhile
        changing.result()
        assert from_memory(trader, "cash/state")["cash"]["amount"] > meanwhile


def test_a_read_under_way_is_not_shared_with_who_came_after_a_change(on: Stage) -> None:
    with clients() as pool:
        with on.script.hold("cash"):
            early = pool.submit(from_memory, on.trader(), "cash/state")
            on.script.arrived("cash")
            on.script.brokers[-1].stale()
            late = pool.submit(from_memory, on.trader(), "cash/state")
            wait_for(lambda: worker_of(on).queued() == 1, "a call of its own")
        assert early.result().ok and late.result().ok
    assert len(on.script.calls("cash")) == 2
    assert from_memory(on.trader(), "cash/state").ok


# --- connections ---------------------------------------------------------------------------------
def unreachable(**arguments: Any) -> None:
    raise BrokerUnavailable("XX is not reachable; check the network")


def test_a_broker_that_is_down_from_the_start(tmp_path: Path) -> None:
    """Everything answers at once; and within 5 s of its return the broker is served."""
    with stage(tmp_path, count=2, before=lambda on: on.do.update(connect=unreachable)) as on:
        script = on.script
        trader = on.trader()
        wait_for(lambda: "not reachable" in trader.cash().text, "a 503")
        answer = trader.place(LIMIT_ORDER, key="down")
        assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE")
        assert int(answer.headers["Retry-After"]) in range(1, 5)
        assert answer.seconds < PATIENT
        assert "not reachable" in answer["ex"] and answer.error["outcome"] == "none"
        pinged = trader.ping()
        assert pinged.status == 200 and pinged["pong"] is False
        state = trader.get("instance/state")["state"]
        assert state["connections"][0]["connected"] is False
        assert state["connections"][0]["reconnects"] == 0
        assert "not reachable" in state["connections"][0]["lastError"]
        assert on.trader(1).cash().ok
        script.do.clear()
        began = time.monotonic()
        wait_for(lambda: trader.cash().ok, "the broker to be served")
        assert time.monotonic() - began < 5 + PATIENT
        assert trader.placed(LIMIT_ORDER, key="down")
        assert trader.ping()["pong"] is True


def lose_quietly(on: Stage) -> None:
    on.script.brokers[-1].lost("The line was cut")


def test_attempts_to_connect_grow_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "BACK_OFF", (0.1, 0.2, 0.4))
    with stage(tmp_path, hard_limit=UNHURRIED) as on:
        on.ready()
        on.script.do["connect"] = unreachable
        on.script.received.clear()
        lose_quietly(on)
        on.script.arrived("connect", 6)
        times = [one.time for one in on.script.calls("connect")]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        # Pauses are shortened by up to 30 % at random; a slow machine only makes them longer.
        for gap, pause in zip(gaps, (0.1, 0.2, 0.4, 0.4), strict=False):
            assert gap >= pause * 0.7 - 0.02
        assert sum(BACK_OFF[-1:]) < 5  # the longest pause: back within 5 s


def test_a_steady_connection_that_is_lost_is_made_again_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "STEADY", -1.0)
    monkeypatch.setattr(worker_module, "BACK_OFF", (600.0,))
    with stage(tmp_path, hard_limit=UNHURRIED) as on:
        on.ready()
        lane, limits = worker_of(on)._lane, []
        assert lane is not None
        on.script.do["connect"] = lambda: limits.append(lane._running_until)
        for copies in range(1, 4):
            lose_quietly(on)
            wait_for(lambda copies=copies: len(on.script.brokers) > copies, "a connection at once")
        assert on.trader().cash().ok
        assert len(on.script.calls("close")) == 3  # every copy was closed
        assert limits == [None] * 3  # that of closing is over
        state = on.trader().get("instance/state")["state"]["connections"][0]
        assert state["connected"] and state["reconnects"] == 3 and state["lastError"] == ""


def test_a_copy_that_is_gone_says_nothing_of_the_next(on: Stage) -> None:
    gone = on.script.brokers[-1]
    lose(on)
    gone.lost("The line was cut")
    assert on.trader().cash().ok
    assert len(on.script.brokers) == 2


def test_memory_does_not_hide_that_the_broker_is_down(tmp_path: Path) -> None:
    with stage(tmp_path, ages={"cash": 600.0}, hard_limit=UNHURRIED) as on:
        on.ready()
        assert from_memory(on.trader(), "cash/state").ok
        on.script.do["connect"] = unreachable
        lose_quietly(on)
        wait_for(
            lambda: from_memory(on.trader(), "cash/state").code == "BROKER_UNAVAILABLE", "a 503"
        )


def test_a_pause_ends_with_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "BACK_OFF", (600.0,))
    with stage(tmp_path, hard_limit=UNHURRIED) as on:
        on.ready()
        on.script.do["connect"] = unreachable
        lose_quietly(on)
        lane = worker_of(on)._lane
        assert lane is not None
        wait_for(lambda: lane._pause, "the pause")
        on.gateway.close()
        wait_for(lambda: not lane.is_alive(), "the thread's end")


def test_a_ping_while_pausing_tries_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "BACK_OFF", (0.05, 600.0))
    with stage(tmp_path, hard_limit=UNHURRIED) as on:
        on.ready()
        on.script.do["connect"] = unreachable
        lose_quietly(on)
        trader = on.trader()
        wait_for(
            lambda: not trader.ping()["pong"] and len(on.script.calls("connect")) >= 5,
            "pings that try, and fail",
        )
        on.script.do.clear()
        wait_for(lambda: trader.ping()["pong"], "a ping that makes the connection")


def test_that_nothing_was_sent_is_said_once(on: Stage) -> None:
    def cut(**_: Any) -> None:
        raise BrokerUnavailable("The line was cut; nothing was sent")

    on.script.do.update(cash=cut, connect=cut)
    assert on.trader().cash().code == "BROKER_UNAVAILABLE"
    wait_for(lambda: len(on.script.calls("connect")) > 1, "an attempt to connect")
    said = on.trader().cash()
    assert said["ex"].count("The line was cut") == said["ex"].count("nothing was sent") == 1


def test_an_operation_that_finds_the_line_cut_reconnects(on: Stage) -> None:
    def cut() -> Cash:
        del on.script.do["cash"]
        raise BrokerUnavailable("The line was cut")

    on.script.do["cash"] = cut
    answer = on.trader().cash()
    assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE")
    wait_for(lambda: on.trader().cash().ok, "a fresh connection")
    assert len(on.script.brokers) == 2
    assert len(on.script.calls("close")) == 1


def test_no_call_runs_on_a_connection_that_the_one_before_has_given_up(on: Stage) -> None:
    """The answer to the first order would come late, and be taken for the second one's."""
    used: list[ScriptedBroker] = []

    def cut(**arguments: Any) -> str:
        used.append(on.script.brokers[-1])
        if len(used) == 1:
            used[0].lost("The line was cut")
            raise OutcomeUnknown("No answer")
        placed: str = on.script.usual("place_order", arguments)
        return placed

    on.script.do["place_order"] = cut
    with clients() as pool:
        with busy_worker(on, pool):
            placing = []
            for number in (1, 2):
                placing.append(pool.submit(on.trader().place, LIMIT_ORDER, timeout=30))
                wait_for(lambda number=number: ready_calls(on) == number, "an order that may run")
        codes = [future.result().code for future in placing]
    assert "OUTCOME_UNKNOWN" in codes
    assert used[0] not in used[1:]
    wait_for(lambda: on.trader().place(LIMIT_ORDER).ok, "an order over a fresh connection")


def test_a_missing_sdk_is_told(tmp_path: Path) -> None:
    with stage(tmp_path) as on:
        on.ready()

        def missing() -> None:
            raise ModuleNotFoundError("No module named 'xx_sdk'")

        on.script.do["connect"] = missing
        lose_quietly(on)
        answer = wait_for(
            lambda: (found := on.trader().cash()).code and found, "an answer that it is down"
        )
        wait_for(lambda: "not installed" in on.trader().cash().text, "why it is down")
        assert answer.status == 503


# --- brokers that hang ---------------------------------------------------------------------------
def test_a_hung_broker_is_replaced_and_hurts_nobody(tmp_path: Path) -> None:
    with stage(tmp_path, count=2) as on, clients() as pool:
        on.ready()
        first_copy = on.script.brokers[-1]
        with busy_worker(on, pool) as hanging:
            assert all(on.trader(1).cash().ok for _ in range(20))
            assert not hanging.done()  # the neighbour did not wait for it
            assert not worker_of(on).is_stuck  # a question changes nothing
        assert hanging.result().ok
        with on.script.hold("place_order"):
            answer = in_time(
                lambda seconds: on.trader().place(LIMIT_ORDER, key="hung", timeout=seconds),
                lambda answer: on.script.calls("place_order"),
            )
            assert (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN")
            # A fresh worker serves while the old call still hangs.
            assert on.trader().cash()["cash"]["currency"] == "USD"
            assert on.script.brokers[-1] is not first_copy
            state = on.trader().get("instance/state")["state"]
            assert state["connections"][0]["replacements"] == 1
            assert state["unsettledOrders"] == 1
            assert worker_of(on).is_stuck
        order = wait_for(
            lambda: (seen := on.trader().state(key="hung")).ok and seen, "the late result"
        )
        assert order["order"]["orderId"] == "69788888"
        assert on.trader().get("instance/state")["state"]["unsettledOrders"] == 0
        assert on.trader().placed(LIMIT_ORDER)
        wait_for(lambda: not worker_of(on).is_stuck, "the end of both threads' calls")


def test_a_connect_that_hangs_is_replaced(tmp_path: Path) -> None:
    with stage(tmp_path, connect_timeout=0.2) as on:
        on.ready()
        ended = threading.Event()

        def hang_once() -> None:
            del on.script.do["connect"]
            ended.wait(300)

        on.script.do["connect"] = hang_once
        replaced = worker_of(on).state.replacements
        lose_quietly(on)
        try:
            wait_for(lambda: worker_of(on).state.replacements > replaced, "a fresh worker")
            wait_for(lambda: on.trader().cash().ok, "the broker to be served")
        finally:
            ended.set()


class Clinging(ScriptedBroker):
    """`close()` waits for a farewell that never comes, after a cancellation as well if told so."""

    async def close(self) -> None:
        self.script.run("close", {})
        while not self.script.held.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.02)
                continue
            if not self.script.do["deaf"]():
                return


@pytest.mark.parametrize("deaf", [False, True])
def test_a_close_that_hangs_holds_nothing_up(tmp_path: Path, deaf: bool) -> None:
    with stage(tmp_path, kind=Clinging, hard_limit=1.0 if deaf else UNHURRIED) as on:
        on.ready()
        on.script.held.clear()
        on.script.do["deaf"] = lambda: deaf
        lose_quietly(on)
        wait_for(lambda: on.script.calls("close"), "the farewell")
        wait_for(lambda: on.trader().cash(timeout=1).ok, "the broker to be served")
        assert worker_of(on).state.replacements == deaf


def test_a_standstill_of_the_process_replaces_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every limit has passed at the first look after it; only who stays beyond it is stuck."""
    monkeypatch.setattr(gateway_module, "SUPERVISION", 300.0)  # the test looks, nobody else
    with stage(tmp_path) as on, clients() as pool:
        on.ready()
        worker = worker_of(on)
        for _ in range(3):
            with on.script.hold("cash"):
                hanging = pool.submit(on.trader().cash, timeout=30)
                on.script.arrived("cash")
                assert worker._lane is not None
                worker._lane._running_until = time.monotonic()
                for _ in range(worker_module.STUCK_LOOKS - 1):
                    worker.check()
            assert hanging.result().ok
            on.script.received.clear()
            worker.check()  # it has gone on: forgiven
        assert worker.state.replacements == 0
        with on.script.hold("cash"):
            hanging = pool.submit(on.trader().cash, timeout=30)
            on.script.arrived("cash")
            worker._lane._running_until = time.monotonic()
            for _ in range(worker_module.STUCK_LOOKS):
                worker.check()
            assert worker.state.replacements == 1
        assert hanging.result().ok  # late, but in time for its reader


@pytest.mark.parametrize("change", ["cancel", "place"])
def test_a_read_beyond_its_limit_gives_way_to_an_order_that_would_be_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Though it has time left itself; a listing may run for 20 s, a cancellation has 10."""
    monkeypatch.setattr(gateway_module, "SUPERVISION", 300.0)  # the test looks, nobody else
    with stage(tmp_path, hard_limit=0.01) as on, clients() as pool:
        on.ready()
        worker, order_id = worker_of(on), on.trader().placed(LIMIT_ORDER)

        def replaced() -> bool:
            for _ in range(worker_module.STUCK_LOOKS):
                worker.check()
            return worker.state.replacements == 1

        with on.script.hold("cash"):
            reading = pool.submit(on.trader().cash, timeout=30)
            on.script.arrived("cash")
            lane = worker._lane
            assert lane is not None
            wait_for(lambda: lane.reads_for_long(time.monotonic()), "its limit to pass")
            more = pool.submit(on.trader().positions, timeout=30)
            wait_for(lambda: ready_calls(on) == 1, "another read behind it")
            monkeypatch.setattr(worker_module, "RECONNECTS_WITHIN", 60.0)
            assert not replaced(), "no order waits"
            if change == "cancel":
                changing = pool.submit(on.trader().cancel, order_id, timeout=29)
            else:
                changing = pool.submit(on.trader().place, LIMIT_ORDER, timeout=29)
            wait_for(lambda: ready_calls(on) == 2, "the order to wait as well")
            monkeypatch.setattr(worker_module, "RECONNECTS_WITHIN", 0.0)
            assert not replaced(), "there is time left"
            monkeypatch.setattr(worker_module, "RECONNECTS_WITHIN", 60.0)
            assert replaced()
            assert changing.result().ok
            assert more.result().ok
        assert reading.result().ok  # late, but in time for its reader


def test_an_order_that_hangs_gives_way_to_nothing_before_its_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_module, "SUPERVISION", 300.0)
    monkeypatch.setattr(worker_module, "RECONNECTS_WITHIN", 60.0)
    with stage(tmp_path, hard_limit=0.01) as on, clients() as pool:
        on.ready()
        worker, order_id = worker_of(on), on.trader().placed(LIMIT_ORDER)
        with on.script.hold("place_order"):
            placing = pool.submit(on.trader().place, LIMIT_ORDER, timeout=30)
            on.script.arrived("place_order", 2)
            canceling = pool.submit(on.trader().cancel, order_id, timeout=30)
            wait_for(lambda: ready_calls(on) == 1, "the cancellation to wait")
            for _ in range(worker_module.STUCK_LOOKS):
                worker.check()
            assert worker.state.replacements == 0
        assert placing.result().ok
        assert canceling.result().ok


def test_a_replaced_thread_has_no_say(on: Stage) -> None:
    """It may come back between two lines of its replacement."""
    with clients() as pool, busy_worker(on, pool):
        worker, replaced = worker_of(on), _Lane(worker_of(on), 0.0)
        call = worker.submit(Call("positions", {}, time.monotonic() + 30))
        assert worker.next_call(replaced) == (None, None)
        worker.disconnected(replaced, "The line was cut", 600.0, failed=True)
        assert worker.state.connected and not worker._pausing and not call.done()
        worker._pausing, worker.state.connected = True, False
        worker.connecting(replaced)
        worker.connected(replaced)
        assert worker._pausing and not worker.state.connected
        worker._pausing, worker.state.connected = False, True
        replaced.never_started()


def test_a_call_that_is_not_ready_does_not_run(on: Stage) -> None:
    worker = worker_of(on)
    call = worker.submit(Call("cash", {}, time.monotonic() + 30, ready=False))
    assert on.trader().positions().ok  # which came later
    assert not on.script.calls("cash")
    assert worker.release(call) and call.result(PATIENCE) == Cash("USD", 30877.499)
    assert not worker.release(call)


def test_what_is_held_up_right_before_it_is_sent_is_not_sent_late(tmp_path: Path) -> None:
    """By a slow disk: neither after its deadline, nor by a thread that has been replaced."""
    with stage(tmp_path, hard_limit=0.05) as on:
        on.ready()
        worker = worker_of(on)
        deadline = time.monotonic() + 0.2
        late = Call("cash", {}, deadline, begin=lambda: wait_for(past(deadline), "the deadline"))
        with pytest.raises(TimedOut):
            worker.submit(late).result(PATIENCE)
        lane, gate = worker._lane, threading.Event()
        assert lane is not None
        held = Call("cash", {}, time.monotonic() + 600, begin=lambda: gate.wait(300) and None)
        worker.submit(held)
        wait_for(lambda: lane.current is held, "the call to begin")
        until = lane._running_until
        assert until is not None and until > held.deadline  # while its client waits
        lane._running_until = time.monotonic()
        wait_for(lambda: lane._given_up, "the thread to be replaced")
        gate.set()
        with pytest.raises(TimedOut):
            held.result(PATIENCE)
        assert not on.script.calls("cash")


def past(moment: float) -> Callable[[], bool]:
    return lambda: time.monotonic() > moment


class Abortable(ScriptedBroker):
    def abort(self) -> None:
        self.script.run("abort", {})


def test_replacing_what_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is helped to end, which may hang as well; the second time there is a pause; not at all
    when the service ends."""
    monkeypatch.setattr(gateway_module, "SUPERVISION", 300.0)  # the test looks, nobody else
    monkeypatch.setattr(worker_module, "BACK_OFF", (600.0,))
    with stage(tmp_path, kind=Abortable, hard_limit=UNHURRIED) as on, clients() as pool:
        on.ready()
        worker, gate, ended = worker_of(on), threading.Event(), []
        on.script.do["abort"] = lambda: ended.append(gate.wait(PATIENCE))

        def replace_stuck() -> None:
            asked = len(on.script.calls("cash"))
            pool.submit(on.trader().cash, timeout=30)
            on.script.arrived("cash", asked + 1)
            assert worker._lane is not None
            worker._lane._running_until = time.monotonic()
            for _ in range(worker_module.STUCK_LOOKS):
                worker.check()

        with on.script.hold("cash"):
            replace_stuck()
            assert worker.state.replacements == 1 and not ended
            on.script.arrived("abort")
            assert on.trader().positions().ok
            replace_stuck()
            assert worker.state.replacements == 2
            assert worker.state.last_error == "The broker does not answer"
            assert on.trader().positions().code == "BROKER_UNAVAILABLE"
            assert on.trader().ping()["pong"] is True  # which ends the pause
            worker.drain()
            lane = worker._lane
            assert lane is not None
            lane._running_until = time.monotonic()
            for _ in range(worker_module.STUCK_LOOKS):
                worker.check()
            assert worker._lane is lane
            gate.set()


def test_a_thread_that_ended_or_hangs_beside_a_call_is_replaced(tmp_path: Path) -> None:
    with stage(tmp_path, hard_limit=0.05) as on:
        on.ready()
        worker, gate = worker_of(on), threading.Event()
        make, replaced = worker._make_backend, worker.state.replacements

        def fails_once(link: Any) -> Any:
            worker._make_backend = make
            raise MemoryError

        worker._make_backend = fails_once
        lose_quietly(on)
        wait_for(lambda: worker.state.replacements > replaced, "a fresh thread")
        wait_for(lambda: on.trader().positions().ok, "the broker to be served")
        waiting = Call("positions", {}, time.monotonic() + 300)
        recorded = Call(
            "cash",
            {},
            time.monotonic() + 300,
            begin=lambda: worker.submit(waiting) and None,  # it comes while the call runs
            finish=lambda *_: gate.wait(300) and None,
        )
        worker.submit(recorded)
        assert waiting.result(PATIENCE)
        assert not recorded.done()
        gate.set()
        assert recorded.result(PATIENCE) == Cash("USD", 30877.499)


class Counting(ScriptedBroker):
    windows = {"own": Window(2, 3600.0), "beside": Window(2, 3600.0)}
    costs = {"cash": ("own",)}


def test_what_is_asked_again_when_a_child_ends(tmp_path: Path) -> None:
    """A read, once, if it had just begun, and the windows and the service let it."""
    with stage(tmp_path, kind=Counting, hard_limit=UNHURRIED) as on, clients() as pool:
        on.ready()
        worker = worker_of(on)

        def begun(operation: str = "cash", ago: float = 0.0) -> Call:
            call = Call(operation, {}, time.monotonic() + 30)
            call.began = time.monotonic() - ago
            call.costs = ("own", "beside")
            return call

        with on.script.hold("positions"):
            busy = pool.submit(on.trader().positions, timeout=30)
            on.script.arrived("positions")
            assert not worker.asks_again(begun("place_order"))
            assert not worker.asks_again(begun(ago=worker_module.DYING_SECONDS + 0.01))
            call = begun()
            if worker.asks_again(call):  # else the machine stood still
                assert call.began is None and call.costs == ("own",)
                assert worker.withdraw(call)
                call.began = time.monotonic()
                assert not worker.asks_again(call)
            for _ in range(2):
                on.gateway.instance(on.brokers[0].instance_id).windows.take("own")
            assert not worker.asks_again(begun())
            assert worker.queued() == 0
            worker.drain()
            assert not worker.asks_again(begun("ping")) and worker.queued() == 0
        assert busy.result().ok


def test_only_so_many_threads_may_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "MOST_ABANDONED", 2)
    monkeypatch.setattr(worker_module, "BACK_OFF", (0.05,))
    with stage(tmp_path, hard_limit=0.3) as on:
        on.ready()
        instance = on.gateway.instance(on.brokers[0].instance_id)
        with on.script.hold("cash"):
            for number in range(1, 4):

                def hang(number: int = number) -> bool:
                    with pytest.raises(HttpTradingError):
                        instance.cash(None, time.monotonic() + 0.1, fresh=True)
                    return len(on.script.calls("cash")) >= number

                wait_for(hang, f"{number} hanging calls")
            worker = worker_of(on)
            wait_for(lambda: worker.state.replacements >= 2, "two replacements")
            for _ in range(5):
                with pytest.raises((TimedOut, BrokerUnavailable)):
                    instance.cash(None, time.monotonic() + 0.1, fresh=True)
            assert len(on.script.calls("cash")) == 3  # no fourth thread hangs
            lanes = [one for one in threading.enumerate() if one.name.endswith(worker.name)]
            assert len(lanes) == 3
        wait_for(lambda: on.trader().cash().ok, "the broker to be served again")
        wait_for(lambda: not worker._abandoned, "the old threads to be forgotten")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("asyncio.new_event_loop", OSError(errno.EMFILE, "Too many open files")),
        ("_Lane.start", RuntimeError("can't start new thread")),
    ],
)
def test_a_worker_that_cannot_be_replaced_now_is_replaced_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    """Nor does each attempt cost one of the threads that may hang."""
    monkeypatch.setattr(gateway_module, "SUPERVISION", 300.0)  # the test looks, nobody else

    def none_left(*_: Any) -> Any:
        raise error

    with stage(tmp_path) as on, clients() as pool:
        on.ready()
        worker = worker_of(on)
        lane = worker._lane
        assert lane is not None
        with on.script.hold("cash"):
            pool.submit(on.trader().cash, timeout=30)
            on.script.arrived("cash")
            lane._running_until = time.monotonic()
            with monkeypatch.context() as patch:
                patch.setattr(f"httptrading.brokers.worker.{place}", none_left)
                for _ in range(worker_module.STUCK_LOOKS * (worker_module.MOST_ABANDONED + 1)):
                    worker.check()
            assert worker._lane is lane and worker.state.replacements == 0
            for _ in range(worker_module.STUCK_LOOKS):
                worker.check()
            assert worker.state.replacements == 1
            assert on.trader().positions().ok


@broker_register("scriptedAsync", "剧本证券")
class AsyncBroker(ScriptedBroker):
    """The same with an `async def` that waits for ever."""

    async def cash(self) -> Cash:
        self.script.run("cash", {})
        await asyncio.Event().wait()
        raise AssertionError("never reached")

    async def place_order(self, **arguments: Any) -> str:
        self.script.run("place_order", arguments)
        await asyncio.Event().wait()
        raise AssertionError("never reached")


def test_an_async_call_is_cancelled_at_its_deadline(tmp_path: Path) -> None:
    with stage(tmp_path, kind=AsyncBroker, hard_limit=UNHURRIED) as on:
        on.ready()
        answer = on.trader().cash(timeout=1)
        assert answer.code == "TIMEOUT" and 1 <= answer.seconds < PATIENT
        placed = in_time(
            lambda seconds: on.trader().place(LIMIT_ORDER, timeout=seconds),
            lambda answer: on.script.calls("place_order"),
        )
        assert placed.code == "OUTCOME_UNKNOWN"
        assert on.trader().positions().ok
        assert len(on.script.brokers) == 1  # the same worker goes on
        assert worker_of(on).state.replacements == 0


class WithSdk(ScriptedBroker):
    sdk = "an SDK"


def test_what_an_sdk_imports_is_looked_at_by_the_garbage_collector_once(tmp_path: Path) -> None:
    before = gc.get_freeze_count()
    with stage(tmp_path, kind=WithSdk, hard_limit=UNHURRIED) as on:
        on.ready()
        frozen = gc.get_freeze_count()
        assert frozen > before
        on.script.brokers[-1].lost("cut")
        wait_for(lambda: len(on.script.brokers) == 2, "a second connection")
        on.ready()
    assert gc.get_freeze_count() <= frozen


# --- the end -------------------------------------------------------------------------------------
def test_closing_ends_soon_whatever_hangs(tmp_path: Path) -> None:
    with stage(tmp_path, count=2, hard_limit=UNHURRIED) as on, clients() as pool:
        on.ready()
        with on.script.hold("place_order", "close"):
            running = pool.submit(on.trader().place, LIMIT_ORDER, key="running", timeout=30)
            on.script.arrived("place_order")
            queued = pool.submit(on.trader().place, LIMIT_ORDER, key="queued", timeout=30)
            wait_for(lambda: worker_of(on).queued() == 1, "a queued call")
            began = time.monotonic()
            on.gateway.drain()
            answer = queued.result()
            assert (answer.status, answer.code) == (503, "BUSY")
            assert "shutting down" in answer["ex"]
            refused = on.trader(1).cash()
            assert (refused.status, refused.code) == (503, "BUSY")
            assert running.result().code == "OUTCOME_UNKNOWN"
            on.gateway.close()
            # 2 s for what is running, and half a second for each end; not the 30 s of the order.
            assert time.monotonic() - began < PATIENT
        assert on.trader(1).cash().code == "BUSY"
    assert len(on.script.calls("place_order")) == 1


def test_closing_closes_every_connection(tmp_path: Path) -> None:
    with stage(tmp_path, count=3) as on:
        on.ready()
        before = threading.active_count()
        on.gateway.close()
        # A connection that is slow to close is left to its thread after 2 s.
        wait_for(
            lambda: [len(script.calls("close")) for script in on.scripts] == [1, 1, 1], "each close"
        )
        wait_for(lambda: threading.active_count() < before - 3, "the workers' threads to end")
        on.gateway.close()  # twice is harmless


def test_nothing_starts_before_the_first_request(tmp_path: Path) -> None:
    from httptrading import create_app

    before = set(threading.enumerate())
    script = Script()
    broker = ScriptedBroker({"script": script}, "LazyBroker000001", ["lazyToken0000001"])
    app = create_app(brokers=[broker], data_dir=tmp_path / "data")
    assert not set(threading.enumerate()) - before
    assert not (tmp_path / "data").exists()
    assert app.test_client().get("/httptrading/healthz").status_code == 200
    wrong = Trader(app, "LazyBroker000001", "wrongToken0000001")
    assert wrong.cash().status == 404
    assert not set(threading.enumerate()) - before
    try:
        assert Trader(app, "LazyBroker000001", "lazyToken0000001").cash(timeout=30).ok
    finally:
        app.extensions["httptrading"].close()
