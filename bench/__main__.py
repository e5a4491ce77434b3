"""`make bench`: measures everything that is promised, and writes `bench/RESULTS.md`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import psutil

from bench import journal
from bench.load import Connection, in_turn, p50, p99, paced, prepare, timed, together
from bench.peers import FILLED_SLOWLY, FILLS_PER_SECOND, directly, simulators
from httptrading.brokers.base import BaseBroker
from httptrading.brokers.registry import broker_class
from simulators.fleet import ROOT, Service, free_port

PER_SECOND = 20.0
MOST_PER_SECOND = {("LongBridge", "quote"): 4.0}
"""Where the SDK itself holds back what comes faster: LongBridge's lets 5 quotes through, and then
waits until a second is over."""

SECONDS = 3.0
UNLIMITED = 1_000_000
PAPER = {"broker": "Paper", "id": "benchPaper0000001", "tokens": ["token-of-the-paper-bench"]}

ROUTES = {
    "ping": "ping/state",
    "cash": "cash/state",
    "positions": "position/state",
    "quote": "market/quote?tradeType=Securities&region=US&ticker=AAPL",
    "order": "order/state?orderId={order_id}",
}

SPACING = {"InteractiveBrokers": 1 / 50}
"""Seconds between two orders where the broker's limit is a pace that the SDK keeps itself: TWS
takes 50 messages a second (interactivebrokers.github.io/tws-api/order_limitations.html)."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `met`: whether the promised bound was kept; None: there is none."""

    what: str
    figure: str
    compared: str = ""
    ratio: str = ""  # with the bound
    met: bool | None = None

    def __str__(self) -> str:
        verdict = {None: "", True: "✓", False: "✗"}[self.met]
        return f"| {self.what} | {self.figure} | {self.compared} | {self.ratio} | {verdict} |"


def request_of(instance: Mapping[str, Any], method: str, route: str, body: Any = None) -> bytes:
    return prepare(
        method,
        f"/httptrading/api/{instance['id']}/{route}",
        body,
        {"HT-TOKEN": instance["tokens"][0]},
    )


def order(number: int, key: str) -> dict[str, Any]:
    return {
        "tradeType": "Securities",
        "ticker": "AAPL",
        "region": "US",
        "price": (10000 + number) / 100,
        "qty": 1,
        "orderType": "Limit",
        "timeInForce": "DAY",
        "lifecycle": "RTH",
        "direction": "BUY",
        "clientOrderId": f"{key}-{number}",
    }


@contextmanager
def skeleton() -> Iterator[int]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.skeleton", str(port)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        while True:
            try:
                Connection(port).close()
                break
            except OSError:
                time.sleep(0.02)
        yield port
    finally:
        process.terminate()
        process.wait()


@contextmanager
def service(instances: list[Mapping[str, Any]], **options: Any) -> Iterator[Service]:
    with tempfile.TemporaryDirectory() as folder:
        running = Service(Path(folder), instances, **options)
        with running:
            yield running


def unlimited(instance: Mapping[str, Any]) -> dict[str, Any]:
    """Every request reaches the broker: no windows, nothing answered from memory."""
    declared = kind_of(instance).windows
    return {
        **instance,
        "ages": dict.fromkeys(ROUTES, 0),
        "windows": {
            name: {"limit": UNLIMITED, "seconds": window.seconds}
            for name, window in declared.items()
        },
    }


def kind_of(instance: Mapping[str, Any]) -> type[BaseBroker]:
    return cast(type[BaseBroker], broker_class(instance["broker"]))


def wait_connected(running: Service, instance: Mapping[str, Any]) -> None:
    path = f"/httptrading/api/{instance['id']}/ping/state"
    headers = {"HT-TOKEN": instance["tokens"][0], "Cache-Control": "no-cache"}
    end = time.monotonic() + 60
    while time.monotonic() < end:
        status, body, _ = running.ask("GET", path, headers=headers)
        if status == 200 and body["pong"]:
            return
        time.sleep(0.05)
    raise RuntimeError(f"{instance['broker']} did not connect")


