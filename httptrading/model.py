"""The plain data everybody shares: contracts, orders, positions, cash, quotes, market states.

The names are those of the documented API (`Contract`, `Lifecycle`, `direction` …); where the field
uses another word, the docstring says it once. Numbers may be `int`, `float` or `Decimal`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

Number = int | float | Decimal


def exact(number: Number) -> Decimal:
    """The decimal that a number was read from: of a float, what its shortest text says.

    >>> exact(200.01)
    Decimal('200.01')
    """
    if isinstance(number, float):
        return Decimal(float.__repr__(number))  # that of a subclass (numpy's) is its own
    return Decimal(number)


class TradeType(enum.Enum):
    """What kind of thing is traded."""

    Securities = "Securities"


class Unit(enum.Enum):
    """What a position's quantity counts."""

    Share = "Share"
    RoundLot = "RoundLot"
    Satoshi = "Satoshi"


class OrderType(enum.Enum):
    Limit = "Limit"
    Market = "Market"


class TimeInForce(enum.Enum):
    """How long an order works: the trading day, or until it is cancelled."""

    DAY = "DAY"
    GTC = "GTC"


class Lifecycle(enum.Enum):
    """The sessions an order may trade in ("trading session" elsewhere)."""

    RTH = "RTH"  # regular trading hours
    ETH = "ETH"  # regular hours, before and after them
    OVERNIGHT = "OVERNIGHT"


class UnifiedStatus(enum.Enum):
    """A market's state in words common to all brokers."""

    UNKNOWN = "UNKNOWN"  # before the open, or a state that maps to none of the others
    OVERNIGHT = "OVERNIGHT"
    PRE_HOURS = "PRE_HOURS"
    RTH = "RTH"
    REST = "REST"
    AFTER_HOURS = "AFTER_HOURS"
    CLOSED = "CLOSED"


@dataclass(frozen=True)
class Contract:
    """One security ("instrument" elsewhere).

    `ticker` is canonical: US upper case with `.` before a share class (`BRK.B`), HK padded to five
    digits (`00700`), CN six digits (`000001`); `region` is US, HK or CN.
    """

    trade_type: TradeType
    ticker: str
    region: str

    @property
    def symbol(self) -> str:
        """The ticker, under the name that httptrading 1.0 uses."""
        return self.ticker


@dataclass(frozen=True)
class Position:
    """A holding; `qty` is negative for a short position and may have a fraction."""

    broker: str
    broker_display: str
    contract: Contract
    unit: Unit
    currency: str
    qty: Number


@dataclass(frozen=True)
class Cash:
    """Money held in one currency that may be spent, not margin."""

    currency: str
    amount: Number


@dataclass(frozen=True)
class MarketStatus:
    """`origin_status` is the broker's own word, `unified_status` ours."""

    region: str
    origin_status: str
    unified_status: UnifiedStatus


@dataclass(frozen=True)
class Quote:
    """A snapshot; `time` is the quote's own time (timezone-aware), not that of the answer."""

    contract: Contract
    currency: str
    is_tradable: bool
    latest: Number
    pre_close: Number
    open_price: Number
    high_price: Number
    low_price: Number
    time: datetime


@dataclass(frozen=True)
class Order:
    """What became of an order.

    `error_reason` is set only when the order failed for good (rejected, failed, expired);
    `is_canceled` also when a part was filled before; `is_pending_cancel` while a cancellation is
    asked for but not confirmed. An order whose fate is not known has none of the three.
    """

    order_id: str
    currency: str
    qty: Number
    filled_qty: Number = 0
    avg_price: Number = 0
    error_reason: str = ""
    is_canceled: bool = False
    is_pending_cancel: bool = False

    @property
    def is_filled(self) -> bool:
        return self.filled_qty >= self.qty > 0

    @property
    def is_completed(self) -> bool:
        """Filled, failed or cancelled: nothing more will happen, and it cannot be cancelled."""
        return self.is_filled or self.is_canceled or bool(self.error_reason)

    @property
    def is_cancelable(self) -> bool:
        return not self.is_completed and not self.is_pending_cancel


@dataclass(frozen=True)
class OrderReport:
    """An order as a broker's list or push shows it ("execution report" in FIX).

    `mark` is the tag the gateway gave with the order ("" for orders that are not the gateway's);
    what was asked for is None where the broker does not say it. `time` is when the broker received
    the order, timezone-aware.
    """

    order: Order
    mark: str = ""
    contract: Contract | None = None
    direction: str | None = None
    order_type: OrderType | None = None
    price: Number | None = None
    time_in_force: TimeInForce | None = None
    lifecycle: Lifecycle | None = None
    time: datetime | None = None


@dataclass(frozen=True)
class Fill:
    """One execution; `fill_id` is unique among the account's fills, `time` timezone-aware, `qty` 0
    when the broker has taken it back."""

    fill_id: str
    order_id: str
    qty: Number
    price: Number
    time: datetime


CURRENCIES = {"US": "USD", "HK": "HKD", "CN": "CNY"}
"""A region's usual currency; a single security may differ (B shares, some HK counters)."""

__all__ = [
    "CURRENCIES",
    "Cash",
    "Contract",
    "Fill",
    "Lifecycle",
    "MarketStatus",
    "Number",
    "Order",
    "OrderReport",
    "OrderType",
    "Position",
    "Quote",
    "TimeInForce",
    "TradeType",
    "UnifiedStatus",
    "Unit",
]
