"""A custom broker that does what a test tells it, and remembers what reached it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flask import Flask

from acceptance.kit import Trader, wait_for
from httptrading import InstanceSettings, create_app
from httptrading.brokers.base import BaseBroker
from httptrading.brokers.registry import broker_register
from httptrading.errors import OrderNotFound
from httptrading.model import (
    Cash,
    Contract,
    Fill,
    MarketStatus,
    Order,
    OrderReport,
    Position,
    Quote,
    TradeType,
    UnifiedStatus,
    Unit,
)

AAPL = Contract(TradeType.Securities, "AAPL", "US")
QUOTE_TIME = datetime(2025, 5, 28, 5, 25, 18, tzinfo=UTC)
LIMIT_ORDER: dict[str, Any] = {
    "tradeType": "Securities",
    "ticker": "AAPL",
    "region": "US",
    "price": 200.01,
    "qty": 12,
    "orderType": "Limit",
    "timeInForce": "DAY",
    "lifecycle": "RTH",
    "direction": "BUY",
}


@dataclass(frozen=True)
class Received:
    """One call as it reached the broker."""

    operation: str
    arguments: dict[str, Any]
    thread: int
    time: float  # monotonic


class Script:
    """What the broker's operations do. `do["cash"] = function` replaces one; `function` gets the
    operation's arguments by name."""

    def __init__(self) -> None:
        self.do: dict[str, Callable[..., Any]] = {}
        self.received: list[Received] = []
        self.orders: list[OrderReport] = []
        self.brokers: list[ScriptedBroker] = []  # the connected copies, newest last
        self.held = threading.Event()  # set while nothing is held
        self.held.set()

    def calls(self, operation: str) -> list[Received]:
        return [one for one in list(self.received) if one.operation == operation]

    def arrived(self, operation: str, count: int = 1) -> None:
        """Waits until so many calls of the operation have reached the broker."""
        wait_for(
            lambda: len(self.calls(operation)) >= count or None, f"{count} calls of {operation}"
        )

    @contextmanager
    def hold(self, *operations: str) -> Iterator[None]:
        """Inside, these operations hang, as an SDK without a timeout does; then they go on."""
        self.held.clear()
        before = {name: self.do.get(name) for name in operations}

        def hanging(name: str) -> Callable[..., Any]:
            def run(**arguments: Any) -> Any:
                self.held.wait(300)
                old = before[name]
                return old(**arguments) if old else self.usual(name, arguments)

            return run

        for name in operations:
            self.do[name] = hanging(name)
        try:
            yield
        finally:
            self.held.set()
            for name, old in before.items():
                if old is None:
                    del self.do[name]
                else:
                    self.do[name] = old

    def run(self, operation: str, arguments: dict[str, Any]) -> Any:
        self.received.append(
            Received(operation, arguments, threading.get_ident(), time.monotonic())
        )
        if operation in self.do:
            return self.do[operation](**arguments)
        return self.usual(operation, arguments)

    def usual(self, operation: str, arguments: dict[str, Any]) -> Any:
        match operation:
            case "ping":
                return True
            case "quote":
                return Quote(
                    arguments["contract"], "USD", True, 11.53, 11.49, 11.5, 11.55, 11.44, QUOTE_TIME
                )
            case "market_status":
                states = {
                    region: MarketStatus(region, "AFTERNOON", UnifiedStatus.RTH)
                    for region in ("US", "HK")
                }
                return {TradeType.Securities: states}
            case "cash":
                return Cash("USD", 30877.499)
            case "positions":
                return [Position("scripted", "剧本证券", AAPL, Unit.Share, "USD", 2400)]
            case "place_order":
                order = Order(str(69788888 + len(self.orders)), "USD", arguments["qty"])
                self.orders.append(
                    OrderReport(
                        order,
                        mark=arguments["mark"],
                        contract=arguments["contract"],
                        time=datetime.now(UTC),
                    )
                )
                return order.order_id
            case "order":
                return self._find(arguments["order_id"])
            case "recent_orders":
                return list(self.orders)
            case "fills":
                self._find(arguments["order_id"])
                return []
            case _:
                return None

    def _find(self, order_id: str) -> OrderReport:
        for report in self.orders:
            if report.order.order_id == order_id:
                return report
        raise OrderNotFound(f"No order has the id {order_id}.")


