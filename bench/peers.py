"""The other processes of a measurement: the simulators, and an SDK used directly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from bench.load import timed
from bench.sdks import SDKS, Calls
from simulators.exchange import Exchange
from simulators.fleet import ROOT, fleet, instances_of

FILLED_SLOWLY, FILLS_PER_SECOND = 9_999, 50
"""An order of so many shares is a flood of pushes: until it is cancelled, or filled."""


@contextmanager
def simulators() -> Iterator[list[Mapping[str, Any]]]:
    """The four simulators in a process of their own; yields the instances' configuration."""
    with _running("simulators") as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.communicate(b"\n", timeout=30)


@contextmanager
def directly(instance: Mapping[str, Any]) -> Iterator[Callable[..., Any]]:
    """One broker's SDK in a process of its own; yields a function that runs one of TASKS there."""
    with _running("direct") as process:
        assert process.stdin is not None and process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def ask(*question: Any) -> Any:
            questions.write(json.dumps(question).encode() + b"\n")
            questions.flush()
            return json.loads(answers.readline())

        ask(instance)
        yield ask


@contextmanager
def _running(what: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.peers", what],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _serve_simulators() -> None:
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as members:
        for member in members.values():
            member.exchange.quote("US", "AAPL", latest=Decimal("227.18"))
        members["tiger"].simulator.enforce_limits = False  # the SDK is also measured beyond them
        exchanges = [member.exchange for member in members.values()]
        threading.Thread(target=_fill_slowly, args=(exchanges,), daemon=True).start()
        print(json.dumps(instances_of(members)), flush=True)
        sys.stdin.readline()


def _fill_slowly(exchanges: list[Exchange]) -> None:
    """Orders of FILLED_SLOWLY shares, one share at a time."""
    while True:
        time.sleep(1 / FILLS_PER_SECOND)
        for exchange in exchanges:
            for order in list(exchange.orders.values()):
                if order.qty == FILLED_SLOWLY and not order.status.is_final:
                    exchange.fill(order.order_id, 1, "100")


def _measure_directly() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the SDKs print is no answer

    def answer(found: Any) -> None:
        print(json.dumps(found), file=answers, flush=True)

    [instance] = json.loads(sys.stdin.readline())
    calls = SDKS[instance["broker"]](instance["args"])
    time.sleep(1.0)  # what the SDKs do in the background after connecting
    answer("connected")
    for line in sys.stdin:
        task, *arguments = json.loads(line)
        answer(TASKS[task](calls, *arguments))
    os._exit(0)  # SDK threads would hold the process


def one(calls: Calls, operation: str, number: int) -> float:
    """Seconds that one call takes."""
    return timed(calls[operation])(number)


def burst(calls: Calls, orders: int, gap: float) -> float:
    """Seconds for so many orders, each at least `gap` after the one before."""
    place = calls["place_order"]
    began = last = time.perf_counter()
    for number in range(orders):
        if number:
            time.sleep(max(0.0, last + gap - time.perf_counter()))
        last = time.perf_counter()
        place(number + 1)
    return time.perf_counter() - began


TASKS: Mapping[str, Callable[..., float]] = {"one": one, "burst": burst}

if __name__ == "__main__":
    {"simulators": _serve_simulators, "direct": _measure_directly}[sys.argv[1]]()
