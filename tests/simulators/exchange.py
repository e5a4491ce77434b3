"""The broker behind every wire-level simulator: accounts, orders, faults and a request record.

A simulator translates one broker's wire protocol to the calls of an `Exchange`; tests script the
exchange (`fill`, `reject`, `fault` …) and read what reached it (`requests`, `orders`). So one test
can be written for every broker, and "how often was it asked in 30 s" is counted in one place.
All amounts are `Decimal`, all times `time.monotonic()` seconds unless named otherwise.
"""

from __future__ import annotations

import socket
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Any


def keep_port(owner: object, port: int = 0) -> int:
    """A loopback port (0: a free one) that nobody else is given as long as `owner` lives.

    It is bound without listening, so connections are refused while the owner's server is down; a
    server that binds with SO_REUSEADDR may listen there, and again after it was closed.
    """
    kept = socket.socket()
    weakref.finalize(owner, kept.close)
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", port))
    found: int = kept.getsockname()[1]
    return found


class OrderStatus(Enum):
    """Where an order stands at the simulated broker; a simulator names it in its own words."""

    PENDING = "pending"  # received, not yet working (Futu SUBMITTING, IB PendingSubmit, …)
    WORKING = "working"
    PENDING_CANCEL = "pending cancel"
    FILLED = "filled"
    CANCELED = "canceled"  # also when part of it was filled before
    REJECTED = "rejected"
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self in _FINAL


_FINAL = {OrderStatus.FILLED, OrderStatus.CANCELED, OrderStatus.REJECTED, OrderStatus.EXPIRED}


class FaultKind(Enum):
    """What goes wrong with one request."""

    REFUSE = "refuse"  # the broker's business refusal, with `text`
    RATE_LIMIT = "rate limit"  # the broker's own words for "too often"
    HANG = "hang"  # nothing is done, no answer ever
    LATE = "late"  # done and answered, `seconds` later
    SLOW = "slow"  # done only `seconds` later, whether anybody waits for it or not (over HTTP)
    GARBAGE = "garbage"  # nothing is done, the answer is bytes that mean nothing
    CUT = "cut"  # nothing is done, the connection is closed
    ACCEPT_THEN_CUT = "accept then cut"  # done, and the connection is closed instead of answering
    ACCEPT_THEN_HANG = "accept then hang"  # done, and never answered


@dataclass(frozen=True)
class Fault:
    kind: FaultKind
    text: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Request:
    """One request as it arrived; `fields` are the wire's own names and values."""

    time: float
    operation: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class ExchangeFill:
    fill_id: str
    qty: Decimal
    price: Decimal
    epoch: float


@dataclass
class ExchangeOrder:
    order_id: str
    region: str
    ticker: str
    direction: str  # BUY, SELL
    order_type: str  # Limit, Market
    price: Decimal | None
    qty: Decimal
    time_in_force: str  # DAY, GTC
    lifecycle: str  # RTH, ETH, OVERNIGHT
    mark: str = ""  # the tag given by the client, returned in lists and pushes
    account: str = ""
    status: OrderStatus = OrderStatus.WORKING
    reason: str = ""
    fills: list[ExchangeFill] = field(default_factory=list)
    epoch: float = field(default_factory=time.time)
    updated: float = field(default_factory=time.time)
    wire: dict[str, Any] = field(default_factory=dict)  # every field as it arrived

    @property
    def filled(self) -> Decimal:
        return sum((fill.qty for fill in self.fills), Decimal(0))

    @property
    def avg_price(self) -> Decimal:
        filled = self.filled
        if not filled:
            return Decimal(0)
        return sum((fill.qty * fill.price for fill in self.fills), Decimal(0)) / filled


@dataclass
class ExchangePosition:
    region: str
    ticker: str
    currency: str
    qty: Decimal  # negative: short


@dataclass
class ExchangeQuote:
    region: str
    ticker: str
    latest: Decimal = Decimal("100")
    pre_close: Decimal = Decimal("99")
    open_price: Decimal = Decimal("99.5")
    high_price: Decimal = Decimal("101")
    low_price: Decimal = Decimal("98")
    is_tradable: bool = True
    epoch: float = field(default_factory=time.time)


