"""The kill test: whatever dies and whenever, every order is at the broker exactly once.

Interactive Brokers in the service's process and Tiger in a child process, behind simulators on the
wire, and a paper account; four clients place orders with keys and repeat them until they have an
answer. Meanwhile the service is killed (the whole group, or the worker process alone), the child
processes are killed, and the brokers' connections break before, during and after a placement.
`make torture` runs 10,000 orders; `--seed` repeats the random choices (not the timing).
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
from contextlib import ExitStack, closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pytest

from simulators.exchange import ExchangeOrder, FaultKind
from simulators.fleet import Client, Member, Service, fleet

CLIENTS = 4
PATIENCE = 300.0
WINDOWS = "windows = { high = { limit = 100000, seconds = 1.0 } }"

FAULTS = (
    FaultKind.ACCEPT_THEN_CUT,
    FaultKind.ACCEPT_THEN_CUT,
    FaultKind.ACCEPT_THEN_HANG,
    FaultKind.CUT,
    FaultKind.LATE,
)


class Book:
    """What really happened at one broker: every order it ever took, under its price (each client
    order has a price of its own), however long ago."""

    def __init__(self, member: Member) -> None:
        self.name = member.name
        self.instance_id = member.instance_id
        self.token = member.token
        self.exchange = member.exchange
        self._taken: defaultdict[Decimal, set[str]] = defaultdict(set)
        member.exchange.on_change.append(self._on_change)

    def _on_change(self, order: ExchangeOrder) -> None:
        assert order.price is not None
        self._taken[order.price].add(order.order_id)

    def taken(self) -> dict[Decimal, set[str]]:
        return self._taken

    def forget(self, order_id: str) -> None:
        """The broker's lists stay short in a long run; the client has its answer."""
        with self.exchange.lock:
            if order_id in self.exchange.orders:
                self.exchange.forget(order_id)


class PaperBook:
    """The paper account's own, beside the service."""

    name = "paper"
    instance_id = "tortured-paper-account"
    token = "token-of-the-paper-account"

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir

    def taken(self) -> dict[Decimal, set[str]]:
        (path,) = self._data_dir.glob("instances/*/paper.sqlite")
        found: defaultdict[Decimal, set[str]] = defaultdict(set)
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            for price, number in database.execute("SELECT price, number FROM paper_order"):
                found[Decimal(price)].add(str(number))
        return found

    def forget(self, order_id: str) -> None:
        """It keeps everything."""


class Run:
    """What the clients have, and what has been done to the service."""

    def __init__(self, orders: int) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        self.orders = orders
        self.next = 0
        self.allowed = 0  # the clients are never so far ahead that there is nobody left to disturb
        self.ids: dict[str, str] = {}  # key → the order id its client was told
        self.answers: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []

    def take(self) -> int | None:
        with self.changed:
            while self.next >= self.allowed and not self.is_over:
                self.changed.wait(1.0)
            if self.is_over:
                return None
            self.next += 1
            return self.next

    @property
    def is_over(self) -> bool:
        return self.next >= self.orders or bool(self.problems)

    def allow(self, number: float) -> None:
        """So many orders may be taken by now."""
        with self.changed:
            self.allowed = max(self.allowed, int(number))
            self.changed.notify_all()

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


def trade(service: Service, books: list[Book | PaperBook], run: Run) -> None:
    """One client: an order is repeated until its answer is an order id."""
    with ExitStack() as stack:
        clients = [
            stack.enter_context(closing(Client(service, book.instance_id, book.token)))
            for book in books
        ]
        while (number := run.take()) is not None:
            end = time.monotonic() + PATIENCE
            while True:
                answer = ask(clients[number % len(books)], number)
                with run.lock:
                    run.answers[answer if not answer.startswith("OK") else "OK"] += 1
                if answer.startswith("OK "):
                    break
                if answer in ("IDEMPOTENCY_CONFLICT", "INTERNAL") or time.monotonic() > end:
                    run.problems.append(f"{key_of(number)}: {answer}")
                    return
                time.sleep(0.05)
            order_id = answer.removeprefix("OK ")
            with run.lock:
                run.ids[key_of(number)] = order_id
            if number % 4:
                books[number % len(books)].forget(order_id)


