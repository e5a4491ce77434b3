"""Paper: a simulated account on a small simulated exchange inside the service.

Orders, cash and holdings live in `paper.sqlite` in the instance's data directory and survive
restarts and crashes. Prices are made up unless `quotes_from` names another instance to take real
ones from. Not simulated: holidays, board lots, taxes, dividends, short sales, margin, currency
exchange.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

from httptrading.brokers.base import BaseBroker, combine
from httptrading.brokers.paper_exchange import (
    FEES,
    NO_FEES,
    Changes,
    PaperExchange,
    PaperFill,
    PaperOrder,
    Status,
)
from httptrading.brokers.paper_market import (
    REGIONS,
    AlwaysOpen,
    ExchangeHours,
    Hours,
    MadeUpPrices,
    day_prices,
    made_up_price,
)
from httptrading.brokers.paper_quotes import BorrowedPrices
from httptrading.brokers.registry import broker_register
from httptrading.errors import BrokerUnavailable, Busy
from httptrading.model import (
    CURRENCIES,
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
    Unit,
)

log = logging.getLogger("httptrading.paper")

INITIAL_CASH = {"USD": 100_000, "HKD": 800_000, "CNY": 700_000}
HOURS: dict[str, Hours] = {"always": AlwaysOpen(), "exchange": ExchangeHours()}
PULSE = 1.0  # seconds between two looks at resting orders
PULSE_BORROWED = 5.0  # the same with another instance's quotes, which have rate limits
BORROWED_WAIT = 0.8  # seconds that an order waits for such a price; deadlines begin at 1 s
REMEMBERED = 7 * 86400.0  # how far back `recent_orders` goes, in seconds

_ALWAYS = {Lifecycle.RTH, Lifecycle.ETH, Lifecycle.OVERNIGHT}


@broker_register("paper", "模拟交易")
class Paper(BaseBroker):
    """Arguments, all optional:

    - `cash`: what a new account begins with, e.g. `{"USD": 50000}`; other currencies 0.
      Default: USD 100000, HKD 800000, CNY 700000.
    - `quotes_from`: the id of an instance whose quotes are used in place of made-up prices.
    - `hours`: `"always"` (default: trades day and night, so that a first order fills on a Sunday;
      market/state says so) or `"exchange"` (the real exchanges' hours, holidays not known).
    - `fees`: false for none.
    """

    combinations = (
        combine(REGIONS, [OrderType.Market], [TimeInForce.DAY], [Lifecycle.RTH])
        | combine(REGIONS, [OrderType.Limit], TimeInForce, [Lifecycle.RTH])
        | combine(["US"], [OrderType.Limit], TimeInForce, _ALWAYS)
    )
    quote_regions = frozenset(REGIONS)
    arguments = frozenset({"cash", "quotes_from", "hours", "fees"})
    ages = {"quote": 0.0, "order": 0.0}
    listing_delay = 0.0  # an order is in the list before place_order returns

    def __init__(
        self,
        broker_args: Mapping[str, Any] | None = None,
        instance_id: str | None = None,
        tokens: Iterable[str] | None = None,
    ) -> None:
        super().__init__(broker_args, instance_id, tokens)
        if self.broker_args.get("hours", "always") not in list(HOURS):
            raise ValueError('Paper: hours must be "always" or "exchange"')
        if not isinstance(self.broker_args.get("fees", True), bool):
            raise ValueError("Paper: fees must be true or false")
        self._initial_cash = _initial_cash(self.broker_args.get("cash", INITIAL_CASH))
        source = self.broker_args.get("quotes_from")
        if source is not None and (not isinstance(source, str) or source in ("", self.instance_id)):
            raise ValueError("Paper: quotes_from must be the id of another instance")
        self.quotes_from = source
        self._hours = HOURS[self.broker_args.get("hours", "always")]
        self._exchange: PaperExchange | None = None
        self._borrowed: BorrowedPrices | None = None
        self._pulse: asyncio.Task[None] | None = None

    def account_key(self) -> str:
        return f"paper:{self.instance_id}"  # every instance is an account of its own

    # --- the connection ---------------------------------------------------------------------
    async def connect(self) -> None:
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BrokerUnavailable(
                f"The paper account's directory cannot be made: {error.strerror}"
            ) from error
        if source := self.quotes_from:
            self._borrowed = BorrowedPrices(lambda contract: self.quote_of(source, contract))
        self._exchange = PaperExchange(
            self.data_dir / "paper.sqlite",
            self._initial_cash,
            self._borrowed or MadeUpPrices(),
            self._hours,
            FEES if self.broker_args.get("fees", True) else NO_FEES,
            time.time,
        )
        self._pulse = asyncio.get_running_loop().create_task(self._live())

    async def close(self) -> None:
        if self._pulse is not None:
            self._pulse.cancel()
            self._pulse = None
        if self._borrowed is not None:
            self._borrowed.close()
            self._borrowed = None
        if self._exchange is not None:
            self._exchange.close()
            self._exchange = None

    async def _live(self) -> None:
        """Fills and expires resting orders while nobody asks, and tells the gateway."""
        failing = False
        while True:
            await asyncio.sleep(PULSE_BORROWED if self.quotes_from else PULSE)
            try:
                if self._borrowed is not None:
                    for region, ticker in self._open.awaited():
                        self._borrowed.refresh(region, ticker)
                self._open.advance()
                self._tell()
                failing = False
            except Exception:  # reads go on; what changes something says what is wrong
                if not failing:
                    log.exception("paper account: resting orders could not be looked at")
                failing = True

    @property
    def _open(self) -> PaperExchange:
        if self._exchange is None:
            raise BrokerUnavailable("The paper account is closed")
        return self._exchange

    def _tell(self) -> None:
        changes: Changes = self._open.changes()
        if changes.orders:
            self.report(*map(_report, changes.orders))
            self.stale()
        if changes.fills:
            self.report_fills(*map(_fill, changes.fills))

    # --- operations -------------------------------------------------------------------------
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
        await self._fresh_price(contract)
        order = self._open.place(
            contract.region,
            contract.ticker,
            direction,
            order_type,
            qty,
            None if price is None else Decimal(str(price)),
            time_in_force,
            lifecycle,
            str(kwargs.get("mark", "")),
        )
        self._tell()
        return order.order_id

    async def cancel_order(self, order_id: str) -> None:
        self._open.cancel(order_id)
        self._tell()

    async def order(self, order_id: str) -> OrderReport:
        return _report(self._open.order(order_id))

    async def recent_orders(self) -> list[OrderReport]:
        return [_report(order) for order in self._open.orders(time.time() - REMEMBERED)]

    def listed_since(self, now: datetime) -> datetime:
        return now - timedelta(seconds=REMEMBERED)

    async def fills(self, order_id: str) -> list[Fill]:
        return [_fill(fill) for fill in self._open.fills(order_id)]

    async def positions(self) -> list[Position]:
        return [
            Position(
                self.broker_name,
                self.broker_display,
                Contract(TradeType.Securities, held.ticker, held.region),
                Unit.Share,
                held.currency,
                held.qty,
            )
            for held in self._open.holdings()
        ]

    async def cash(self, currency: str = "USD") -> Cash:
        return Cash(currency, self._open.spendable(currency))

    async def ping(self) -> bool:
        return self._exchange is not None

    async def quote(self, contract: Contract) -> Quote:
        if self._borrowed is not None:
            return await self._borrowed_quote(self._borrowed, contract)
        now = time.time()
        region, ticker = contract.region, contract.ticker
        latest, day = made_up_price(region, ticker, now), day_prices(region, ticker, now)
        return Quote(
            contract,
            CURRENCIES[region],
            any(self._hours.trades(region, lifecycle, now) for lifecycle in _ALWAYS),
            latest,
            day.pre_close,
            day.open_price,
            day.high_price,
            day.low_price,
            datetime.fromtimestamp(now, UTC),
        )

    async def market_status(self) -> Mapping[Any, Mapping[str, MarketStatus]]:
        now = time.time()
        return {
            "securities": {
                region: MarketStatus(region, *self._hours.status(region, now)) for region in REGIONS
            }
        }

    async def _borrowed_quote(self, borrowed: BorrowedPrices, contract: Contract) -> Quote:
        try:
            return await asyncio.wrap_future(borrowed.ask(contract))
        except BrokerUnavailable as error:
            # As it is, it would say that the paper account itself has lost its connection.
            raise Busy(
                f"Quotes come from another instance, which has none now: {error.text}",
                retry_after=error.retry_after or 1,
            ) from None

    async def _fresh_price(self, contract: Contract) -> None:
        """Waits a moment for the other instance's price; without one the exchange refuses a market
        order and lets a limit order rest."""
        if self._borrowed is None:
            return
        asked = self._borrowed.refresh(contract.region, contract.ticker)
        if asked is not None:
            waiting = asyncio.wrap_future(asked)
            await asyncio.wait([waiting], timeout=BORROWED_WAIT)
            if not waiting.cancel() and not waiting.cancelled():
                waiting.exception()  # noted: the exchange sees that there is no price


def _initial_cash(given: Any) -> dict[str, Decimal]:
    if not isinstance(given, Mapping):
        raise ValueError('Paper: cash must be a table like {"USD": 100000}')
    amounts = {currency: Decimal(0) for currency in INITIAL_CASH}
    for currency, amount in given.items():
        if currency not in amounts:
            raise ValueError(f"Paper: no currency {currency!r}, only {', '.join(INITIAL_CASH)}")
        if isinstance(amount, bool) or not isinstance(amount, int | float | Decimal):
            raise ValueError(f"Paper: cash in {currency} must be a number")
        amounts[currency] = Decimal(str(amount))
        if not amounts[currency].is_finite() or amounts[currency] < 0:
            raise ValueError(f"Paper: cash in {currency} must be 0 or more")
    return amounts


def _time(epoch: float) -> datetime:
    return datetime.fromtimestamp(epoch, UTC)


def _report(order: PaperOrder) -> OrderReport:
    failed = order.status in (Status.REJECTED, Status.EXPIRED)
    return OrderReport(
        Order(
            order.order_id,
            order.currency,
            order.qty,
            order.filled,
            order.avg_price,
            (order.reason or order.status.value) if failed else "",
            order.status is Status.CANCELED,
        ),
        mark=order.mark,
        contract=Contract(TradeType.Securities, order.ticker, order.region),
        direction=order.direction,
        order_type=order.order_type,
        price=order.price,
        time_in_force=order.time_in_force,
        lifecycle=order.lifecycle,
        time=_time(order.placed),
    )


def _fill(fill: PaperFill) -> Fill:
    return Fill(str(fill.number), fill.order_id, fill.qty, fill.price, _time(fill.time))
