"""A custom broker grown from the documents' sample passes the cases every broker passes: once with
`async def` methods, once with plain `def`."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import pytest

from acceptance.cases import BrokerAcceptance, FaultAcceptance, PushAcceptance
from acceptance.kit import Subject
from acceptance.seed import SAMPLE
from httptrading import *  # noqa: F403  the sample's own imports
from httptrading.brokers.base import BaseBroker
from httptrading.brokers.registry import broker_register
from httptrading.errors import (
    BrokerUnavailable,
    OrderNotFound,
    OutcomeUnknown,
    RateLimited,
    Rejected,
)
from httptrading.model import *  # noqa: F403
from httptrading.model import (
    Cash,
    Contract,
    Fill,
    Lifecycle,
    MarketStatus,
    Order,
    OrderReport,
    OrderType,
    Position,
    Quote,
    TimeInForce,
    TradeType,
    UnifiedStatus,
    Unit,
)
from simulators.exchange import Exchange, ExchangeOrder, Fault, FaultKind, OrderStatus

_Result = TypeVar("_Result")
FAILED = (OrderStatus.REJECTED, OrderStatus.EXPIRED)


class Line:
    """The way to the exchange: up or down."""

    def __init__(self) -> None:
        self.is_up = True
        self.on_down: list[Callable[[], None]] = []

    def start(self) -> None:
        self.is_up = True

    def stop(self) -> None:
        self.is_up = False
        for tell in list(self.on_down):
            tell()


class MySdk:
    """What a blocking SDK would be: requests to an exchange over a line, with its faults."""

    def __init__(self, exchange: Exchange, line: Line) -> None:
        self.exchange = exchange
        self.line = line
        self.closed = threading.Event()
        self._numbers = itertools.count(1)

    def request(
        self, operation: str, do: Callable[[], _Result], **fields: Any
    ) -> tuple[Fault | None, Callable[[], _Result]]:
        """The fault of this request, and what it does at the exchange."""
        if not self.line.is_up:
            raise BrokerUnavailable("XX is not reachable; check the network")
        return self.exchange.receive(operation, **fields), do

    def place(self, order: ExchangeOrder) -> str:
        return self.exchange.place(order).order_id

    def new_id(self) -> str:
        with self.exchange.lock:
            return f"{len(self.exchange.orders) + 1}-{id(self):x}-{next(self._numbers)}"

    def cancel(self, order_id: str) -> None:
        with self.exchange.lock:
            order = self.find(order_id)
            if order.status.is_final:
                raise Rejected(f"the order is {order.status.value}")
            self.exchange.cancel(order_id)

    def find(self, order_id: str) -> ExchangeOrder:
        with self.exchange.lock:
            if order_id not in self.exchange.orders:
                raise OrderNotFound(f"XX does not know order {order_id}")
            return self.exchange.orders[order_id]


def shown(order: ExchangeOrder) -> OrderReport:
    return OrderReport(
        Order(
            order.order_id,
            {"US": "USD", "HK": "HKD", "CN": "CNY"}[order.region],
            int(order.qty),
            int(order.filled),
            float(order.avg_price),
            (order.reason or order.status.value) if order.status in FAILED else "",
            order.status is OrderStatus.CANCELED,
        ),
        mark=order.mark,
        contract=Contract(TradeType.Securities, order.ticker, order.region),
        direction=order.direction,
        order_type=OrderType[order.order_type],
        price=order.price,
        time_in_force=TimeInForce[order.time_in_force],
        lifecycle=Lifecycle[order.lifecycle],
        time=datetime.fromtimestamp(order.epoch, UTC),
    )


def moved(order: ExchangeOrder) -> list[Fill]:
    return [
        Fill(fill.fill_id, order.order_id, fill.qty, fill.price, datetime.now(UTC))
        for fill in order.fills
    ]


class Trading(BaseBroker):
    """What both have in common: the model's objects made from the exchange's."""

    sdk_client: MySdk | None = None

    def open_client(self) -> None:
        exchange, line = self.broker_args["exchange"], self.broker_args["line"]
        if not line.is_up:
            raise BrokerUnavailable("XX is not reachable; check the network")
        self.sdk_client = MySdk(exchange, line)
        exchange.on_change.append(self.on_order)
        line.on_down.append(self.on_down)

    def close_client(self) -> None:
        if self.sdk_client is not None:
            self.sdk_client.exchange.on_change.remove(self.on_order)
            self.sdk_client.line.on_down.remove(self.on_down)
            self.sdk_client = None

    def on_order(self, order: ExchangeOrder) -> None:
        self.report(shown(order))
        self.report_fills(*moved(order))
        self.stale()

    def on_down(self) -> None:
        self.lost("The connection to XX broke")

    @property
    def client(self) -> MySdk:
        assert self.sdk_client is not None
        return self.sdk_client

    def after(self, fault: Fault | None, do: Callable[[], _Result], *, changes: bool) -> _Result:
        """The answer, or the failure, of a request that does not hang."""
        match fault:
            case None:
                return do()
            case Fault(FaultKind.REFUSE):
                raise Rejected(fault.text)
            case Fault(FaultKind.RATE_LIMIT):
                raise RateLimited("XX: too many requests", retry_after=1)
            case Fault(FaultKind.GARBAGE):
                raise ValueError("an answer that means nothing")
            case Fault(FaultKind.ACCEPT_THEN_CUT):
                do()
        self.lost("XX cut the connection")
        if changes:
            raise OutcomeUnknown("XX cut the connection before it answered")
        raise BrokerUnavailable("XX cut the connection")

    def make(self, order_id: str, *values: Any, mark: str) -> ExchangeOrder:
        contract, order_type, time_in_force, lifecycle, direction, qty, price = values
        return ExchangeOrder(
            order_id,
            contract.region,
            contract.ticker,
            direction,
            order_type.name,
            None if price is None else Decimal(repr(price)),
            Decimal(qty),
            time_in_force.name,
            lifecycle.name,
            mark=mark,
        )

    def held(self) -> list[Position]:
        return [
            Position(
                self.broker_name,
                self.broker_display,
                Contract(TradeType.Securities, one.ticker, one.region),
                Unit.Share,
                one.currency,
                float(one.qty),
            )
            for one in self.client.exchange.positions
        ]

    def snapshot(self, contract: Contract) -> Quote:
        found = self.client.exchange.quote(contract.region, contract.ticker)
        return Quote(
            contract,
            {"US": "USD", "HK": "HKD", "CN": "CNY"}[contract.region],
            found.is_tradable,
            float(found.latest),
            float(found.pre_close),
            float(found.open_price),
            float(found.high_price),
            float(found.low_price),
            datetime.fromtimestamp(found.epoch, UTC),
        )


@broker_register("myApi", "XX证券")
class MyTradingApi(Trading):
    """With `async def` methods."""

    async def connect(self) -> None:
        self.open_client()

    async def close(self) -> None:
        self.close_client()

    async def ask(
        self, operation: str, do: Callable[[], _Result], *, changes: bool = False
    ) -> _Result:
        fault, do = self.client.request(operation, do)
        if fault is not None and fault.kind is FaultKind.LATE:
            found = do()
            await asyncio.sleep(fault.seconds)
            return found
        if fault is not None and fault.kind in (FaultKind.HANG, FaultKind.ACCEPT_THEN_HANG):
            if fault.kind is FaultKind.ACCEPT_THEN_HANG:
                do()
            await asyncio.Event().wait()
        return self.after(fault, do, changes=changes)

    async def place_order(
        self,
        contract: Contract,
        order_type: OrderType,
        time_in_force: TimeInForce,
        lifecycle: Lifecycle,
        direction: str,
        qty: int,
        price: float | None = None,
        **kwargs: Any,
    ) -> str:
        values = (contract, order_type, time_in_force, lifecycle, direction, qty, price)
        assert type(qty) is int and (price is None or type(price) is float)
        order = self.make(self.client.new_id(), *values, mark=kwargs["mark"])
        return await self.ask("place", lambda: self.client.place(order), changes=True)

    async def order(self, order_id: str) -> Order:
        return await self.ask("order", lambda: shown(self.client.find(order_id)).order)

    async def cancel_order(self, order_id: str) -> None:
        await self.ask("cancel", lambda: self.client.cancel(order_id), changes=True)

    async def positions(self) -> list[Position]:
        return await self.ask("positions", self.held)

    async def cash(self) -> Cash:
        return await self.ask("cash", lambda: Cash("USD", float(self.client.exchange.cash["USD"])))

    async def ping(self) -> bool:
        return await self.ask("ping", lambda: True)

    async def quote(self, contract: Contract) -> Quote:
        return await self.ask("quote", lambda: self.snapshot(contract))

    async def market_status(self) -> dict[str, dict[str, MarketStatus]]:
        open_ = {"US": MarketStatus("US", "OPEN", UnifiedStatus.RTH)}
        return await self.ask("market", lambda: {"securities": open_})

    async def recent_orders(self) -> list[OrderReport]:
        orders = self.client.exchange.orders
        return await self.ask("orders", lambda: [shown(order) for order in orders.values()])

    async def fills(self, order_id: str) -> list[Fill]:
        return await self.ask("fills", lambda: moved(self.client.find(order_id)))


@broker_register("myPlainApi", "YY证券")
class MyPlainApi(Trading):
    """With plain `def` methods, as over an SDK that blocks; knows cash in two currencies."""

    def connect(self) -> None:
        self.open_client()

    def close(self) -> None:
        self.close_client()

    def abort(self) -> None:
        if self.sdk_client is not None:
            self.sdk_client.closed.set()

    def ask(self, operation: str, do: Callable[[], _Result], *, changes: bool = False) -> _Result:
        client = self.client
        fault, do = client.request(operation, do)
        if fault is not None and fault.kind is FaultKind.LATE:
            found = do()
            client.closed.wait(fault.seconds)
            return found
        if fault is not None and fault.kind in (FaultKind.HANG, FaultKind.ACCEPT_THEN_HANG):
            if fault.kind is FaultKind.ACCEPT_THEN_HANG:
                do()
            client.closed.wait()
        return self.after(fault, do, changes=changes)

    def place_order(  # type: ignore[override]
        self,
        contract: Contract,
        order_type: OrderType,
        time_in_force: TimeInForce,
        lifecycle: Lifecycle,
        direction: str,
        qty: int,
        price: float | None = None,
        *,
        client_order_id: str,
        mark: str,
    ) -> str:
        values = (contract, order_type, time_in_force, lifecycle, direction, qty, price)
        order = self.make(self.client.new_id(), *values, mark=mark)
        return self.ask("place", lambda: self.client.place(order), changes=True)

    def order(self, order_id: str) -> OrderReport:  # type: ignore[override]
        return self.ask("order", lambda: shown(self.client.find(order_id)))

    def cancel_order(self, order_id: str) -> None:  # type: ignore[override]
        self.ask("cancel", lambda: self.client.cancel(order_id), changes=True)

    def positions(self) -> list[Position]:  # type: ignore[override]
        return self.ask("positions", self.held)

    def cash(self, currency: str = "USD") -> Cash:  # type: ignore[override]
        return self.ask("cash", lambda: Cash(currency, self.client.exchange.cash[currency]))

    def ping(self) -> bool:  # type: ignore[override]
        return self.ask("ping", lambda: True)

    def quote(self, contract: Contract) -> Quote:  # type: ignore[override]
        return self.ask("quote", lambda: self.snapshot(contract))

    def recent_orders(self) -> list[OrderReport]:  # type: ignore[override]
        orders = self.client.exchange.orders
        return self.ask("orders", lambda: [shown(order) for order in orders.values()])

    def fills(self, order_id: str) -> list[Fill]:  # type: ignore[override]
        return self.ask("fills", lambda: moved(self.client.find(order_id)))


class _Custom(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    broker_class: type[BaseBroker]

    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        exchange, line = Exchange(), Line()
        broker = self.broker_class({"exchange": exchange, "line": line})
        with Subject(broker, tmp_path_factory.mktemp("custom"), exchange, line) as subject:
            yield subject


class TestAsyncDef(_Custom):
    broker_class = MyTradingApi


class TestPlainDef(_Custom):
    broker_class = MyPlainApi


def test_the_documents_sample_as_it_stands(tmp_path: Path) -> None:
    names: dict[str, Any] = {}
    exec(SAMPLE, names)
    with Subject(names["MyTradingApi"](), tmp_path) as subject:
        trader = subject.trader()
        ping = trader.ping()
        assert ping["pong"] is True
        assert (ping["broker"], ping["brokerDisplay"]) == ("myApi", "XX证券")
        for answer in (
            trader.quote("US", "QQQ"),
            trader.market(),
            trader.cash(),
            trader.positions(),
            trader.place(subject.limit()),
            trader.state("1"),
            trader.cancel("1"),
        ):
            assert (answer.status, answer.code) == (422, "UNSUPPORTED"), answer


def test_a_broker_that_cannot_cancel_says_so_of_all_orders_too(tmp_path: Path) -> None:
    """No orders in the answer would mean that none is open."""

    @broker_register("onlyCash", "只有资金")
    class OnlyCash(BaseBroker):
        def cash(self) -> Cash:  # type: ignore[override]
            return Cash("USD", 1)

    with Subject(OnlyCash(), tmp_path) as subject:
        trader = subject.trader()
        assert trader.cash().ok
        for answer in (trader.cancel("1"), trader.post("order/cancel-all", {})):
            assert (answer.status, answer.code) == (422, "UNSUPPORTED"), answer