def ask(client: Client, number: int) -> str:
    """ "OK <order id>", or what went wrong."""
    try:
        status, found, _ = client(
            "POST", "order/place", body_of(number), HT_TIMEOUT=str(number % 3 + 1)
        )
    except (OSError, http.client.HTTPException):
        return "BROKEN"
    return f"OK {found['orderId']}" if status == 200 else str(found["error"]["code"])


class Chaos:
    """Kills and cuts, each after a random number of further answers."""

    def __init__(self, service: Service, members: list[Member], run: Run, seed: int) -> None:
        self.service = service
        self.members = members
        self.run = run
        self.random = random.Random(seed)
        self.stop = threading.Event()
        self.every = min(40.0, run.orders / 18)  # answers between two blows, on average
        kills = [self.kill_worker, self.kill_child, self.kill_all]
        self.blows = [*kills, *kills, self.cut]

    def rage(self) -> None:
        try:
            turn = 0
            while not self.stop.is_set():
                goal = self.run.answered() + self.random.uniform(0.2, 1.8) * self.every
                trouble = self.run.answered() + self.random.uniform(0, self.every)
                self.run.allow(goal + CLIENTS + 1)
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
    return text + (
        f'[[instance]]\nbroker = "Paper"\nid = "{PaperBook.instance_id}"\n'
        f'tokens = ["{PaperBook.token}"]\n[instance.args]\ncash = {{ USD = 1000000000 }}\n'
    )


def unsettled(journal: Path) -> list[Any]:
    with closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as database:
        return database.execute(
            "SELECT client_order_id, state FROM orders WHERE state IN ('sending', 'unknown')"
        ).fetchall()


@pytest.mark.long
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
        data_dir = tmp_path / "data"
        books: list[Book | PaperBook] = [*map(Book, members), PaperBook(data_dir)]
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
                threading.Thread(target=trade, args=(service, books, run)) for _ in range(CLIENTS)
            ]
            for thread in (raging, *clients):
                thread.start()
            for thread in clients:
                thread.join()
            chaos.stop.set()
            raging.join()
            lasted = time.monotonic() - began

            assert not run.problems, (run.problems, tail(service))
            end = time.monotonic() + PATIENCE
            while rows := unsettled(data_dir / "journal.sqlite"):
                assert time.monotonic() < end, rows
                time.sleep(0.05)
            check(service, books, run)
    print(f"{orders} orders in {lasted:.1f} s; done: {dict(run.done)}; answers: {run.answers}")
    killed = sum(count for what, count in run.done.items() if "killed" in what)
    assert killed >= 8, run.done


def check(service: Service, books: list[Book | PaperBook], run: Run) -> None:
    """Each order once, under the id its client was told, also by the client's own key."""
    assert len(run.ids) == run.orders
    for place, book in enumerate(books):
        mine = [number for number in range(1, run.orders + 1) if number % len(books) == place]
        wanted = {price_of(number): {run.ids[key_of(number)]} for number in mine}
        taken = dict(book.taken())
        assert taken == wanted, {
            price: (taken.get(price), wanted.get(price))
            for price in taken | wanted
            if taken.get(price) != wanted.get(price)
        }
        if isinstance(book, Book):
            marks = Counter(order.mark for order in book.exchange.orders.values())
            assert max(marks.values()) == 1 and "" not in marks
        with closing(Client(service, book.instance_id, book.token)) as client:
            for number in mine[:: max(1, len(mine) // 20)]:
                _, found, headers = client("POST", "order/place", body_of(number))
                assert found["orderId"] == run.ids[key_of(number)], found
                assert headers["Idempotent-Replayed"] == "true"


def tail(service: Service) -> str:
    """The end of the service's log, without the line for each request."""
    lines = service.log.read_text().splitlines()
    return "\n".join([line for line in lines if "milliseconds" not in line][-40:])