# --- the sections --------------------------------------------------------------------------------
def latency(fleet: list[Mapping[str, Any]]) -> Iterator[Row]:
    """The gateway's share of each call at 20 requests a second: skeleton, SDK and gateway in turn,
    so that a machine that slows down meanwhile slows all three."""
    took = paced_commits()
    yield Row(
        "an order's two records, sqlite3 alone, 20/s", f"p50 {ms(p50(took))}, p99 {ms(p99(took))}"
    )
    with skeleton() as port:
        for instance in fleet:
            yield from shares(instance, port)


def shares(instance: Mapping[str, Any], skeleton_port: int) -> Iterator[Row]:
    process = kind_of(instance).isolation == "process"
    bound = 2.5 if process else 1.5
    with service([unlimited(instance)]) as running, directly(instance) as sdk:
        wait_connected(running, instance)
        connection, bare = Connection(running.port), Connection(skeleton_port)
        plain = prepare("GET", "/ping")
        for name, requests in calls_of(instance, connection).items():
            # In this order: what the broker pushes of the SDK's order is in the journal (some 20 ms
            # later) before ours begins.
            direct, own, ours = in_turn(
                [
                    lambda number, n=name: sdk("one", n, number),
                    timed(lambda number: bare.ask(plain)),
                    timed(lambda number, r=requests: connection.ask(next(r))),
                ],
                MOST_PER_SECOND.get((instance["broker"], name), PER_SECOND),
                SECONDS * 2,
            )
            half = (p50(ours) - p50(direct)) / p50(own)
            most = (p99(ours) - p99(direct)) / p99(own)
            yield Row(
                f"{instance['broker']} {name}" + (" (process)" if process else ""),
                f"p50 {ms(p50(ours))}, p99 {ms(p99(ours))}; "
                f"skeleton {ms(p50(own))}, {ms(p99(own))}",
                f"directly p50 {ms(p50(direct))}, p99 {ms(p99(direct))}",
                f"overhead / skeleton: p50 {half:.2f} (≤ {bound}), p99 {most:.2f} (≤ 2)",
                half <= bound and most <= 2,
            )
        connection.close()
        bare.close()


def calls_of(instance: Mapping[str, Any], connection: Connection) -> dict[str, Iterator[bytes]]:
    """Operation → its requests, without end."""
    status, found = connection.ask(request_of(instance, "POST", "order/place", order(0, "first")))
    assert status == 200, found
    order_id = json.loads(found)["orderId"]
    requests: dict[str, Iterator[bytes]] = {}
    for name, route in ROUTES.items():
        request = request_of(instance, "GET", route.format(order_id=order_id))
        assert connection.ask(request)[0] == 200, (instance["broker"], name)
        requests[name] = itertools.repeat(request)
    requests["place_order"] = (
        request_of(instance, "POST", "order/place", order(number, "paced"))
        for number in itertools.count()
    )
    return requests


def paced_commits() -> list[float]:
    """What the journal's two records of an order cost at least: one on disk before it is sent, and
    one that outlives the process before it is answered."""
    with tempfile.TemporaryDirectory(dir=ROOT / "bench") as folder:
        connection = sqlite3.connect(Path(folder) / "bare.sqlite", isolation_level=None)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY, state TEXT)")

        def record(number: int) -> None:
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("INSERT INTO orders VALUES (?, 'sending')", (number,))
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute("UPDATE orders SET state = 'placed' WHERE id = ?", (number,))

        took = paced(record, PER_SECOND, SECONDS)
        connection.close()
        return took


