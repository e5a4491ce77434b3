"""The kill test: whatever dies and whenever, every order is at the broker exactly once.

Interactive Brokers in the service's process and Tiger in a child process, behind simulators on the
wire; four clients place orders with keys and repeat them until they have an answer. Meanwhile the
service is killed (the whole group, or the worker process alone), the child process is killed, and
the brokers' connections break before, during and after a placement. `make torture` runs 10,000
orders; `--seed` repeats the random choices (not the timing).
"""

from __future__ import annotations

import http.client
import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest

from simulators.exchange import ExchangeOrder, FaultKind
from simulators.fleet import Client, Member, Service, fleet

CLIENTS = 4
PATIENCE = 90.0
WINDOWS = "windows = { high = { limit = 100000, seconds = 1.0 } }"

FAULTS = (
    FaultKind.ACCEPT_THEN_CUT,
    FaultKind.ACCEPT_THEN_CUT,
    FaultKind.ACCEPT_THEN_HANG,
    FaultKind.CUT,
    FaultKind.LATE,
)


class Ledger:
    """What really happened at one broker: every order it ever took, under its price (each client
    order has a price of its own), however long ago."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.taken: defaultdict[Decimal, set[str]] = defaultdict(set)
        member.exchange.on_change.append(self.on_change)

    def on_change(self, order: ExchangeOrder) -> None:
        assert order.price is not None
        self.taken[order.price].add(order.order_id)

    def forget(self, order_id: str) -> None:
        """The broker's lists stay short in a long run; the client has its answer."""
        with self.member.exchange.lock:
            if order_id in self.member.exchange.orders:
                self.member.exchange.forget(order_id)


class Run:
    """What the clients have, and what has been done to the service."""

    def __init__(self, orders: int) -> None:
        self.lock = threading.Lock()
        self.orders = orders
        self.next = 0
        self.ids: dict[str, str] = {}  # key → the order id its client was told
        self.answers: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []

    def take(self) -> int | None:
        with self.lock:
            if self.next >= self.orders or self.problems:
                return None
            self.next += 1
            return self.next

    def answered(self) -> int:
        return len(self.ids)


def price_of(number: int) -> Decimal:
    return Decimal(1000 + number) / 100


def key_of(number: int) -> str:
    return f"torture-{number}"


def body_of(number: int) -> dict[str, Any]:
    return {
        "tradeType": "Securities",
        "ticker": "AAPL",
        "region": "US",
        "price": float(price_of(number)),
        "qty": number % 90 + 1,
        "orderType": "Limit",
        "timeInForce": "DAY",
        "lifecycle": "RTH",
        "direction": "BUY",
        "clientOrderId": key_of(number),
    }


def member_of(number: int, members: list[Member]) -> Member:
    return members[number % len(members)]


def trade(service: Service, members: list[Member], ledgers: dict[str, Ledger], run: Run) -> None:
    """One client: an order is repeated until its answer is an order id."""
    with (
        closing(Client(service, members[0].instance_id, members[0].token)) as first,
        closing(Client(service, members[1].instance_id, members[1].token)) as second,
    ):
        clients = [first, second]
        while (number := run.take()) is not None:
            end = time.monotonic() + PATIENCE
            while True:
                answer, pause = ask(clients[number % 2], number)
                with run.lock:
                    run.answers[answer if not answer.startswith("OK") else "OK"] += 1
                if answer.startswith("OK "):
                    break
                if answer in ("IDEMPOTENCY_CONFLICT", "INTERNAL") or time.monotonic() > end:
                    run.problems.append(f"{key_of(number)}: {answer}")
                    return
                time.sleep(pause)
            with run.lock:
                run.ids[key_of(number)] = answer.removeprefix("OK ")
            if number % 3:
                ledgers[member_of(number, members).name].forget(answer.removeprefix("OK "))


def ask(client: Client, number: int) -> tuple[str, float]:
    """ "OK <order id>" or what went wrong, and the seconds until it is worth another try."""
    try:
        status, found, _ = client(
            "POST", "order/place", body_of(number), HT_TIMEOUT=str(number % 3 + 1)
        )
    except (OSError, http.client.HTTPException):
        return "BROKEN", 0.05
    if status == 200:
        return f"OK {found['orderId']}", 0.0
    return str(found["error"]["code"]), 0.05


