"""`isolation = "process"`: a child may hang, die or lie, and nobody else notices."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest
from flask import Flask

from acceptance.kit import Trader, in_time, wait_for
from httptrading import InstanceSettings, create_app
from httptrading.brokers import worker as worker_module
from httptrading.brokers.child import PICKLE_PROTOCOL, _PlainPickler
from httptrading.brokers.process import ChildBroker, own_paths
from httptrading.brokers.worker import Ended
from httptrading.errors import BrokerUnavailable
from simulators.isolated import IsolatedBroker

ORDER: dict[str, Any] = {
    "tradeType": "Securities",
    "ticker": "GOOD",
    "region": "US",
    "price": 12.5,
    "qty": 12,
    "orderType": "Limit",
    "timeInForce": "DAY",
    "lifecycle": "RTH",
    "direction": "BUY",
}
IDS = ("IsolatedOne00001", "IsolatedTwo00002")
TOKENS = ("isolatedToken0001", "isolatedToken0002")
AT_ONCE = 20.0
"""Seconds: more than a machine stands still, less than any deadline of a call that may not wait."""


class Pair:
    """Two instances, each in a child process of its own."""

    def __init__(self, app: Flask, folder: Path) -> None:
        self.app = app
        self.folder = folder
        self.gateway = app.extensions["httptrading"]

    def trader(self, number: int = 0) -> Trader:
        return Trader(self.app, IDS[number], TOKENS[number])

    def pid(self, number: int = 0) -> int:
        answer = self.trader(number).quote("US", "PID")
        assert answer.ok, answer
        return int(answer["quote"]["latest"])

    def orders(self) -> int:
        ledger = self.folder / "ledger-0"
        return len(ledger.read_text().splitlines()) if ledger.exists() else 0

    def ready(self) -> None:
        for number in range(2):
            trader = self.trader(number)
            wait_for(lambda trader=trader: trader.cash().ok, "the child to serve")


@contextmanager
def pair(folder: Path, **settings: Any) -> Iterator[Pair]:
    # A child that has just been started may need long for its first breath.
    room = {"deadline": 30.0, "connect_timeout": 60.0, "hard_limit": 1.0}
    settings = {"isolation": "process"} | room | settings
    app = create_app(
        brokers=[
            InstanceSettings(
                IsolatedBroker({"ledger": str(folder / f"ledger-{number}")}, name, [token]),
                **settings,
            )
            for number, (name, token) in enumerate(zip(IDS, TOKENS, strict=True))
        ],
        data_dir=folder / "data",
    )
    running = Pair(app, folder)
    running.gateway.start()
    try:
        running.ready()
        yield running
    finally:
        running.gateway.close()


@pytest.fixture(scope="module", autouse=True)
def _short_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_module, "BACK_OFF", (0.05, 0.1, 0.2))
        yield


@pytest.fixture(scope="module")
def on(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair(tmp_path_factory.mktemp("pair")) as running:
        yield running


@pytest.fixture(autouse=True)
def _served(request: pytest.FixtureRequest) -> None:
    """Whatever the case before did, both instances serve again."""
    if "on" in request.fixturenames:
        running: Pair = request.getfixturevalue("on")
        running.ready()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- it works -----------------------------------------------------------------------------------
def test_each_instance_has_a_child_of_its_own(tmp_path: Path) -> None:
    with pair(tmp_path, hard_limit=60.0) as on:  # none is replaced for standing still
        pids = [on.pid(0), on.pid(1)]
        assert len({*pids, os.getpid()}) == 3
        parents = [on.trader(number).quote("US", "PARENT")["quote"]["latest"] for number in (0, 1)]
        assert parents == [os.getpid()] * 2
        assert on.pid() == pids[0]  # the same one serves on


def test_orders_errors_and_pushes_cross_the_pipe(on: Pair) -> None:
    trader = on.trader()
    order_id = trader.placed(ORDER, key="over-the-pipe")
    assert trader.order(order_id)["qty"] == 12
    refused = trader.place({**ORDER, "ticker": "REFUSE"})
    assert (refused.status, refused.code, refused["ex"]) == (422, "BROKER_REJECTED", "Not this one")
    poor = trader.place({**ORDER, "ticker": "FUNDS"})
    assert (poor.status, poor.code, poor["ex"]) == (422, "BROKER_REJECTED", "10 needed, 5 there")
    assert trader.state("404404").code == "ORDER_NOT_FOUND"
    assert trader.positions().code == "UNSUPPORTED"
    assert trader.cancel(order_id).ok
    trader.wait_order(order_id, isCanceled=True, isCompleted=True)


def test_what_a_broker_tells_beside_its_answers_crosses_the_pipe(
    on: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    trader, instance, before = on.trader(), on.gateway.instance(IDS[0]), on.pid()
    told: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("on_stale", "on_fills", "on_restored"):
            patch.setattr(instance, name, lambda *_, name=name: told.append(name))
        assert trader.quote("US", "NEWS").ok
        assert told == ["on_stale", "on_fills", "on_restored"]
    assert trader.quote("US", "ONCE").ok
    again = trader.quote("US", "ONCE")
    assert (again.status, again.code) == (429, "RATE_LIMITED")
    assert int(again.headers["Retry-After"]) > 3000
    assert trader.ping()["pong"] is True
    assert on.pid() == before
    assert trader.quote("US", "LOST").ok
    wait_for(lambda: trader.cash().ok and on.pid() != before, "a new child")


def test_what_only_an_sdk_knows_leaves_the_child_as_pythons(on: Pair) -> None:
    before = on.pid()
    quote = on.trader().quote("US", "SDK")["quote"]
    assert (quote["currency"], quote["latest"], quote["preClose"]) == ("USD", 12.25, 12)
    assert quote["timestamp"] == 1767294245600  # 03:04:05.6 in Hong Kong
    assert on.pid() == before


@pytest.mark.parametrize("base", [datetime, type("datetime", (datetime,), {})])
@pytest.mark.parametrize("zone", [None, UTC, ZoneInfo("Asia/Hong_Kong")])
def test_a_moment_leaves_the_child_as_pythons_own(base: Any, zone: Any) -> None:
    """Without the SDK's class, and without the zone's, whose names not every machine has."""
    moment, data = base(2026, 1, 2, 3, 4, 5, 600_000, zone), io.BytesIO()
    _PlainPickler(data, PICKLE_PROTOCOL).dump(moment)
    found = pickle.loads(data.getvalue())
    assert type(found) is datetime and found == moment
    assert found.tzinfo is None if zone is None else type(found.tzinfo) is timezone


@pytest.mark.parametrize("ticker", ["LOCK", "LOCAL"])
def test_an_answer_that_cannot_leave_the_child_does_not_end_it(on: Pair, ticker: str) -> None:
    before = on.pid()
    assert on.trader().quote("US", ticker).code == "INTERNAL"
    assert on.pid() == before


def test_what_a_library_cancels_does_not_end_the_child(on: Pair) -> None:
    before = on.pid()
    assert on.trader().quote("US", "CANCEL").code == "INTERNAL"
    assert on.trader().place({**ORDER, "ticker": "CANCEL"}).code == "OUTCOME_UNKNOWN"
    assert on.pid() == before


def test_the_child_has_no_tokens(on: Pair) -> None:
    """The service still needs them."""
    assert on.trader().quote("US", "TOKENS")["quote"]["latest"] == 0
    assert on.gateway.instance(IDS[0]).broker.tokens == [TOKENS[0]]


# --- it goes wrong -------------------------------------------------------------------------------
DEATHS = ["KILL", "EXIT", "SEGV", "JUNK", "LIE", "HUGE", "CLOSE"]
SILENCES = ["HANG", "STOP", "GIL", "PART"]


@pytest.mark.parametrize("ticker", DEATHS)
def test_a_child_that_dies_or_lies_in_a_read(on: Pair, ticker: str) -> None:
    before = on.pid()
    answer = on.trader().quote("US", ticker, timeout=30)
    assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE"), answer
    assert answer.seconds < AT_ONCE  # not at the deadline
    assert on.trader(1).cash().ok
    wait_for(lambda: on.trader().cash().ok, "a new child")
    assert on.pid() != before
    wait_for(lambda: gone(before), "the end of the old child")


@pytest.mark.parametrize("ticker", SILENCES)
def test_a_child_that_falls_silent_in_a_read(on: Pair, ticker: str) -> None:
    before = on.pid()

    def fell_silent() -> bool:
        answer = on.trader().quote("US", ticker, timeout=1)
        assert (answer.status, answer.code) == (504, "TIMEOUT"), answer
        assert 1 <= answer.seconds < AT_ONCE
        assert on.trader(1).cash().ok
        found = on.trader().cash()  # the very next call is served, by a new child
        assert found.ok, found
        return on.pid() != before  # else it was not asked within the second

    wait_for(fell_silent, "the child to be asked in time")
    wait_for(lambda: gone(before), "the end of the old child")


@pytest.mark.parametrize("ticker", ["KILL", "JUNK", "STOP", "GIL"])
def test_an_order_in_a_child_that_goes_wrong(on: Pair, ticker: str) -> None:
    """It had reached the broker: unknown first, then found by its mark, and never sent again."""
    before, key = on.orders(), f"order-{ticker}"
    order = {**ORDER, "ticker": ticker}
    answer = in_time(
        lambda seconds: on.trader().place(order, key=key, timeout=seconds),
        lambda answer: on.orders() > before,
    )
    if not answer.ok:  # else the settlement was quicker than the answer
        assert (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN"), answer
        assert answer.error["clientOrderId"] == key
    wait_for(lambda: on.trader().state(key=key).ok, "the order to be found")
    order_id = on.trader().order(key=key)["orderId"]
    assert not answer.ok or answer["orderId"] == order_id
    again = on.trader().place(order, key=key)
    assert again.ok and again.replayed and again["orderId"] == order_id
    assert on.orders() == before + 1


def test_a_child_killed_or_frozen_from_outside(on: Pair) -> None:
    first = on.pid()
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: gone(first), "the first child's end")
    wait_for(lambda: on.trader().cash().ok, "a new child")
    second = on.pid()
    assert second != first
    os.kill(second, signal.SIGSTOP)
    codes: list[str] = []

    def noticed() -> bool:
        codes.append(on.trader().cash(timeout=1).code)
        return gone(second)

    wait_for(noticed, "the end of the frozen child")
    assert codes[0] == "TIMEOUT"
    assert on.trader().cash().ok
    assert on.pid() not in (first, second)


def test_a_frozen_neighbour_costs_nothing(on: Pair) -> None:
    frozen, answers = on.pid(), []
    waiting = threading.Thread(
        target=lambda: answers.append(on.trader().quote("US", "GIL", timeout=30))
    )
    waiting.start()
    (worker,) = on.gateway.instance(IDS[0]).workers.values()
    wait_for(lambda: worker._lane.current, "the neighbour to be asked")
    assert all(on.trader(1).cash().ok for _ in range(20))
    assert waiting.is_alive()  # nobody waited for it
    last = worker._lane.current.began + worker_module.DYING_SECONDS
    wait_for(lambda: time.monotonic() > last, "a read that is not asked again")
    os.kill(frozen, signal.SIGKILL)
    waiting.join(60)
    assert answers[0].code == "BROKER_UNAVAILABLE"


def test_a_late_waiter_is_told_of_the_silence(on: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The read was sent and not answered, however long ago the child has been replaced."""
    instance = on.gateway.instance(IDS[0])
    (worker,) = instance.workers.values()
    before, wait = worker.state.replacements, instance.wait

    def slow(call: Any, deadline: float) -> Any:
        try:
            return wait(call, deadline)
        except TimeoutError:
            if call.operation == "quote" and call.began is not None:
                wait_for(lambda: worker.state.replacements > before, "a new child's start")
            raise

    monkeypatch.setattr(instance, "wait", slow)
    answer = in_time(
        lambda seconds: on.trader().quote("US", "HANG", timeout=seconds),
        lambda answer: worker.state.replacements > before,
    )
    assert (answer.status, answer.code) == (504, "TIMEOUT"), answer