@broker_register("scripted", "剧本证券")
class ScriptedBroker(BaseBroker):
    """Plain `def` throughout: a hanging operation holds the worker's thread."""

    listing_delay = 0.1

    @property
    def script(self) -> Script:
        found: Script = self.broker_args["script"]
        return found

    def account_key(self) -> str:
        return f"scripted:{self.instance_id}:{id(self.script)}"

    def connect(self) -> None:
        self.script.run("connect", {})
        self.script.brokers.append(self)

    def close(self) -> None:
        self.script.run("close", {})

    def place_order(self, **arguments: Any) -> str:  # type: ignore[override]
        found: str = self.script.run("place_order", arguments)
        return found

    def cancel_order(self, order_id: str) -> None:  # type: ignore[override]
        self.script.run("cancel_order", {"order_id": order_id})

    def order(self, order_id: str) -> OrderReport:  # type: ignore[override]
        found: OrderReport = self.script.run("order", {"order_id": order_id})
        return found

    def positions(self) -> list[Position]:  # type: ignore[override]
        found: list[Position] = self.script.run("positions", {})
        return found

    def cash(self) -> Cash:  # type: ignore[override]
        found: Cash = self.script.run("cash", {})
        return found

    def ping(self) -> bool:  # type: ignore[override]
        found: bool = self.script.run("ping", {})
        return found

    def quote(self, contract: Contract) -> Quote:  # type: ignore[override]
        found: Quote = self.script.run("quote", {"contract": contract})
        return found

    def market_status(self) -> Any:
        return self.script.run("market_status", {})

    def recent_orders(self) -> list[OrderReport]:  # type: ignore[override]
        found: list[OrderReport] = self.script.run("recent_orders", {})
        return found

    def fills(self, order_id: str) -> list[Fill]:  # type: ignore[override]
        found: list[Fill] = self.script.run("fills", {"order_id": order_id})
        return found


class Stage:
    """A running app with one scripted instance or several, and a client for each."""

    def __init__(self, app: Flask, scripts: list[Script], brokers: list[ScriptedBroker]) -> None:
        self.app = app
        self.scripts = scripts
        self.brokers = brokers
        self.gateway = app.extensions["httptrading"]

    @property
    def script(self) -> Script:
        return self.scripts[0]

    def trader(self, number: int = 0) -> Trader:
        """A new client; each thread takes its own."""
        broker = self.brokers[number]
        return Trader(self.app, broker.instance_id, broker.tokens[0])

    def ready(self) -> None:
        for number in range(len(self.brokers)):
            trader = self.trader(number)
            wait_for(lambda trader=trader: trader.ping().body.get("pong"), "the broker to connect")
            # The gateway's own look at what is open; tests count calls and queues after it.
            self.scripts[number].arrived("recent_orders")


@contextmanager
def stage(
    data_dir: Path,
    *,
    count: int = 1,
    kind: type[ScriptedBroker] = ScriptedBroker,
    options: dict[str, Any] | None = None,
    before: Callable[[Script], object] = lambda script: None,
    **settings: Any,
) -> Iterator[Stage]:
    """`settings` are those of `InstanceSettings`, `options` those of `create_app`; `before` may
    change the first instance's script before anything starts."""
    scripts = [Script() for _ in range(count)]
    before(scripts[0])
    brokers = [
        kind({"script": script}, f"ScriptedBroker{number:04}", [f"scriptedToken{number:06}"])
        for number, script in enumerate(scripts)
    ]
    # What must succeed has room on a machine that stands still for seconds; a test of a deadline
    # gives its own. The limit for stuck calls is short, since a hanging one is waited for.
    settings = {"deadline": 30.0, "connect_timeout": 60.0, "hard_limit": 1.0} | settings
    app = create_app(
        brokers=[InstanceSettings(broker, **settings) for broker in brokers],
        data_dir=data_dir,
        **(options or {}),
    )
    running = Stage(app, scripts, brokers)
    running.gateway.start()
    try:
        yield running
    finally:
        for script in scripts:
            script.held.set()
        running.gateway.close()