class Chaos:
    """Kills and cuts, each after a random number of further answers."""

    def __init__(self, service: Service, members: list[Member], run: Run, seed: int) -> None:
        self.service = service
        self.members = members
        self.run = run
        self.random = random.Random(seed)
        self.stop = threading.Event()
        self.every = min(40.0, run.orders / 24)  # answers between two blows, on average
        self.blows = [self.kill_worker, self.kill_child, self.kill_all, self.cut]

    def rage(self) -> None:
        try:
            turn = 0
            while not self.stop.is_set():
                goal = self.run.answered() + self.random.uniform(0.2, 1.8) * self.every
                trouble = self.run.answered() + self.random.uniform(0, self.every)
                while self.run.answered() < goal and not self.stop.wait(0.002):
                    if self.run.answered() > trouble:
                        self.fault()
                        trouble = goal
                if not self.stop.is_set():
                    self.stop.wait(self.random.uniform(0, 0.05))
                    self.blows[turn % len(self.blows)]()
                    turn += 1
        except BaseException as error:
            self.run.problems.append(f"the chaos itself failed: {error!r}")

    def fault(self) -> None:
        kind = self.random.choice(FAULTS)
        member = self.random.choice(self.members)
        member.exchange.fault("place", kind, seconds=self.random.uniform(0.1, 1.4))
        self.run.done[f"place: {kind.value}"] += 1

    def kill_all(self) -> None:
        self.service.stop(signal.SIGKILL)
        self.service.start()
        self.run.done["service killed"] += 1

    def kill_worker(self) -> None:
        pid = self.service.worker_pid()
        os.kill(pid, signal.SIGKILL)
        self.run.done["worker process killed"] += 1
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:  # gunicorn's master starts another
            try:
                if self.service.worker_pid() != pid:
                    return
            except (IndexError, OSError):
                pass
            time.sleep(0.01)
        raise AssertionError("no new worker process")

    def kill_child(self) -> None:
        try:
            children = psutil.Process(self.service.worker_pid()).children(recursive=True)
        except (IndexError, OSError, psutil.Error):
            return
        for child in children:
            try:
                child.send_signal(signal.SIGKILL)
            except psutil.Error:
                pass
        self.run.done["child processes killed"] += 1

    def cut(self) -> None:
        member = self.random.choice(self.members)
        member.exchange.fault("place", FaultKind.ACCEPT_THEN_CUT)
        member.simulator.cut()
        self.run.done["connections cut"] += 1


def configuration(service: Service, members: list[Member]) -> str:
    """The shipped settings' TOML, with limits that do not slow the test down."""
    brokers = {"ib": "QuickInteractiveBrokers", "tiger": "QuickTiger"}
    text = service.config.read_text()
    for member in members:
        text = text.replace(
            f'broker = "{member.broker}"\n',
            f'broker = "simulators.quick_brokers:{brokers[member.name]}"\n'
            + ('isolation = "process"\n' + WINDOWS + "\n" if member.name == "tiger" else ""),
        )
    return text


def unsettled(journal: Path) -> list[Any]:
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as database:
        return database.execute(
            "SELECT client_order_id, state FROM orders WHERE state IN ('sending', 'unknown')"
        ).fetchall()


def test_every_order_exactly_once(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = request.config.getoption("--orders")
    seed = request.config.getoption("--seed") or random.randrange(2**32)
    print(f"\ntorture: {orders} orders, seed {seed}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    run = Run(orders)
    began = time.monotonic()
    with fleet(tmp_path) as everybody:
        members = [everybody["ib"], everybody["tiger"]]
        everybody["tiger"].simulator.enforce_limits = False
        ledgers = {member.name: Ledger(member) for member in members}
        instances = [
            {
                "broker": member.broker,
                "id": member.instance_id,
                "tokens": [member.token],
                "hard_limit": 1.0,
                "args": dict(member.args),
            }
            for member in members
        ]
        service = Service(tmp_path, instances)
        service.config.write_text(configuration(service, members))
        with service:
            chaos = Chaos(service, members, run, seed)
            raging = threading.Thread(target=chaos.rage)
            clients = [
                threading.Thread(target=trade, args=(service, members, ledgers, run))
                for _ in range(CLIENTS)
            ]
            for thread in (raging, *clients):
                thread.start()
            for thread in clients:
                thread.join()
            chaos.stop.set()
            raging.join()
            lasted = time.monotonic() - began

            assert not run.problems, (run.problems, tail(service))
            journal = tmp_path / "data" / "journal.sqlite"
            end = time.monotonic() + PATIENCE
            while rows := unsettled(journal):
                assert time.monotonic() < end, rows
                time.sleep(0.05)
            check(service, members, ledgers, run)
    print(f"{orders} orders in {lasted:.1f} s; done: {dict(run.done)}; answers: {run.answers}")
    killed = sum(count for what, count in run.done.items() if "killed" in what)
    assert killed >= 8, run.done


def check(service: Service, members: list[Member], ledgers: dict[str, Ledger], run: Run) -> None:
    """Each order once, under the id its client was told, also by the client's own key."""
    assert len(run.ids) == run.orders
    for number in range(1, run.orders + 1):
        member = member_of(number, members)
        taken = ledgers[member.name].taken[price_of(number)]
        assert taken == {run.ids[key_of(number)]}, (key_of(number), taken)
    assert sum(len(ledger.taken) for ledger in ledgers.values()) == run.orders
    for member in members:
        marks = Counter(order.mark for order in member.exchange.orders.values())
        assert max(marks.values()) == 1 and "" not in marks
        with closing(Client(service, member.instance_id, member.token)) as client:
            for number in range(1, run.orders + 1, max(1, run.orders // 50)):
                if member_of(number, members) is member:
                    _, found, headers = client("POST", "order/place", body_of(number))
                    assert found["orderId"] == run.ids[key_of(number)], found
                    assert headers["Idempotent-Replayed"] == "true"


def tail(service: Service) -> str:
    """The end of the service's log, without the line for each request."""
    lines = service.log.read_text().splitlines()
    return "\n".join([line for line in lines if "milliseconds" not in line][-40:])
