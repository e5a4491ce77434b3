"""The kit's two actors: a `Trader` who uses the HTTP API, and the `Subject`, a broker whose other
side is in the test's hand."""

from __future__ import annotations

import inspect
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import simplejson
from flask import Flask

from httptrading.brokers.base import BaseBroker, Combination, Window, combine
from httptrading.brokers.settings import InstanceSettings
from httptrading.model import CURRENCIES, Lifecycle, OrderType, TimeInForce
from simulators.exchange import (
    Exchange,
    ExchangeOrder,
    ExchangePosition,
    FaultKind,
)

INSTANCE_ID = "AcceptanceKit0001"
TOKEN = "acceptanceToken00001"
PATIENCE = 60.0
"""Seconds after which a condition that should come true counts as failed; on a machine that stands
still for seconds too."""

EVERY_COMBINATION = combine(("US", "HK", "CN"), OrderType, TimeInForce, Lifecycle)
TICKERS = {"US": "AAPL", "HK": "00700", "CN": "000001"}
QTY = {"US": 12, "HK": 200, "CN": 200}
FAR_PRICE = Decimal("12.34")  # far below the market where prices are lively, so that a buy rests

_Value = TypeVar("_Value")


def wait_for(look: Callable[[], _Value | None], what: str, patience: float = PATIENCE) -> _Value:
    """Looks again and again until something true is seen; fails with the last thing seen."""
    end = time.monotonic() + patience
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > end:
            raise AssertionError(f"waited {patience:g} s for {what}, last seen: {seen!r}")
        time.sleep(0.02)


def comes_true(look: Callable[[], object], patience: float = 10.0) -> bool:
    """Whether something is seen that is on its way now, if it ever comes."""
    end = time.monotonic() + patience
    while not look():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def in_time(ask: Callable[[float], Answer], met: Callable[[Answer], object]) -> Answer:
    """The answer to a request whose time limit is to pass at a certain point.

    Asks with 1 s; with more as long as the machine was too slow to get there within it, which `met`
    tells from what has happened (the broker was reached, say).
    """
    for seconds in (1.0, 3.0, 9.0):
        answer = ask(seconds)
        if met(answer):
            return answer
    return ask(27.0)


def _plain_decimal(text: str) -> Decimal:
    assert "e" not in text.lower(), f"a number with an exponent in the answer: {text}"
    return Decimal(text)


def _no_constant(text: str) -> Any:
    raise AssertionError(f"{text} in the answer is not JSON")


class Answer:
    """One HTTP answer; its JSON is read with exact numbers and in its own order."""

    def __init__(self, status: int, headers: Mapping[str, str], text: str, seconds: float) -> None:
        self.status = status
        self.headers = headers
        self.text = text
        self.seconds = seconds

    def __repr__(self) -> str:
        return f"<{self.status} in {self.seconds:.2f} s: {self.text[:600]}>"

    def __getitem__(self, name: str) -> Any:
        return self.body[name]

    @property
    def body(self) -> dict[str, Any]:
        found = json.loads(self.text, parse_float=_plain_decimal, parse_constant=_no_constant)
        assert isinstance(found, dict), self
        return found

    @property
    def error(self) -> dict[str, Any]:
        found = self.body["error"]
        assert isinstance(found, dict), self
        return found

    @property
    def code(self) -> str:
        """`error.code`, or "" for a success or an answer without the envelope."""
        try:
            return str((self.body.get("error") or {}).get("code", ""))
        except ValueError:
            return ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.body["ex"] is None

    @property
    def replayed(self) -> bool:
        return self.headers.get("Idempotent-Replayed") == "true"