def bursts(fleet: list[Mapping[str, Any]]) -> Iterator[Row]:
    """Ten orders at once, beside the same ten sent through the SDK at the documented spacing."""
    for instance in fleet:
        kind = kind_of(instance)
        gaps = [kind.windows[name].gap for name in kind.costs.get("place_order", ())]
        gap = max([*gaps, SPACING.get(instance["broker"], 0.0)])
        with directly(instance) as sdk:
            direct = sdk("burst", 10, gap)
        with service([instance]) as running:
            wait_connected(running, instance)
            burst(running, instance, 1)  # as directly: the first order of a process is slower
            time.sleep(1.0)
            seconds = burst(running, instance, 10)
        yield Row(
            f"{instance['broker']}: 10 orders at once",
            f"{seconds:.3f} s",
            f"directly {direct:.3f} s",
            f"{seconds / direct:.2f} (≤ 1.5), and ≤ 0.5 s",
            seconds <= min(0.5, direct * 1.5),
        )


def burst(running: Service, instance: Mapping[str, Any], orders: int) -> float:
    connections = [Connection(running.port) for _ in range(orders)]
    requests = [
        request_of(instance, "POST", "order/place", order(number, f"burst-of-{orders}"))
        for number in range(orders)
    ]
    barrier = threading.Barrier(orders + 1)
    answers: list[tuple[int, bytes]] = []

    def send(number: int) -> None:
        barrier.wait()
        answers.append(connections[number].ask(requests[number]))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(orders)]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    for connection in connections:
        connection.close()
    assert all(status == 200 for status, _ in answers), answers
    return seconds


def polling(fleet: list[Mapping[str, Any]]) -> Iterator[Row]:
    """16 clients that poll cash, positions, an order and a quote as fast as they can."""
    with skeleton() as port:
        bare = together(
            16, SECONDS * 2, lambda number: asker(port, itertools.repeat(prepare("GET", "/ping")))
        )
    yield Row("skeleton, 16 clients", f"{bare.rate:.0f}/s")
    for instance in fleet:
        with service([instance]) as running:
            wait_connected(running, instance)
            connection = Connection(running.port)
            status, found = connection.ask(
                request_of(instance, "POST", "order/place", order(0, "polled"))
            )
            connection.close()
            assert status == 200, found
            order_id = json.loads(found)["orderId"]
            requests = [
                request_of(instance, "GET", ROUTES[name].format(order_id=order_id))
                for name in ("cash", "positions", "order", "quote")
            ]
            tally = together(
                16,
                SECONDS * 2,
                lambda number, r=requests, s=running: asker(s.port, itertools.cycle(r)),
            )
        yield Row(
            f"{instance['broker']}: 16 clients polling",
            f"{tally.rate:.0f} good answers/s, {tally.bad} others",
            f"skeleton {bare.rate:.0f}/s",
            f"{tally.rate / bare.rate:.2f} (≥ 0.6)",
            tally.rate >= bare.rate * 0.6 and not tally.bad,
        )


def asker(port: int, requests: Iterator[bytes]) -> Callable[[], bool]:
    connection = Connection(port)
    return lambda: connection.ask(next(requests))[0] == 200


def throughput() -> Iterator[Row]:
    """Paper's ping beside the skeleton, 8 clients, in alternation."""
    ours, theirs = [], []
    with skeleton() as port, service([PAPER]) as running:
        wait_connected(running, PAPER)
        bare, ping = prepare("GET", "/ping"), request_of(PAPER, "GET", "ping/state")
        for _ in range(3):
            theirs.append(together(8, 3, lambda number: asker(port, itertools.repeat(bare))).rate)
            ours.append(
                together(8, 3, lambda number: asker(running.port, itertools.repeat(ping))).rate
            )
    mine, bare_rate = statistics.median(ours), statistics.median(theirs)
    yield Row(
        "Paper: ping, 8 clients",
        f"{mine:.0f}/s",
        f"skeleton {bare_rate:.0f}/s",
        f"{mine / bare_rate:.2f} (≥ 0.7)",
        mine >= bare_rate * 0.7,
    )


