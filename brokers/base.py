"""`BaseBroker`: what a broker is to the gateway, for the built-in adapters and for your own.

`docs/writing-a-broker.md` tells the whole story with an example.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from httptrading.brokers.registry import broker_meta
from httptrading.errors import BrokerUnavailable, Unsupported
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
)

_Result = TypeVar("_Result")
Answer: TypeAlias = _Result | Awaitable[_Result]
"""What an operation returns: plain `def` or `async def`, as the broker likes."""

READS = (
    "ping",
    "quote",
    "market_status",
    "cash",
    "positions",
    "order",
    "recent_orders",
    "fills",
)
CHANGES = ("place_order", "cancel_order")
OPERATIONS = READS + CHANGES


@dataclass(frozen=True)
class Window:
    """A documented limit: at most `limit` calls in any `seconds`, at least `gap` seconds apart.

    `kept` slots are left free for cancellations: other calls may use `limit - kept`. Reads leave
    `kept_for_orders` more for orders, which a trader's own pollers would starve otherwise.
    """

    limit: int
    seconds: float
    gap: float = 0.0
    kept: int = 0
    kept_for_orders: int = 0

    def usable(self, priority: int) -> int:
        """Slots that calls of this priority fill it with: 0 cancellations, 1 orders, else reads."""
        kept = (0, self.kept, self.kept + self.kept_for_orders)
        return self.limit - kept[priority]


@dataclass(frozen=True)
class Combination:
    """One kind of order that a broker takes."""

    region: str
    order_type: OrderType
    time_in_force: TimeInForce
    lifecycle: Lifecycle

    def __str__(self) -> str:
        return " ".join(
            (self.region, self.order_type.name, self.time_in_force.name, self.lifecycle.name)
        )


def combine(
    regions: Iterable[str],
    order_types: Iterable[OrderType],
    times_in_force: Iterable[TimeInForce],
    lifecycles: Iterable[Lifecycle],
) -> frozenset[Combination]:
    """Every combination of the given values; tables are unions of a few of these."""
    return frozenset(
        Combination(*values) for values in product(regions, order_types, times_in_force, lifecycles)
    )


class Link(Protocol):
    """The worker, as a broker object sees it; every method may be called from any thread."""

    def report(self, reports: Iterable[OrderReport]) -> None: ...

    def fill(self, fills: Iterable[Fill]) -> None: ...

    def stale(self) -> None: ...

    def lost(self, reason: str) -> None: ...

    def restored(self) -> None: ...

    def take(self, window: str) -> None: ...

    def quote_of(self, instance_id: str, contract: Contract) -> Quote: ...


def masked(instance_id: str) -> str:
    """An instance id for logs and errors: it is half of the way in."""
    return f"{instance_id[:4]}…" if len(instance_id) >= 8 else "…"


class BaseBroker:
    """One account at one broker.

    The object made by the user is a prototype that never connects. Each worker (see `connections`)
    makes a copy of it inside its own thread or child process, calls `connect()` there, then the
    operations one at a time, then `close()`. After a broken connection or a stuck call a fresh copy
    is made. Every method may be plain `def` or `async def`.
    """

    connections: ClassVar[Mapping[str, tuple[str, ...]]] = {"trade": OPERATIONS}
    """Worker name → the operations it serves. A broker with a separate quote connection has two, so
    that a stuck quote never delays a cancel. The copy of the broker reads its own name in
    `self.connection`."""

    isolation: str = "thread"
    """Where the workers run unless configured otherwise: "thread" or "process" (for SDKs that hold
    the GIL or whose dependencies conflict)."""

    arguments: ClassVar[frozenset[str] | None] = None
    """The names of the arguments it takes; None: whatever it is given."""

    sdk: ClassVar[str] = ""
    """What to install for `connect()`'s imports, e.g. `futu-api`; for the error message."""

    windows: ClassVar[Mapping[str, Window]] = {}
    """Window name → documented limit."""

    costs: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Operation → the windows in which one call of it takes a slot."""

    ages: ClassVar[Mapping[str, float]] = {}
    """Operation → how old (seconds) an answer from memory may be; overrides the gateway's."""

    listing_delay: ClassVar[float] = 2.0
    """Seconds after which an accepted order is sure to show in `recent_orders()`."""

    booked_within: ClassVar[float] = 0.0
    """Seconds from the beginning of `place_order()` within which the broker may still accept the
    order, whether anybody waits for it or not: commonly as long as its SDK waits for the answer."""

    combinations: frozenset[Combination] | None = None
    """The kinds of orders this broker takes; None: whatever it is given."""

    quote_regions: ClassVar[frozenset[str] | None] = None
    """Where it has quotes; None: whatever it is asked for."""

    quotes_from: str | None = None
    """The id of the instance that `quote_of` is asked for, if any; checked before the start."""

    def __init__(
        self,
        broker_args: Mapping[str, Any] | None = None,
        instance_id: str | None = None,
        tokens: Iterable[str] | None = None,
    ) -> None:
        """Stores only. An adapter may check its arguments here (ValueError), but never connects."""
        self.broker_args: dict[str, Any] = dict(broker_args or {})
        if self.arguments is not None and (unknown := set(self.broker_args) - self.arguments):
            # Names only: a value may be a secret.
            raise ValueError(
                f"{type(self).__name__} has no argument "
                f"{', '.join(map(repr, sorted(unknown)))}; it has: "
                f"{', '.join(sorted(self.arguments))}"
            )
        self.instance_id: str = instance_id or ""
        self.tokens: list[str] = list(tokens or ())
        self.connection: str = "trade"
        self.data_dir: Path = Path(".")
        self._link: Link | None = None

    def __repr__(self) -> str:
        # Arguments and tokens are secrets, and instance ids are half of one.
        return f"<{type(self).__name__} {masked(self.instance_id)}>"

    @property
    def broker_name(self) -> str:
        return broker_meta(type(self)).name

    @property
    def broker_display(self) -> str:
        return broker_meta(type(self)).display

    # --- what is known without a connection ------------------------------------------------
    def account_key(self) -> str:
        """Names the credentials: instances with the same key share their rate windows."""
        text = json.dumps(self.broker_args, sort_keys=True, default=str)
        return f"{self.broker_name}:{hashlib.sha256(text.encode()).hexdigest()}"

    def window_key(self, window: str) -> str:
        """Whose limit a window is; the account's, unless a broker counts some for a whole login."""
        return self.account_key()

    def check_contract(self, contract: Contract) -> None:
        """Raises Unsupported when there is no quote for such a contract here."""
        if self.quote_regions is not None and contract.region not in self.quote_regions:
            known = ", ".join(sorted(self.quote_regions)) or "no market"
            raise Unsupported(
                f"{self.broker_display} has no quotes for region {contract.region}, only: {known}"
            )

    def check_order(
        self,
        contract: Contract,
        order_type: OrderType,
        time_in_force: TimeInForce,
        lifecycle: Lifecycle,
        direction: str,
        qty: int,
        price: float | None,
    ) -> None:
        """Raises Unsupported when this broker does not take such an order.

        Runs before anything is queued, on the prototype: no SDK, no connection, no waiting.
        """
        if self.combinations is None:
            return
        asked = Combination(contract.region, order_type, time_in_force, lifecycle)
        if asked not in self.combinations:
            there = [known for known in self.combinations if known.region == contract.region]
            listed = "; ".join(sorted(map(str, there or self.combinations)))
            raise Unsupported(
                f"{self.broker_display} does not take {asked} orders. It takes: {listed}"
            )

    # --- the connection ---------------------------------------------------------------------
    def connect(self) -> Answer[None]:
        """Imports the SDK and connects; the only place that does.

        Raises BrokerUnavailable with a sentence of what is wrong and what to do; the worker tries
        again with growing pauses. Must end by itself where the SDK lets it.
        """
        return None

    def close(self) -> Answer[None]:
        """Ends everything that `connect()` began; called in the worker's thread, also after a
        failed `connect()`."""
        return None

    def abort(self) -> None:
        """Makes a stuck call end by closing its sockets; from another thread, never waits."""

    # --- the eight operations ---------------------------------------------------------------
    def place_order(
        self,
        contract: Contract,
        order_type: OrderType,
        time_in_force: TimeInForce,
        lifecycle: Lifecycle,
        direction: str,
        qty: int,
        price: float | None = None,
        **kwargs: Any,
    ) -> Answer[str]:
        """Sends one order and returns the broker's order id: 1 to 64 visible ASCII characters, or
        clients can name the order by its `client_order_id` only.

        `price` is None for market orders; its shortest text is exactly what the client typed.
        Keywords: `client_order_id`, and `mark`, the tag (ASCII, at most 24 characters) to give to
        the broker where it returns one in `recent_orders()`. Never sends twice. Raises Rejected
        (the broker said no), BrokerUnavailable, Busy or RateLimited (nothing was sent),
        OutcomeUnknown (sent, no answer); any other exception counts as OutcomeUnknown.
        """
        raise NotImplementedError

    def cancel_order(self, order_id: str) -> Answer[None]:
        """Asks for a cancellation; same errors as `place_order`, and OrderNotFound."""
        raise NotImplementedError

    def order(self, order_id: str) -> Answer[Order | OrderReport]:
        """One order; OrderNotFound when the broker does not know it (any more)."""
        raise NotImplementedError

    def positions(self) -> Answer[list[Position]]:
        raise NotImplementedError

    def cash(self) -> Answer[Cash]:
        """An adapter that knows several currencies takes `currency: str = "USD"`."""
        raise NotImplementedError

    def ping(self) -> Answer[bool]:
        return True

    def quote(self, contract: Contract) -> Answer[Quote]:
        raise NotImplementedError

    def market_status(self) -> Answer[Mapping[Any, Mapping[str, MarketStatus]]]:
        """`{"securities": {"US": MarketStatus(…), …}}`; `TradeType.Securities` is a key as well."""
        raise NotImplementedError

    # --- what settlement and lists need -----------------------------------------------------
    def recent_orders(self) -> Answer[list[OrderReport]]:
        """All open orders, and all that were sent since `listed_since()`.

        One complete listing or an exception: an order that is missing here counts as not placed.
        """
        raise NotImplementedError

    def listed_since(self, now: datetime) -> datetime:
        """From when on `recent_orders()`, asked `now`, tells orders that are finished as well. One
        that was sent before and is missing may have been filled: it stays unknown."""
        return now - timedelta(days=1)

    def fills(self, order_id: str) -> Answer[list[Fill]]:
        raise NotImplementedError

    # --- for use by subclasses --------------------------------------------------------------
    async def call_sync(self, function: Callable[[], _Result]) -> _Result:
        """Runs a blocking SDK call. A worker is its broker's own thread, so it simply runs it."""
        return function()

    async def call_async(self, awaitable: Awaitable[_Result]) -> _Result:
        """Awaits it: the published 1.0 has this for its brokers, and those of users may call it."""
        return await awaitable

    def report(self, *reports: OrderReport) -> None:
        """Tells the gateway what a push said of orders. From any thread, never waits."""
        if self._link is not None and reports:
            self._link.report(reports)

    def report_fills(self, *fills: Fill) -> None:
        if self._link is not None and fills:
            self._link.fill(fills)

    def stale(self) -> None:
        """Something changed at the broker: nothing is answered from memory any more."""
        if self._link is not None:
            self._link.stale()

    def lost(self, reason: str) -> None:
        """The connection is gone for good: close this copy and connect a fresh one."""
        if self._link is not None:
            self._link.lost(reason)

    def restored(self) -> None:
        """The SDK reconnected by itself: what was missed meanwhile must be looked up."""
        if self._link is not None:
            self._link.restored()

    def take(self, window: str) -> None:
        """Takes a slot for a call that an operation makes beside its own; RateLimited if none."""
        if self._link is not None:
            self._link.take(window)

    def quote_of(self, instance_id: str, contract: Contract) -> Quote:
        """Another instance's quote (Paper trades on real prices with it); its errors pass through.

        Only in `thread` isolation.
        """
        if self._link is None:
            raise BrokerUnavailable("not connected")
        return self._link.quote_of(instance_id, contract)


async def run_operation(
    function: Callable[..., Any], seconds: float | None, /, **arguments: Any
) -> Any:
    """Calls a plain or `async def` method and returns its result; an `async def` one is cancelled
    after `seconds`, with TimeoutError."""
    result = function(**arguments)
    if asyncio.iscoroutine(result) or isinstance(result, Awaitable):
        async with asyncio.timeout(seconds):
            result = await result
    return result