class Trader:
    """A client of one instance; reads never accept an answer from memory."""

    def __init__(self, app: Flask, instance_id: str = INSTANCE_ID, token: str = TOKEN) -> None:
        self.client = app.test_client()
        self.instance_id = instance_id
        self.token = token

    def request(
        self,
        method: str,
        route: str,
        *,
        query: Mapping[str, Any] | None = None,
        text: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        sent = {"HT-TOKEN": self.token, **(headers or {})}
        if method == "GET":
            sent.setdefault("Cache-Control", "no-cache")
        if text is not None:
            sent.setdefault("Content-Type", "application/json")
        if timeout is not None:
            sent["HT-TIMEOUT"] = f"{timeout:g}"
        began = time.monotonic()
        response = self.client.open(
            f"/httptrading/api/{self.instance_id}/{route}",
            method=method,
            query_string={k: v for k, v in (query or {}).items() if v is not None},
            data=text,
            headers=sent,
        )
        seconds = time.monotonic() - began
        return Answer(
            response.status_code,
            dict(response.headers),
            response.get_data(as_text=True),
            seconds,
        )

    def get(self, route: str, timeout: float | None = None, **query: Any) -> Answer:
        return self.request("GET", route, query=query, timeout=timeout)

    def post(
        self,
        route: str,
        body: Mapping[str, Any],
        *,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        text = simplejson.dumps(body, use_decimal=True)
        return self.request("POST", route, text=text, headers=headers, timeout=timeout)

    def ping(self, timeout: float | None = None) -> Answer:
        return self.get("ping/state", timeout)

    def quote(
        self, region: str, ticker: str, trade_type: str = "Securities", timeout: float | None = None
    ) -> Answer:
        return self.get("market/quote", timeout, tradeType=trade_type, region=region, ticker=ticker)

    def market(self, timeout: float | None = None) -> Answer:
        return self.get("market/state", timeout)

    def cash(self, currency: str | None = None, timeout: float | None = None) -> Answer:
        return self.get("cash/state", timeout, currency=currency)

    def positions(self, timeout: float | None = None, **query: Any) -> Answer:
        return self.get("position/state", timeout, **query)

    def place(
        self,
        order: Mapping[str, Any],
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Answer:
        body = dict(order)
        if key is not None:
            body["clientOrderId"] = key
        return self.post("order/place", body, headers=headers, timeout=timeout)

    def placed(self, order: Mapping[str, Any], key: str | None = None) -> str:
        """Places an order that must succeed; its id."""
        answer = self.place(order, key=key)
        assert answer.ok, answer
        assert isinstance(answer["orderId"], str) and answer["orderId"], answer
        return str(answer["orderId"])

    def cancel(
        self, order_id: str | None = None, *, key: str | None = None, timeout: float | None = None
    ) -> Answer:
        body = {"orderId": order_id} if order_id is not None else {"clientOrderId": key}
        return self.post("order/cancel", body, timeout=timeout)

    def state(
        self, order_id: str | None = None, *, key: str | None = None, timeout: float | None = None
    ) -> Answer:
        return self.get("order/state", timeout, orderId=order_id, clientOrderId=key)

    def order(self, order_id: str | None = None, *, key: str | None = None) -> dict[str, Any]:
        """The order node of an order that must be known."""
        answer = self.state(order_id, key=key)
        assert answer.ok, answer
        node = answer["order"]
        assert isinstance(node, dict)
        return node

    def wait_order(
        self,
        order_id: str | None = None,
        *,
        key: str | None = None,
        what: str = "the order's state",
        **fields: Any,
    ) -> dict[str, Any]:
        """Asks until the order's node has these values; the node."""

        def look() -> dict[str, Any] | None:
            node = self.order(order_id, key=key)
            return node if all(node[name] == value for name, value in fields.items()) else None

        try:
            return wait_for(look, f"{what}: {fields}")
        except AssertionError as error:
            raise AssertionError(f"{error}; {self.state(order_id, key=key)!r}") from None

    def orders(self, timeout: float | None = None, **query: Any) -> Answer:
        return self.get("order/list", timeout, **query)

    def fills(self, order_id: str, timeout: float | None = None) -> Answer:
        return self.get("order/fills", timeout, orderId=order_id)


class Server(Protocol):
    """A simulator in the network: stopping closes its sockets, starting reuses its port."""

    def start(self) -> object: ...

    def stop(self) -> object: ...


class Subject:
    """A broker in a running app, and the script of its other side.

    By default the other side is an `Exchange` behind a `Server`; a broker without one overrides
    the hooks. Use it as a context manager from a fixture of class scope: one app, one connection
    for all cases. The broker object is given its account's limits loosened (limits have tests of
    their own) and a short listing delay (simulators list at once).
    """

    def __init__(
        self,
        broker: BaseBroker,
        data_dir: Path,
        exchange: Exchange | None = None,
        server: Server | None = None,
        *,
        listing_delay: float = 0.2,
        **settings: Any,
    ) -> None:
        """`settings` are further `InstanceSettings`, e.g. `isolation="process"`."""
        broker.instance_id = broker.instance_id or INSTANCE_ID
        broker.tokens = broker.tokens or [TOKEN]
        # On the object, not the class: the copies in the workers carry it along.
        vars(broker)["listing_delay"] = listing_delay
        vars(broker)["booked_within"] = 0.0
        self.settings = InstanceSettings(
            broker,
            windows={name: Window(10_000, 1.0) for name in broker.windows},
            # What must succeed has room on a machine that stands still for seconds; what is to hang
            # is given a deadline by its case, and is replaced soon after.
            **({"deadline": 30.0, "connect_timeout": 60.0, "hard_limit": 1.0} | settings),
        )
        self.broker = broker
        self.data_dir = data_dir
        self.exchange = exchange or Exchange()
        self.server = server
        self.app: Flask | None = None
        self._numbers = itertools.count(1)
        self._has_traded = False

    def __enter__(self) -> Self:
        from httptrading import create_app

        self.app = create_app(brokers=self.instances(), data_dir=self.data_dir)
        return self

    def __exit__(self, *_: object) -> None:
        self.exchange.clear_faults()
        assert self.app is not None
        self.app.extensions["httptrading"].close()

    def instances(self) -> list[InstanceSettings]:
        """What the app serves; the subject is the first."""
        return [self.settings]

    # --- the client's side ----------------------------------------------------------------
    def trader(self) -> Trader:
        """Another client of the instance; each thread takes its own."""
        assert self.app is not None
        return Trader(self.app, self.broker.instance_id, self.broker.tokens[0])

    def ready(self) -> None:
        """Waits until the broker serves a read and all of its connections are there (that of
        pushes, say), and once, at first, until it takes an order: what it does before a first order
        (unlocking, say) must not meet a case's fault."""
        trader = self.trader()
        wait_for(lambda: trader.cash().ok, "the broker to serve cash/state")
        wait_for(lambda: self.is_connected(trader), "every connection of the broker")
        if not self._has_traded:
            trader.cancel(trader.placed(self.limit()))
            self._has_traded = True

    @staticmethod
    def is_connected(trader: Trader) -> bool:
        connections = trader.get("instance/state")["state"]["connections"]
        return all(connection["connected"] for connection in connections)

    def calm(self) -> None:
        """Takes back what a case left behind."""
        self.exchange.clear_faults()
        self.exchange.fill_market_orders = True
        self.exchange.pushes = True

    def key(self) -> str:
        """A client order id that was not used before."""
        return f"case-{next(self._numbers)}"

    # --- what the broker can do ------------------------------------------------------------
    @property
    def combinations(self) -> frozenset[Combination]:
        known = self.broker.combinations
        return EVERY_COMBINATION if known is None else known

    def offers(self, operation: str) -> bool:
        """Whether the broker has the operation at all; else it must answer UNSUPPORTED."""
        return getattr(type(self.broker), operation) is not getattr(BaseBroker, operation)

    def quotes(self, region: str) -> bool:
        known = self.broker.quote_regions
        return self.offers("quote") and (known is None or region in known)

    @property
    def many_currencies(self) -> bool:
        return "currency" in inspect.signature(self.broker.cash).parameters

    def order(self, combination: Combination, **changes: Any) -> dict[str, Any]:
        """A body for order/place; a limit order is a buy far below the market."""
        limit = combination.order_type is OrderType.Limit
        body: dict[str, Any] = {
            "tradeType": "Securities",
            "ticker": TICKERS[combination.region],
            "region": combination.region,
            **({"price": FAR_PRICE} if limit else {}),
            "qty": QTY[combination.region],
            "orderType": combination.order_type.name,
            "timeInForce": combination.time_in_force.name,
            "lifecycle": combination.lifecycle.name,
            "direction": "BUY",
        }
        return body | changes

    def _usual(self, order_type: OrderType) -> Combination | None:
        def rank(one: Combination) -> tuple[int, int, int]:
            return (
                list(TICKERS).index(one.region),
                list(TimeInForce).index(one.time_in_force),
                list(Lifecycle).index(one.lifecycle),
            )

        known = [one for one in self.combinations if one.order_type is order_type]
        return min(known, key=rank, default=None)

    def limit(self, **changes: Any) -> dict[str, Any]:
        """The most usual limit order the broker takes; US before HK before CN."""
        usual = self._usual(OrderType.Limit)
        assert usual is not None, "every broker takes some limit order"
        return self.order(usual, **changes)

    def market_order(self, **changes: Any) -> dict[str, Any] | None:
        """The most usual market order, or None when the broker takes none."""
        usual = self._usual(OrderType.Market)
        return None if usual is None else self.order(usual, **changes)

    # --- hooks: what is true at the exchange ------------------------------------------------
    def placements(self) -> int:
        """How many placements have reached the exchange, refused ones included."""
        return len(self.exchange.received("place"))

    def cancellations(self) -> int:
        return len(self.exchange.received("cancel"))

    def orders(self) -> list[ExchangeOrder]:
        """Every order there is at the exchange."""
        with self.exchange.lock:
            return list(self.exchange.orders.values())

    def exchange_id(self, order_id: str) -> str:
        """The exchange's id of the order that the API calls `order_id`."""
        return order_id

    def at_exchange(self, order_id: str) -> ExchangeOrder:
        wanted = self.exchange_id(order_id)
        return next(order for order in self.orders() if order.order_id == wanted)

    # --- hooks: the script -------------------------------------------------------------------
    def fill(self, order_id: str, qty: Decimal | int, price: Decimal | str) -> None:
        self.exchange.fill(self.exchange_id(order_id), qty, price)

    def reject(self, order_id: str, reason: str) -> None:
        self.exchange.reject(self.exchange_id(order_id), reason)

    def cancel(self, order_id: str) -> None:
        """The order is cancelled by somebody else than the client."""
        self.exchange.cancel(self.exchange_id(order_id))

    def expire(self, order_id: str) -> None:
        self.exchange.expire(self.exchange_id(order_id), "expired at the end of the day")

    def forget(self, order_id: str) -> None:
        """The broker does not know the order any more."""
        self.exchange.forget(self.exchange_id(order_id))

    def refused_order(self) -> tuple[dict[str, Any], str]:
        """An order that the broker will refuse, and words that its refusal contains."""
        words = "Insufficient buying power"
        self.exchange.fault("place", FaultKind.REFUSE, text=words)
        return self.limit(), words

    def refused_quote(self) -> tuple[str, str] | None:
        """Region and ticker of a quote that the broker will refuse; None: it refuses none."""
        region = next(region for region in TICKERS if self.quotes(region))
        self.exchange.fault("quote", FaultKind.REFUSE, text="Unknown stock")
        return region, TICKERS[region]

    def set_cash(self, currency: str, amount: str) -> None:
        with self.exchange.lock:
            self.exchange.cash[currency] = Decimal(amount)

    def set_quote(self, region: str, ticker: str, **fields: Any) -> bool:
        """Sets what `market/quote` must show; False where quotes cannot be scripted."""
        self.exchange.quote(region, ticker, **fields)
        return True

    def holdings(self) -> list[ExchangePosition]:
        """Holdings that the broker's protocol can express, for `set_positions`."""
        return [
            ExchangePosition("US", "QQQ", "USD", Decimal(2400)),
            ExchangePosition("US", "BRK.B", "USD", Decimal("-3")),
            ExchangePosition("US", "AAPL", "USD", Decimal("0.5")),
            ExchangePosition("HK", "00700", "HKD", Decimal(200)),
            ExchangePosition("HK", "00005", "HKD", Decimal(400)),
            ExchangePosition("CN", "000001", "CNY", Decimal(100)),
            ExchangePosition("CN", "600519", "CNY", Decimal(100)),
        ]

    def set_positions(self, positions: list[ExchangePosition]) -> None:
        with self.exchange.lock:
            self.exchange.positions = list(positions)

    def fault(
        self, operation: str, kind: FaultKind, *, times: int = 1, text: str = "", seconds: float = 0
    ) -> None:
        self.exchange.fault(operation, kind, times=times, text=text, seconds=seconds)

    def stop(self) -> None:
        """The broker goes away: its connections break, new ones are refused."""
        assert self.server is not None
        self.server.stop()

    def start(self) -> None:
        assert self.server is not None
        self.server.start()

    # --- statements ---------------------------------------------------------------------------
    @contextmanager
    def nothing_sent(self) -> Iterator[None]:
        """Whatever happens inside, no placement or cancellation reaches the exchange."""
        before = self.placements(), self.cancellations()
        yield
        assert (self.placements(), self.cancellations()) == before, "something reached the exchange"

    @contextmanager
    def one_order(self) -> Iterator[Callable[[], ExchangeOrder]]:
        """Exactly one order more is at the exchange after the block than before; call it for it."""
        before = self.order_ids()
        yield lambda: self.new_order(before)
        self.new_order(before)

    def order_ids(self) -> set[str]:
        return {order.order_id for order in self.orders()}

    def new_order(self, before: set[str]) -> ExchangeOrder:
        """The order at the exchange that is not among these; exactly one must be there."""
        found = [order for order in self.orders() if order.order_id not in before]
        assert len(found) == 1, f"{len(found)} orders at the exchange instead of one: {found}"
        return found[0]

    def currency(self, region: str) -> str:
        return CURRENCIES[region]