class Exchange:
    """State, script and record of one simulated broker; every method may be called from any thread.

    `operation` is one word for the same thing at every broker: place, cancel, order, orders, fills,
    cash, positions, quote, market, ping, connect, and what a broker has beside these (its own).
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.cash: dict[str, Decimal] = {"USD": Decimal("30877.499"), "HKD": Decimal("1000.5")}
        self.positions: list[ExchangePosition] = []
        self.quotes: dict[tuple[str, str], ExchangeQuote] = {}
        self.orders: dict[str, ExchangeOrder] = {}
        self.requests: list[Request] = []
        self.fill_market_orders = True
        self.on_change: list[Callable[[ExchangeOrder], None]] = []
        self.pushes = True  # False: changes are made, but nobody is told
        self._faults: dict[str, deque[Fault]] = defaultdict(deque)
        self._number = 0

    # --- the script -----------------------------------------------------------------------
    def fault(
        self, operation: str, kind: FaultKind, *, times: int = 1, text: str = "", seconds: float = 0
    ) -> None:
        """The next `times` requests of this operation go wrong like this."""
        with self.lock:
            self._faults[operation].extend([Fault(kind, text, seconds)] * times)

    def clear_faults(self) -> None:
        with self.lock:
            self._faults.clear()

    def quote(self, region: str, ticker: str, **fields: Any) -> ExchangeQuote:
        """Sets (and returns) the quote of one security."""
        with self.lock:
            quote = self.quotes.setdefault((region, ticker), ExchangeQuote(region, ticker))
            for name, value in fields.items():
                setattr(quote, name, value)
            return quote

    def fill(self, order_id: str, qty: Decimal | int, price: Decimal | str) -> None:
        with self.lock:
            order = self.orders[order_id]
            self._number += 1
            fill = ExchangeFill(f"F{self._number}", Decimal(qty), Decimal(price), time.time())
            order.fills.append(fill)
            self._move(order, OrderStatus.FILLED if order.filled >= order.qty else order.status)

    def cancel(self, order_id: str) -> None:
        self.settle(order_id, OrderStatus.CANCELED)

    def reject(self, order_id: str, reason: str) -> None:
        self.settle(order_id, OrderStatus.REJECTED, reason)

    def expire(self, order_id: str, reason: str = "") -> None:
        self.settle(order_id, OrderStatus.EXPIRED, reason)

    def settle(self, order_id: str, status: OrderStatus, reason: str = "") -> None:
        """Moves an order to a status, as the broker would by itself, and tells the listeners."""
        with self.lock:
            order = self.orders[order_id]
            order.reason = reason or order.reason
            self._move(order, status)

    def forget(self, order_id: str) -> None:
        """The broker no longer knows the order (next day, restart)."""
        with self.lock:
            del self.orders[order_id]

    # --- what the simulators call ---------------------------------------------------------
    def receive(self, operation: str, **fields: Any) -> Fault | None:
        """Records a request; returns the fault scripted for it, if any."""
        with self.lock:
            self.requests.append(Request(time.monotonic(), operation, fields))
            self.changed.notify_all()
            waiting = self._faults[operation]
            return waiting.popleft() if waiting else None

    def place(self, order: ExchangeOrder) -> ExchangeOrder:
        """Takes an order in; market orders fill at the latest price unless told otherwise."""
        with self.lock:
            if order.order_id in self.orders:
                raise ValueError(f"order id {order.order_id} is in use")
            self.orders[order.order_id] = order
            self._move(order, order.status)
            if order.order_type == "Market" and self.fill_market_orders:
                price = self.quote(order.region, order.ticker).latest
                self.fill(order.order_id, order.qty, price)
            return order

    def by_mark(self, mark: str) -> list[ExchangeOrder]:
        """Every order with this mark: one, if nothing was doubled."""
        with self.lock:
            return [order for order in self.orders.values() if order.mark == mark]

    # --- what the tests ask ---------------------------------------------------------------
    def received(self, operation: str) -> list[Request]:
        with self.lock:
            return [request for request in self.requests if request.operation == operation]

    def wait_for(self, condition: Callable[[], Any], timeout: float = 60.0) -> None:
        """Waits until the condition holds; fails loudly when it does not in time."""
        with self.changed:
            if not self.changed.wait_for(condition, timeout):
                raise AssertionError("the simulator did not reach the awaited state in time")

    def most_in(self, seconds: float, operations: Iterable[str]) -> int:
        """The largest number of requests of these operations within any window of that length."""
        wanted = set(operations)
        with self.lock:
            times = [request.time for request in self.requests if request.operation in wanted]
        most, start = 0, 0
        for end, moment in enumerate(times):
            while moment - times[start] >= seconds:
                start += 1
            most = max(most, end - start + 1)
        return most

    def least_gap(self, operations: Iterable[str]) -> float:
        """The shortest time between two such requests (infinite for fewer than two)."""
        wanted = set(operations)
        with self.lock:
            times = [request.time for request in self.requests if request.operation in wanted]
        return min((b - a for a, b in zip(times, times[1:], strict=False)), default=float("inf"))

    def _move(self, order: ExchangeOrder, status: OrderStatus) -> None:
        order.status = status
        order.updated = time.time()
        self.changed.notify_all()
        for listener in list(self.on_change) if self.pushes else ():
            listener(order)
