"""The other processes of a measurement: the simulators, and an SDK used directly."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from bench.load import paced
from httptrading.brokers.local import LocalBroker
from httptrading.brokers.registry import broker_class
from httptrading.model import Contract, Lifecycle, OrderType, TimeInForce, TradeType
from simulators.fleet import ROOT, fleet, instances_of

CONTRACT = Contract(TradeType.Securities, "AAPL", "US")
SECONDS = 20.0


@contextmanager
def simulators() -> Iterator[list[Mapping[str, Any]]]:
    """The four simulators in a process of their own; yields the instances' configuration."""
    with _running("simulators") as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
        process.communicate(b"\n", timeout=30)


def directly(instance: Mapping[str, Any], what: str, **arguments: Any) -> Any:
    """Runs a measurement of this module with one broker's SDK in a process of its own."""
    with _running("direct") as process:
        question = json.dumps({"instance": instance, "what": what, "arguments": arguments})
        out, _ = process.communicate(question.encode() + b"\n", timeout=120)
        return json.loads(out.splitlines()[-1])


@contextmanager
def _running(what: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.peers", what],
        cwd=ROOT,
        env={**_environment(), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


def _serve_simulators() -> None:
    with tempfile.TemporaryDirectory() as folder, fleet(Path(folder)) as members:
        for member in members.values():
            member.exchange.quote("US", "AAPL", latest=Decimal("227.18"))
        members["tiger"].simulator.enforce_limits = False  # the SDK is also measured beyond them
        print(json.dumps(instances_of(members)), flush=True)
        sys.stdin.readline()


def _measure_directly() -> None:
    question = json.loads(sys.stdin.readline())
    instance = question["instance"]
    kind = broker_class(instance["broker"])
    args = dict(instance["args"])
    if "client_id" in args:
        args["client_id"] += 1
    with tempfile.TemporaryDirectory() as folder:
        runner = _Direct(kind(args, instance["id"], []), Path(folder))
        found = asyncio.run(runner.measure(question["what"], question["arguments"]))
    print("\n" + json.dumps(found), flush=True)
    import os

    os._exit(0)  # SDK threads would hold the process


class _Direct:
    """An adapter's SDK without the gateway: no queue, no journal, no HTTP."""

    def __init__(self, prototype: Any, folder: Path) -> None:
        self._sides = {
            name: LocalBroker(prototype, name, folder / name, None)
            for name in prototype.connections
        }
        self._side_of = {
            operation: self._sides[name]
            for name, operations in prototype.connections.items()
            for operation in operations
        }
        for name in self._sides:
            (folder / name).mkdir()

    async def measure(self, what: str, arguments: Mapping[str, Any]) -> Any:
        for side in self._sides.values():
            await side.open(SECONDS)
        await asyncio.sleep(1.0)  # what the SDKs do in the background after connecting
        return await getattr(self, what)(**arguments)

    async def call(self, operation: str, **arguments: Any) -> Any:
        return await self._side_of[operation].run(operation, arguments, SECONDS)

    async def place(self, number: int) -> Any:
        return await self.call(
            "place_order",
            contract=CONTRACT,
            order_type=OrderType.Limit,
            time_in_force=TimeInForce.DAY,
            lifecycle=Lifecycle.RTH,
            direction="BUY",
            qty=1,
            price=float(Decimal(10000 + number) / 100),
            client_order_id=f"direct-{time.time_ns()}",
            mark=f"d{time.time_ns()}",
        )

    async def latencies(self, per_second: float, seconds: float) -> dict[str, list[float]]:
        """Operation → seconds each call took, at a steady pace."""
        order_id = await self.place(0)
        calls: dict[str, Callable[[int], Any]] = {
            "ping": lambda number: self.call("ping"),
            "cash": lambda number: self.call("cash", currency="USD"),
            "positions": lambda number: self.call("positions"),
            "quote": lambda number: self.call("quote", contract=CONTRACT),
            "order": lambda number: self.call("order", order_id=order_id),
            "place_order": self.place,
        }
        found = {}
        for name, call in calls.items():
            took = []
            start = time.perf_counter()
            for number in range(int(per_second * seconds)):
                await asyncio.sleep(max(0.0, start + number / per_second - time.perf_counter()))
                began = time.perf_counter()
                await call(number)
                took.append(time.perf_counter() - began)
            found[name] = took
        return found

    async def burst(self, orders: int, gap: float) -> float:
        """Seconds for so many orders, each at least `gap` after the one before."""
        await self.place(0)
        await asyncio.sleep(max(gap, 0.1))
        began = last = time.perf_counter()
        for number in range(orders):
            if number:
                await asyncio.sleep(max(0.0, last + gap - time.perf_counter()))
            last = time.perf_counter()
            await self.place(number + 1)
        return time.perf_counter() - began


if __name__ == "__main__":
    {"simulators": _serve_simulators, "direct": _measure_directly}[sys.argv[1]]()

__all__ = ["directly", "paced", "simulators"]
