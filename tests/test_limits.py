"""Rate windows: what the broker counts, whatever the network does; kept slots; true waits."""

from __future__ import annotations

import itertools
import math
import os
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from acceptance.kit import PATIENCE, wait_for
from httptrading.brokers import limits
from httptrading.brokers.base import Window
from httptrading.brokers.limits import Windows, shared_windows
from httptrading.brokers.worker import PRIORITIES, Call
from httptrading.errors import BrokerUnavailable, Busy, RateLimited, TimedOut
from httptrading.model import Cash
from simulators.scripted import AAPL, LIMIT_ORDER, ScriptedBroker, stage

CANCEL, ORDER, READ = (PRIORITIES.get(one, 3) for one in ("cancel_order", "place_order", "cash"))


class Clock:
    """The time that the windows see; tests move it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def _put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "time", time)


def with_clock() -> Clock:
    clock = Clock()
    limits.time = clock  # type: ignore[attr-defined]
    return clock


@dataclass(frozen=True)
class Sent:
    """A call as the broker sees it: it arrives some time between its begin and its end."""

    begun: float
    arrived: float
    priority: int


def run_calls(
    windows: Windows,
    clock: Clock,
    plan: list[tuple[float, float, float, int]],
    lanes: int,
) -> list[Sent]:
    """Lets `lanes` workers send the planned calls as soon as the windows let them.

    A plan's entry: pause before it is asked for, seconds until it arrives at the broker, seconds
    from there until its answer is back, its priority.
    """
    sent: list[Sent] = []
    running: list[tuple[float, int]] = []  # (end, number)
    numbers = itertools.count()

    def advance(to: float) -> None:
        while running and min(running)[0] <= to:
            end, _ = ended = min(running)
            running.remove(ended)
            clock.now = max(clock.now, end)
            windows.end(["w"])
        clock.now = max(clock.now, to)

    for pause, there, back, priority in plan:
        advance(clock.now + pause)
        try:
            windows.admit(["w"], priority=priority, patience=1e9)
        except RateLimited:
            raise AssertionError("nobody is refused with so much patience") from None
        while True:
            if len(running) >= lanes:
                advance(min(running)[0])
                continue
            wait = windows.begin(["w"], priority=priority)
            if wait <= 0:
                break
            until = clock.now + wait
            advance(min([until, *(end for end, _ in running if end > clock.now)]))
        sent.append(Sent(clock.now, clock.now + there, priority))
        running.append((clock.now + there + back, next(numbers)))
    return sent


DELAYS = st.floats(0, 3, allow_nan=False)
PLANS = st.lists(
    st.tuples(DELAYS, DELAYS, DELAYS, st.sampled_from([CANCEL, ORDER, READ])),
    min_size=1,
    max_size=40,
)


@settings(max_examples=200)
@given(
    plan=PLANS,
    limit=st.integers(1, 6),
    seconds=st.floats(0.5, 5),
    kept=st.integers(0, 3),
    for_orders=st.integers(0, 3),
    lanes=st.integers(1, 3),
)
def test_the_broker_never_counts_more_than_the_limit(
    plan: list[tuple[float, float, float, int]],
    limit: int,
    seconds: float,
    kept: int,
    for_orders: int,
    lanes: int,
) -> None:
    kept = min(kept, limit - 1)
    for_orders = min(for_orders, limit - kept - 1)
    clock = with_clock()
    window = Window(limit, seconds, kept=kept, kept_for_orders=for_orders)
    sent = run_calls(Windows({"w": window}), clock, plan, lanes)
    assert len(sent) == len(plan)
    for priority, most in (
        (CANCEL, limit),
        (ORDER, limit - kept),
        (READ, limit - kept - for_orders),
    ):
        arrivals = sorted(one.arrived for one in sent if one.priority >= priority)
        for first, beyond in zip(arrivals, arrivals[most:], strict=False):
            assert beyond - first >= seconds - 1e-6


@settings(max_examples=100)
@given(plan=PLANS, gap=st.floats(0.01, 2))
def test_gaps_are_kept_as_the_broker_sees_them(
    plan: list[tuple[float, float, float, int]], gap: float
) -> None:
    clock = with_clock()
    sent = run_calls(Windows({"w": Window(1000, 0.001, gap=gap)}), clock, plan, lanes=1)
    for earlier, later in itertools.pairwise(sent):
        assert later.arrived - earlier.arrived >= gap - 1e-6


def test_a_burst_that_is_allowed_goes_through_at_once() -> None:
    clock = with_clock()
    windows = Windows({"w": Window(15, 30.0)})
    for _ in range(15):
        windows.admit(["w"], priority=READ, patience=0.0)
        assert windows.begin(["w"], priority=READ) == 0.0
        windows.end(["w"])
    assert clock.now == 1000.0
    with pytest.raises(RateLimited) as refused:
        windows.admit(["w"], priority=READ, patience=29.9)
    assert refused.value.retry_after == pytest.approx(30.0)


def test_the_last_slots_are_kept_for_cancels_and_those_before_for_orders() -> None:
    with_clock()
    windows = Windows({"w": Window(9, 30.0, kept=2, kept_for_orders=4)})

    def send(priority: int) -> None:
        windows.admit(["w"], priority=priority, patience=0.0)
        assert windows.begin(["w"], priority=priority) == 0.0
        windows.end(["w"])

    for priority, most in ((READ, 3), (ORDER, 4), (CANCEL, 2)):
        for _ in range(most):
            send(priority)
        with pytest.raises(RateLimited) as refused:
            send(priority)
        assert refused.value.retry_after == pytest.approx(30.0)
    with pytest.raises(RateLimited):
        windows.take("w", priority=CANCEL)


def test_a_slot_beside_the_queue_is_of_the_rank_of_its_call() -> None:
    """But what is kept for cancellations is for nothing beside them."""
    with_clock()
    windows = Windows({"w": Window(3, 30.0, kept=1, kept_for_orders=1)})
    for priority, beyond in ((READ, READ), (ORDER, CANCEL)):
        windows.take("w", priority=priority)
        with pytest.raises(RateLimited):
            windows.take("w", priority=beyond)
    assert windows.state()["w"].left == 1


@pytest.mark.parametrize("priority", [0, 1])
def test_queued_reads_do_not_stand_before_an_order_and_a_cancel(priority: int) -> None:
    with_clock()
    windows = Windows({"w": Window(3, 30.0, kept=1)})
    for _ in range(20):
        windows.admit(["w"], priority=READ, patience=1e9)
    windows.admit(["w"], priority=priority, patience=0.0)
    assert windows.begin(["w"], priority=priority) == 0.0


@settings(max_examples=150)
@given(
    limit=st.integers(1, 5),
    kept=st.integers(0, 2),
    queued=st.integers(0, 17),
    spacing=st.lists(st.floats(0, 1), min_size=6, max_size=6),
)
def test_retry_after_is_true(limit: int, kept: int, queued: int, spacing: list[float]) -> None:
    """Who comes again after the told time finds a slot, and not one that was free long before."""
    kept = min(kept, limit - 1)
    clock = with_clock()
    windows = Windows({"w": Window(limit, 10.0, kept=kept)})

    def send() -> float:
        while (wait := windows.begin(["w"], priority=READ)) > 0:
            clock.now += wait
        windows.end(["w"])
        return clock.now

    for pause in spacing[: limit - kept]:
        clock.now += pause
        windows.admit(["w"], priority=READ, patience=0.0)
        send()
    clock.now += spacing[-1]
    for _ in range(queued):
        windows.admit(["w"], priority=READ, patience=1e9)
    asked = clock.now
    with pytest.raises(RateLimited) as refused:
        windows.admit(["w"], priority=READ, patience=0.0)
    told = refused.value.retry_after
    assert told is not None
    for _ in range(queued):
        send()
    windows.admit(["w"], priority=READ, patience=1e9)
    assert send() == pytest.approx(asked + told, abs=1e-6)


@pytest.mark.parametrize(
    ("window", "told"),
    [(Window(2, 10.0), 10.0), (Window(9, 10.0, gap=2.0), 4.0), (Window(1, 10.0), 20.0)],
    ids=["slots", "gap", "rounds"],
)
def test_those_queued_are_ahead_of_who_comes_after_them(window: Window, told: float) -> None:
    """Also where nothing has been sent for long, but for the call that the gap is to."""
    with_clock()
    windows = Windows({"w": window})
    if window.gap:
        windows.take("w")
        windows.end(["w"])
    for _ in range(1 if window.gap else 2):
        windows.admit(["w"], priority=READ, patience=1e9)
    with pytest.raises(RateLimited) as refused:
        windows.admit(["w"], priority=READ, patience=0.0)
    assert refused.value.retry_after == pytest.approx(told)


def test_a_withdrawn_call_gives_its_place_back() -> None:
    with_clock()
    windows = Windows({"w": Window(1, 10.0)})
    for priority in (CANCEL, ORDER, READ):
        for _ in range(5):
            windows.admit(["w"], priority=priority, patience=0.0)
            windows.withdraw(["w"], priority=priority)
    assert windows.state()["w"].left == 1


def test_a_slot_beside_the_queue() -> None:
    clock = with_clock()
    windows = Windows({"w": Window(2, 10.0, kept=1)})
    windows.take("w")
    windows.end(["w"])
    with pytest.raises(RateLimited) as refused:
        windows.take("w")
    assert refused.value.retry_after == pytest.approx(10.0)
    clock.now += 10.0
    windows.take("w")


def test_a_slot_beside_the_queue_keeps_the_gap_to_calls_of_others() -> None:
    clock = with_clock()
    windows = Windows({"w": Window(9, 10.0, gap=2.0)})
    windows.take("w")
    windows.take("w", own=clock.now)  # an operation's own second call
    own = clock.now
    clock.now += 0.5
    with pytest.raises(RateLimited) as refused:
        windows.take("w")
    assert refused.value.retry_after == pytest.approx(1.5)
    clock.now += 1.5
    windows.take("w")  # another connection's
    clock.now += 0.5
    with pytest.raises(RateLimited) as refused:
        windows.take("w", own=own)
    assert refused.value.retry_after == pytest.approx(1.5)
    clock.now += 1.5
    windows.take("w", own=own)


def test_two_slots_of_one_window() -> None:
    clock = with_clock()
    windows = Windows({"w": Window(3, 10.0, gap=6.0)})
    twice = ["w", "w"]
    windows.admit(twice, priority=READ, patience=0.0)
    assert windows.begin(twice, priority=READ) == 0.0
    windows.end(twice)
    with pytest.raises(RateLimited):
        windows.admit(twice, priority=READ, patience=9.9)
    windows.admit(twice, priority=READ, patience=12.0)
    assert windows.begin(twice, priority=READ) == pytest.approx(10.0)
    clock.now += 10.0
    assert windows.begin(twice, priority=READ) == 0.0
    windows.end(twice)
    with pytest.raises(RateLimited) as refused:
        windows.admit(["w"], priority=READ, patience=0.0)
    assert refused.value.retry_after == pytest.approx(6.0)


def test_a_call_in_several_windows_waits_for_all() -> None:
    clock = with_clock()
    windows = Windows({"quick": Window(10, 1.0), "slow": Window(1, 60.0)})
    windows.admit(["quick", "slow"], priority=READ, patience=0.0)
    assert windows.begin(["quick", "slow"], priority=READ) == 0.0
    windows.end(["quick", "slow"])
    windows.admit(["quick"], priority=READ, patience=0.0)
    assert windows.begin(["quick"], priority=READ) == 0.0
    windows.end(["quick"])
    with pytest.raises(RateLimited) as refused:
        windows.admit(["quick", "slow"], priority=READ, patience=5.0)
    assert refused.value.retry_after == pytest.approx(60.0)
    assert windows.state()["quick"].left == 8
    clock.now += 60.0
    assert left_of(windows) == {"quick": 10, "slow": 1}
    windows.admit(["quick", "slow"], priority=READ, patience=0.0)


def test_what_is_counted_for_an_account_and_for_a_login() -> None:
    declared = {"place": Window(1, 3600.0), "quote": Window(1, 3600.0)}

    def windows(account: str, login: str) -> Windows:
        return shared_windows(lambda name: login if name == "quote" else account, declared)

    one, same, beside = windows("a1", "b"), windows("a1", "b"), windows("a2", "b")
    elsewhere = windows("a3", "c")
    for cost in declared:
        one.admit([cost], priority=READ, patience=0.0)
        assert one.begin([cost], priority=READ) == 0.0
        one.end([cost])
    left = [{name: state.left for name, state in each.state().items()} for each in (same, beside)]
    assert left == [{"place": 0, "quote": 0}, {"place": 1, "quote": 0}]
    assert {state.left for state in elsewhere.state().values()} == {1}
    with pytest.raises(RateLimited):
        beside.admit(["quote"], priority=READ, patience=0.0)


def another_life(
    monkeypatch: pytest.MonkeyPatch, folder: Path, key: str = "an account", **declared: Window
) -> Windows:
    """The windows as another process has them, which keeps its notes in the folder."""
    monkeypatch.setattr(limits, "_shared", {})
    windows = shared_windows(lambda _: key, declared or {"w": Window(9, 3600.0)})
    windows.keep_in(folder)
    return windows


def left_of(windows: Windows) -> dict[str, int]:
    return {name: state.left for name, state in windows.state().items()}


@pytest.mark.parametrize("running", [0, 2])
def test_calls_of_an_earlier_life_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: int
) -> None:
    """Whatever they were, and also those that were under way when it was killed."""
    declared = {"w": Window(9, 3600.0), "other": Window(3, 3600.0)}
    before = another_life(monkeypatch, tmp_path / "windows", **declared)
    beside = shared_windows(lambda _: "an account", declared)
    beside.keep_in(tmp_path / "windows")  # another instance with its key
    for _ in range(3):
        before.take("w")
        before.end(["w"])
    for _ in range(running):
        beside.take("w")
    before.note(["w", "other"])
    assert left_of(another_life(monkeypatch, tmp_path / "windows", "another", **declared)) == {
        "w": 9,
        "other": 3,
    }
    after = another_life(monkeypatch, tmp_path / "windows", **declared)
    after.note(["w"])
    after.keep_in(tmp_path / "windows")  # for another instance with its key: nothing counts twice
    assert left_of(after) == {"w": 9 - 3 - running, "other": 3}
    with pytest.raises(RateLimited) as refused:
        for _ in range(9):
            after.take("w")
    assert refused.value.retry_after == pytest.approx(3600.0, abs=60.0)


def test_notes_of_long_ago_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = another_life(monkeypatch, tmp_path, w=Window(2, 3600.0))
    before.take("w")
    before.end(["w"])
    before.note(["w"])
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() + 3601)
    assert left_of(another_life(monkeypatch, tmp_path, w=Window(2, 3600.0))) == {"w": 2}


def test_windows_without_a_place_for_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "windows").write_text("a file where the folder should be")
    windows = another_life(monkeypatch, tmp_path / "windows")
    windows.take("w")
    windows.note(["w"])
    assert left_of(windows) == {"w": 8}


def test_unreadable_notes_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    another_life(monkeypatch, tmp_path).note(["w"])
    (path,) = tmp_path.iterdir()
    for content in (b"", b"odd", b"\xff" * 40, bytes(80), array("d", [0, math.inf]).tobytes()):
        path.write_bytes(content)
        assert left_of(another_life(monkeypatch, tmp_path)) == {"w": 9}, content
    path.write_bytes(array("d", [1e12, 0]).tobytes())
    assert left_of(another_life(monkeypatch, tmp_path)) == {"w": 0}


def test_what_a_longer_note_left_behind_a_shorter_one_is_none_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = with_clock()
    monkeypatch.setattr(clock, "time", time.time, raising=False)
    windows = another_life(monkeypatch, tmp_path)
    for pause in (10.0, 10.0, 3580.0):
        windows.take("w")
        windows.end(["w"])
        windows.note(["w"])
        clock.now += pause
    assert left_of(windows) == {"w": 7}  # the first one is of long ago
    windows.note(["w"])
    assert left_of(another_life(monkeypatch, tmp_path)) == {"w": 7}


def test_a_clock_that_was_set_back_makes_no_wait_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = another_life(monkeypatch, tmp_path, w=Window(1, 3600.0))
    before.take("w")
    before.end(["w"])
    before.note(["w"])
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 86400)
    with pytest.raises(RateLimited) as refused:
        another_life(monkeypatch, tmp_path, w=Window(1, 3600.0)).take("w")
    assert refused.value.retry_after == pytest.approx(3600.0, abs=60.0)


def test_a_note_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lowest_free() -> int:
        found = os.open(os.devnull, os.O_RDONLY)
        os.close(found)
        return found

    windows = another_life(monkeypatch, tmp_path)
    before = lowest_free()
    windows.note(["w"])
    assert lowest_free() == before


# --- through the service ----------------------------------------------------------------------
class LimitedBroker(ScriptedBroker):
    windows = {"trade": Window(4, 3600.0, kept=2), "quotes": Window(2, 1.0)}
    costs = {
        "place_order": ("trade",),
        "cancel_order": ("trade",),
        "quote": ("quotes",),
    }
    ages = {"quote": 0.0}


def test_the_service_refuses_what_cannot_come_in_time(tmp_path: Any) -> None:
    with stage(tmp_path, kind=LimitedBroker) as on:
        on.ready()
        trader = on.trader()
        for _ in range(2):
            assert trader.place(LIMIT_ORDER).ok
        answer = trader.place(LIMIT_ORDER, key="limited")
        assert (answer.status, answer.code) == (429, "RATE_LIMITED")
        assert 3500 < int(answer.headers["Retry-After"]) <= 3600
        assert answer.error["outcome"] == "none" and answer.error["retryable"]
        for _ in range(2):  # the kept slots
            assert trader.cancel("69788888").ok
        assert trader.cancel("69788888").status == 429
        assert len(on.script.calls("place_order")) == 2
        left = {one["name"]: one["left"] for one in trader.get("instance/state")["state"]["limits"]}
        assert left["trade"] == 0


def test_a_traders_own_pollers_do_not_starve_his_orders(tmp_path: Any) -> None:
    """Those of several clients, which have used up what reads may and wait for more."""

    class OneWindow(ScriptedBroker):
        windows = {"all": Window(9, 3600.0, kept=1, kept_for_orders=2)}
        costs = dict.fromkeys(("place_order", "cancel_order", "order", "quote"), ("all",))
        ages = {"order": 0.0, "quote": 0.0}

    with stage(tmp_path, kind=OneWindow) as on:
        on.ready()
        trader = on.trader()
        polled = [trader.quote("US", "AAPL") for _ in range(10)]
        assert [answer.status for answer in polled] == [200] * 6 + [429] * 4
        assert 3500 < int(polled[-1].headers["Retry-After"]) <= 3600
        (shown,) = trader.get("instance/state")["state"]["limits"]
        assert (shown["left"], shown["kept"], shown["keptForOrders"]) == (3, 1, 2)
        placed = [trader.place(LIMIT_ORDER) for _ in range(3)]
        assert [answer.status for answer in placed] == [200, 200, 429]
        assert 3500 < int(placed[-1].headers["Retry-After"]) <= 3600
        assert trader.cancel(placed[0]["orderId"]).ok


def test_a_call_that_can_wait_waits(tmp_path: Any) -> None:
    with stage(tmp_path, kind=LimitedBroker) as on:
        on.ready()
        trader = on.trader()
        assert all(trader.quote("US", "AAPL").ok for _ in range(3))
        times = [one.time for one in on.script.calls("quote")]
        assert times[2] - times[0] >= 1.0


def test_the_call_whose_slot_is_free_first_goes_first(tmp_path: Any) -> None:
    class TwoWindows(ScriptedBroker):
        windows = {"slow": Window(1, 25.0), "quick": Window(1, 0.5)}
        costs = {"quote": ("slow",), "cash": ("quick",)}

    with stage(tmp_path, kind=TwoWindows) as on, ThreadPoolExecutor() as pool:
        on.ready()
        assert on.trader().quote("US", "AAPL").ok and on.trader().cash().ok
        late = pool.submit(on.trader().quote, "US", "AAPL")
        (worker,) = on.gateway.instance(on.brokers[0].instance_id).workers.values()
        wait_for(lambda: worker.queued() == 1, "the quote to be queued")
        assert on.trader().cash().ok
        assert len(on.script.calls("quote")) == 1
        on.gateway.drain()
        assert late.result().code == "BUSY"


class BesideBroker(ScriptedBroker):
    """What it does takes a slot beside its own."""

    windows = {"own": Window(9, 3600.0), "extra": Window(9, 3600.0)}
    costs = {"cash": ("own",)}

    def cash(self) -> Cash:  # type: ignore[override]
        self.take("extra")
        return super().cash()

    def place_order(self, **arguments: Any) -> str:  # type: ignore[override]
        self.take("extra")
        return super().place_order(**arguments)


def test_every_slot_is_noted_before_it_is_used_and_afterwards(tmp_path: Path) -> None:
    """Before: the process may be killed while the call runs."""

    def noted() -> list[tuple[float, ...]]:
        """Of each window how many were running, and how many had ended."""
        notes = (tmp_path / "windows").iterdir()
        return [tuple(array("d", note.read_bytes())[:2]) for note in notes]

    with stage(tmp_path, kind=BesideBroker) as on:
        on.ready()
        seen: list[Any] = []
        on.script.do["cash"] = lambda: seen.extend(noted()) or Cash("USD", 1)
        assert on.trader().cash().ok
        assert seen == [(1, 0), (1, 0)]
        wait_for(lambda: noted() == [(0, 1), (0, 1)], "the notes after it")


def test_slots_beside_an_operation(tmp_path: Path) -> None:
    """They come back, are of the operation's rank, and keep no gap among themselves."""

    class Short(BesideBroker):
        windows = {"own": Window(9, 1.0), "extra": Window(1, 0.05)}

    with stage(tmp_path / "short", kind=Short) as on:
        on.ready()
        for _ in range(3):
            wait_for(lambda: on.trader().cash().ok, "a slot that comes back")

        def beside() -> bool:
            with suppress(RateLimited):
                on.script.brokers[-1].take("extra")  # outside of any operation
                return True
            return False

        for _ in range(3):
            wait_for(beside, "a slot that comes back at once")

    class ForOrders(BesideBroker):
        windows = {"own": Window(9, 1.0), "extra": Window(2, 3600.0, kept_for_orders=1)}

    with stage(tmp_path / "orders", kind=ForOrders) as on:
        on.ready()
        assert [on.trader().cash().status for _ in range(2)] == [200, 429]
        assert on.trader().place(LIMIT_ORDER).ok

    class Apart(BesideBroker):
        windows = {"own": Window(9, 1.0), "extra": Window(9, 3600.0, gap=600.0)}

    with stage(tmp_path / "apart", kind=Apart) as on:
        on.ready()
        on.script.do["cash"] = lambda: on.script.brokers[-1].take("extra") or Cash("USD", 1)
        assert on.trader().cash().ok