def neighbours(fleet: list[Mapping[str, Any]]) -> Iterator[Row]:
    """What four brokers in trouble cost a fifth: Paper's cash, 100 times a second."""
    for trouble, server in (("silent", silence), ("down", nothing), ("cutting", cutting)):
        with server() as port:
            others = [deaf(instance, port) for instance in fleet]
            with service([PAPER, *others]) as running:
                wait_connected(running, PAPER)
                time.sleep(8.0)  # until the SDKs are imported, which keeps the processors busy
                waiting = [Connection(running.port) for _ in range(len(others) * 4)]
                for each, instance in zip(waiting, itertools.cycle(others)):
                    each.send(request_of(instance, "GET", "cash/state"))
                during = papers_cash(running)
                for each in waiting:
                    each.close()
        yield beside(f"{trouble}, with 16 requests waiting for them", during)
    with all_connected(fleet) as running:
        with flood(running, fleet):
            # At first their windows let a burst through, which the SDKs work off in our process.
            begins, goes_on = papers_cash(running, SECONDS), papers_cash(running)
    flooded = "flooded: 16 clients ask for 200 quotes a second"
    yield beside(f"{flooded}, the first {SECONDS:g} s", begins)
    yield beside(f"{flooded}, far beyond their windows", goes_on)
    with all_connected(fleet) as running:
        with pushes(running, fleet):
            told = papers_cash(running)
    yield beside(f"flooding us: each tells {FILLS_PER_SECOND} fills a second", told)


@contextmanager
def all_connected(fleet: list[Mapping[str, Any]]) -> Iterator[Service]:
    with service([PAPER, *fleet]) as running:
        for instance in fleet:
            wait_connected(running, instance)
        time.sleep(8.0)
        yield running


def beside(trouble: str, during: list[float]) -> Row:
    with service([PAPER]) as running:
        alone = papers_cash(running)
    change = p99(during) - p99(alone)
    return Row(
        f"Paper beside four brokers that are {trouble}",
        f"p99 {ms(p99(during))}",
        f"alone p99 {ms(p99(alone))}",
        f"{change * 1000:+.2f} ms (< 5 ms)",
        change < 0.005,
    )


@contextmanager
def flood(running: Service, fleet: list[Mapping[str, Any]]) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.flood", str(running.port), *map(json.dumps, fleet)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()  # every client is connected
        yield
    finally:
        process.kill()
        process.communicate()


@contextmanager
def pushes(running: Service, fleet: list[Mapping[str, Any]]) -> Iterator[None]:
    """Each broker has an order that it fills one share at a time, and tells each fill."""
    connection = Connection(running.port)
    filled = []
    for instance in fleet:
        slow = order(0, "filled-slowly") | {"qty": FILLED_SLOWLY}
        status, found = connection.ask(request_of(instance, "POST", "order/place", slow))
        assert status == 200, found
        filled.append((instance, json.loads(found)["orderId"]))
    yield
    for instance, order_id in filled:
        status, found = connection.ask(
            request_of(instance, "GET", f"order/state?orderId={order_id}")
        )
        assert status == 200 and json.loads(found)["order"]["filledQty"] > FILLS_PER_SECOND, found
        cancel = request_of(instance, "POST", "order/cancel", {"orderId": order_id})
        assert connection.ask(cancel)[0] == 200
    connection.close()


def papers_cash(running: Service, seconds: float = SECONDS * 3) -> list[float]:
    wait_connected(running, PAPER)
    connection = Connection(running.port)
    request = request_of(PAPER, "GET", "cash/state")
    took = paced(lambda number: connection.ask(request), 100, seconds)
    connection.close()
    return took