def test_the_next_call_after_a_kill_is_served(on: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its child has not lived for long, and is only dying when the call comes."""
    monkeypatch.setattr(worker_module, "DYING_SECONDS", 60.0)
    (worker,) = on.gateway.instance(IDS[0]).workers.values()

    def kill(*, seen: bool) -> None:
        before = worker.state.reconnects
        os.kill(on.pid(), signal.SIGKILL)
        if seen:
            wait_for(lambda: worker.state.reconnects > before, "its end to be seen")

    for number in range(6):
        kill(seen=number % 2 == 0)
        answer = on.trader().cash()
        assert answer.ok, answer
    for _ in range(3):
        kill(seen=True)
        assert on.trader().placed(ORDER)


def test_a_broker_that_is_down_in_its_child(tmp_path: Path) -> None:
    with pair(tmp_path) as on:
        mark = tmp_path / "ledger-0.down"
        mark.touch()
        os.kill(on.pid(), signal.SIGKILL)
        wait_for(lambda: "The book is closed" in on.trader().cash().text, "why it is down")
        answer = on.trader().place(ORDER)
        assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE")
        assert int(answer.headers["Retry-After"]) >= 1
        assert on.trader().ping()["pong"] is False
        mark.unlink()
        wait_for(lambda: on.trader().cash().ok, "the broker to be back")


def test_whole_numbers_as_limits(tmp_path: Path) -> None:
    """The child understands an int where the default is a float, and really opens."""
    with pair(tmp_path, connect_timeout=60, deadline=30, hard_limit=1) as on:
        assert on.trader().placed(ORDER)


# --- the end -------------------------------------------------------------------------------------
@pytest.mark.parametrize("ticker", ["HANG", "STOP", "GIL"])
def test_closing_ends_the_children_soon(tmp_path: Path, ticker: str) -> None:
    with pair(tmp_path) as on:
        pids = [on.pid(0), on.pid(1)]
        answers = []
        waiting = threading.Thread(
            target=lambda: answers.append(
                on.trader().place({**ORDER, "ticker": ticker}, key="at-the-end", timeout=30)
            )
        )
        waiting.start()
        wait_for(lambda: on.orders() == 1, "the order to reach the broker")
        began = time.monotonic()
        instance, lock = on.gateway.instance(IDS[0]), on.gateway._locks[IDS[0]]
        on.gateway.close()
        assert time.monotonic() - began < AT_ONCE
        waiting.join(60)
        assert answers[0].code == "OUTCOME_UNKNOWN"
        for pid in pids:
            wait_for(lambda pid=pid: gone(pid), "the children's end")
        wait_for(lambda: not instance.is_stuck, "the call's end")
        lock.release()  # close() does not wait for it on a machine that stands still
    with pair(tmp_path) as on:  # the next start finds what became of it
        wait_for(lambda: on.trader().state(key="at-the-end").ok, "the order to be settled")
        assert on.orders() == 1


HOST = """
    import sys, time
    from httptrading import InstanceSettings, create_app
    from simulators.isolated import IsolatedBroker

    folder = sys.argv[1]
    book = {"ledger": folder + "/ledger"}
    broker = IsolatedBroker(book, "IsolatedOne00001", ["isolatedToken0001"])
    app = create_app(
        brokers=[InstanceSettings(broker, isolation="process", deadline=30, connect_timeout=60)],
        data_dir=folder + "/data",
    )
    client = app.test_client()
    def ask(route):
        return client.get(
            "/httptrading/api/IsolatedOne00001/" + route, headers={"HT-TOKEN": "isolatedToken0001"}
        )
    while ask("cash/state").status_code != 200:
        time.sleep(0.05)
    quote = "market/quote?tradeType=Securities&region=US&ticker="
    ask(quote + "SAY")
    print(ask(quote + "PID").json["quote"]["latest"], flush=True)
    if sys.argv[2] == "hang":
        ask(quote + "GIL")
    sys.stdin.readline()
    app.extensions["httptrading"].close()
"""


@contextmanager
def host(folder: Path, mode: str) -> Iterator[subprocess.Popen[str]]:
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOST), str(folder), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("mode", ["idle", "hang"])
def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path, mode: str) -> None:
    with host(tmp_path, mode) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        assert not gone(pid)
        if mode == "hang":
            wait_for((tmp_path / "ledger.silent").exists, "the child to fall silent")
        process.kill()
        wait_for(lambda: gone(pid), "the orphan's end")


def test_what_a_child_prints_does_not_reach_our_stdout(tmp_path: Path) -> None:
    with host(tmp_path, "idle") as process:
        assert process.stdout is not None
        pid = process.stdout.readline()
        out, err = process.communicate("\n", timeout=60)
        assert process.returncode == 0
        assert int(pid) and out == ""
        for text in ("printed while connecting", "said on stdout by print", "by write"):
            assert text in err


# --- another interpreter -------------------------------------------------------------------------
def other_python() -> str:
    """Another Python 3.11 or newer of this machine; else this one."""
    siblings = Path(sys.base_prefix).parent.glob("3.1[1-9]*/bin/python3")
    named = (shutil.which(f"python3.{minor}") for minor in (13, 12, 14, 11))
    for found in [*filter(None, named), *map(str, sorted(siblings, reverse=True))]:
        test = [found, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
        if subprocess.run(test, capture_output=True).returncode == 0:
            return found
    return sys.executable


def test_a_child_of_another_interpreter(tmp_path: Path) -> None:
    python = other_python()
    minor = subprocess.run(
        [python, "-c", "import sys; print(sys.version_info.minor)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    with pair(tmp_path, isolation=None, python=python) as on:
        assert on.trader().quote("US", "MINOR")["quote"]["latest"] == int(minor)
        order_id = on.trader().placed(ORDER)
        assert on.trader().order(order_id)["qty"] == 12
        assert on.trader().place({**ORDER, "ticker": "REFUSE"})["ex"] == "Not this one"
        assert on.trader().quote("US", "KILL").code == "BROKER_UNAVAILABLE"
        wait_for(lambda: on.trader().cash().ok, "a new child")


def test_another_interpreter_does_not_get_our_packages() -> None:
    assert not [path for path in own_paths() if "site-packages" in path]
    assert str(Path(__file__).parent) in own_paths()  # a custom broker's folder


class Unsendable(IsolatedBroker):
    """Defined at a place that only this process knows, once the module is renamed."""


def test_a_broker_that_cannot_go_to_a_child_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"ledger": str(tmp_path / "ledger")}

    def told(broker: IsolatedBroker, words: str) -> None:
        settings = InstanceSettings(broker, isolation="process", connect_timeout=60)
        app = create_app(brokers=[settings], data_dir=tmp_path / "data")
        try:
            trader = Trader(app, IDS[0], TOKENS[0])
            answer = wait_for(lambda: words in str((seen := trader.cash())["ex"]) and seen, words)
            assert answer.status == 503
        finally:
            app.extensions["httptrading"].close()

    lock = IsolatedBroker({**arguments, "lock": threading.Lock()}, IDS[0], [TOKENS[0]])
    told(lock, "arguments of 隔离证券 cannot be handed")
    broker = Unsendable(arguments, IDS[0], [TOKENS[0]])
    monkeypatch.setattr(Unsendable, "__module__", "a_module_that_vanished")
    module = types.ModuleType("a_module_that_vanished")
    monkeypatch.setitem(sys.modules, "a_module_that_vanished", module)
    module.Unsendable = Unsendable  # type: ignore[attr-defined]
    told(broker, "ModuleNotFoundError of a_module_that_vanished")
    monkeypatch.setattr(Unsendable, "__module__", "__main__")
    told(broker, "put the class into a module of its own")


def test_an_interpreter_that_cannot_run_us_is_told(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    broker = IsolatedBroker({"ledger": "x"}, IDS[0], [TOKENS[0]])
    app = create_app(
        brokers=[InstanceSettings(broker, python=str(fake))], data_dir=tmp_path / "data"
    )
    try:
        trader = Trader(app, IDS[0], TOKENS[0])
        answer = wait_for(lambda: "child process" in (found := trader.cash()).text and found, "why")
        assert answer.status == 503
    finally:
        app.extensions["httptrading"].close()


def test_a_child_that_is_gone_when_it_is_asked(tmp_path: Path) -> None:
    """Its end is noticed by writing to it, before the loop has read it; that is told once."""
    prototype = IsolatedBroker({"ledger": str(tmp_path / "ledger")}, IDS[0], [TOKENS[0]])
    unheard: list[Any] = []

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, told: unheard.append(told))
        child = ChildBroker(prototype, "trade", tmp_path, None)
        await child.open(60.0)
        child.interrupt()
        psutil.Process(child.pid).wait(60)
        assert child.ended()
        with pytest.raises(Ended):
            await child.run("cash", {}, 60.0)
        with pytest.raises(BrokerUnavailable):  # it was not sent, so not unknown
            await child.run("place_order", {}, 60.0)
        await child.close()
        del child
        gc.collect()

    asyncio.run(ask())
    assert not unheard


@pytest.mark.parametrize("python", [None, "/no/such/python"])
def test_nothing_that_was_made_for_a_child_outlives_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str | None
) -> None:
    prototype = IsolatedBroker({"ledger": str(tmp_path / "ledger")}, IDS[0], [TOKENS[0]])
    made: list[int] = []
    closed: list[int] = []
    ends: list[socket.socket] = []
    me, pipe, close, pair_of = threading.get_ident(), os.pipe, os.close, socket.socketpair

    def record(kept: list[Any], *values: Any) -> None:
        kept += values if threading.get_ident() == me else ()

    def recorded_pipe() -> tuple[int, int]:
        record(made, *(both := pipe()))
        return both

    def recorded_pair() -> Any:
        record(ends, *(both := pair_of()))
        return both

    async def live() -> None:
        monkeypatch.setattr(os, "pipe", recorded_pipe)
        monkeypatch.setattr(os, "close", lambda one: (record(closed, one), close(one))[1])
        monkeypatch.setattr(socket, "socketpair", recorded_pair)
        child = ChildBroker(prototype, "trade", tmp_path, None, python)
        if python is None:
            await child.open(60.0)
            assert child.pid is not None
            assert os.getsid(child.pid) == child.pid  # Ctrl-C is not for it
        else:
            with pytest.raises(BrokerUnavailable):
                await child.open(60.0)
        await child.close()

    asyncio.run(live())
    assert len(made) >= 2 and set(made) <= set(closed)
    assert len(ends) == 2 and all(one.fileno() == -1 for one in ends)
    assert (tmp_path / "ledger.closed").exists() == (python is None)  # it took its leave