@pytest.mark.parametrize("way", ["withdrawn", "expired", "refused", "drained"])
def test_a_call_that_leaves_the_queue_unrun_takes_no_slot(tmp_path: Any, way: str) -> None:
    def unreachable() -> None:
        raise BrokerUnavailable("XX is not reachable")

    with stage(tmp_path, kind=LimitedBroker, hard_limit=60.0) as on, ThreadPoolExecutor() as pool:
        on.ready()
        instance = on.gateway.instance(on.brokers[0].instance_id)
        worker = instance.worker("quote")
        with on.script.hold("cash"):
            hanging = pool.submit(on.trader().cash)
            on.script.arrived("cash")
            deadline = time.monotonic() + (0.1 if way == "expired" else 30.0)
            call = worker.submit(Call("quote", {"contract": AAPL}, deadline))
            match way:
                case "withdrawn":
                    assert worker.withdraw(call)
                case "expired":
                    wait_for(lambda: time.monotonic() > deadline, "the deadline")
                case "refused":
                    on.script.do["connect"] = unreachable
                    on.script.brokers[-1].lost("The line was cut")
                case "drained":
                    worker.drain()
        hanging.result()
        if way != "withdrawn":
            with pytest.raises((BrokerUnavailable, Busy, TimedOut)):
                call.result(PATIENCE)
        assert not on.script.calls("quote")
        instance.windows.admit(["quotes"] * 2, priority=READ, patience=0.0)  # both are free


def test_instances_with_the_same_credentials_share_their_windows(tmp_path: Any) -> None:
    class OneAccount(LimitedBroker):
        def account_key(self) -> str:
            return "test:one-account-in-two-instances"

    with stage(tmp_path, count=2, kind=OneAccount) as on:
        on.ready()
        assert all(on.trader(number).place(LIMIT_ORDER).ok for number in (0, 1))
        assert [on.trader(number).place(LIMIT_ORDER).status for number in (0, 1)] == [429, 429]


def test_what_was_sent_before_a_restart_counts(tmp_path: Any, monkeypatch: Any) -> None:
    """Cancellations and questions, too, which the journal does not hold."""

    class SameAccount(LimitedBroker):
        def account_key(self) -> str:
            return "test:the-same-account-again"

    with stage(tmp_path, kind=SameAccount) as on:
        on.ready()
        assert [on.trader().cancel("69788888").status for _ in range(2)] == [200, 200]
    monkeypatch.setattr(limits, "_shared", {})  # another process
    with stage(tmp_path, kind=SameAccount) as on:
        on.ready()
        assert on.trader().place(LIMIT_ORDER).code == "RATE_LIMITED"