@contextmanager
def silence() -> Iterator[int]:
    """A port that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield server.getsockname()[1]


@contextmanager
def nothing() -> Iterator[int]:
    """A port where nothing listens."""
    yield free_port()


@contextmanager
def cutting() -> Iterator[int]:
    """A port that hangs up on everybody at once: reconnects without end."""

    def cut(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                server.accept()[0].close()

    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        thread = threading.Thread(target=cut, args=(server,))
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def deaf(instance: Mapping[str, Any], port: int) -> dict[str, Any]:
    """The same instance, with every address that of a server that never answers."""
    args = dict(instance["args"])
    for name, value in args.items():
        if name == "port" or name == "push_port":
            args[name] = port
        elif name.endswith("_url"):
            args[name] = f"{value.partition('://')[0]}://127.0.0.1:{port}"
    return {**instance, "args": args}


def journal_size() -> Iterator[Row]:
    """The journal with 1,000,000 orders beside one with 1,000."""
    for operation, few, many in journal.measure():
        yield Row(
            f"journal, 1,000,000 orders: {operation}",
            ms(many),
            f"1,000 orders {ms(few)}",
            f"{many / few:.2f} (about 1)",
        )


def costs(fleet: list[Mapping[str, Any]]) -> Iterator[Row]:
    """Start-up and memory."""
    with tempfile.TemporaryDirectory() as folder:
        core = Service(Path(folder), [PAPER])
        seconds = core.start()
        memory = resident(core)
        core.stop()
    yield Row("core with Paper", f"first answer {seconds:.2f} s", "", "≤ 1.5 s", seconds <= 1.5)
    yield Row("core with Paper", f"{memory:.0f} MiB resident", "", "≤ 60 MiB", memory <= 60)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        down = Service(Path(folder), [deaf(instance, port) for instance in fleet])
        seconds = down.start()
        down.stop()
    yield Row(
        "four brokers, all down", f"listens after {seconds:.2f} s", "", "≤ 1.5 s", seconds <= 1.5
    )
    for instance in fleet:
        with service([instance]) as running:
            wait_connected(running, instance)
            yield Row(f"with {instance['broker']}", f"{resident(running):.0f} MiB resident")


def resident(running: Service) -> float:
    """The process that serves, and its children."""
    worker = psutil.Process(running.worker_pid())
    processes = [worker, *worker.children(recursive=True)]
    return sum(each.memory_info().rss for each in processes) / 2**20


def ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"


def main() -> None:
    wanted = sys.argv[1:]
    header = (
        f"Made by `make bench` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC: {os.cpu_count()} CPUs, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f} at the start"
    )
    before = psutil.cpu_times()
    lines = [
        "| what | figure | compared with | ratio (bound) | met |",
        "| --- | --- | --- | --- | --- |",
    ]
    with simulators() as fleet:
        sections: dict[str, Callable[[], Iterator[Row]]] = {
            "costs": lambda: costs(fleet),
            "throughput": throughput,
            "latency": lambda: latency(fleet),
            "bursts": lambda: bursts(fleet),
            "polling": lambda: polling(fleet),
            "neighbours": lambda: neighbours(fleet),
            "journal": journal_size,
        }
        for name, section in sections.items():
            if wanted and name not in wanted:
                continue
            for row in section():
                print(row, flush=True)
                lines.append(str(row))
    header += (
        f", {stolen(before, psutil.cpu_times()):.0%} of the processors' time taken by the host's "
        "other guests. The brokers are those of `tests/simulators`, in a process of their own on "
        "the same machine."
    )
    print(header)
    if not wanted:
        text = "\n".join(["# Measurements", "", header, "", *lines])
        (ROOT / "bench" / "RESULTS.md").write_text(text + "\n")


def stolen(before: Any, after: Any) -> float:
    """The share of the time between two looks that a virtual machine's host gave to others, of
    what this machine wanted: figures taken while it is more than little say nothing."""
    steal = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    used = sum(after) - sum(before) - (after.idle - before.idle)
    return float(steal / used) if used > 0 else 0.0


if __name__ == "__main__":
    main()
