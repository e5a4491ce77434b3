"""Interactive Brokers through TWS or IB Gateway, with ib_insync or its successor ib_async.

Positions and cash are asked for when they are wanted; orders are kept as TWS tells them
(`ib_book.py`), over one connection after another (`ib_session.py`). Sources: the SDKs' own files,
interactivebrokers.github.io/tws-api. `docs/brokers/interactive_brokers.md` has the tables for
people.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from httptrading.brokers.base import BaseBroker, combine
from httptrading.brokers.ib_answers import (
    CANCEL_REFUSED,
    NO_SUCH_CONTRACT,
    SURELY_REFUSED,
    Ticks,
    balance,
    ledger,
    refusal,
)
from httptrading.brokers.ib_book import (
    CANCEL_CONFIRMED,
    DEAD_IF_REFUSED,
    OVERNIGHT_VENUE,
    BookedOrder,
    is_refusal,
    region_of,
    to_symbol,
    to_ticker,
)
from httptrading.brokers.ib_session import DOUBT_GRACE, UNANSWERED, Ears, TwsSession
from httptrading.brokers.registry import broker_register
from httptrading.brokers.trading_hours import Hours, hours, market_status
from httptrading.errors import (
    BrokerUnavailable,
    Busy,
    HttpTradingError,
    OrderNotFound,
    OutcomeUnknown,
    Rejected,
    TimedOut,
)
from httptrading.model import (
    Cash,
    Contract,
    Fill,
    Lifecycle,
    MarketStatus,
    OrderReport,
    OrderType,
    Position,
    Quote,
    TimeInForce,
    TradeType,
    Unit,
    exact,
)
from httptrading.tickers import cn_exchange

log = logging.getLogger("httptrading.interactive_brokers")

VENUES: dict[str, tuple[tuple[str, str], ...]] = {
    "US": (("SMART", "USD"),),
    "HK": (("SEHK", "HKD"), ("SEHK", "")),  # RMB counters are listed in CNH
    "SH": (("SEHKNTL", "CNH"), ("SEHKSTAR", "CNH")),
    "SZ": (("SEHKSZSE", "CNH"), ("CHINEXT", "CNH")),
}
"""Where to look for a security, in this order: (exchange, currency). A-shares trade through China
Connect, in CNH, and are not routed by SMART."""

WIRE_TYPES = {OrderType.Limit: "LMT", OrderType.Market: "MKT"}

MARKETS = {"US": "SPY", "HK": "00700", "CN": "600519"}
"""The stock whose hours stand for a market's."""

CURRENCY_NAMES = {"CNY": ("CNY", "CNH")}
"""IB keeps renminbi as CNH; the answer names it, so that nobody is told of 0 CNY."""

# Seconds.
QUOTE_LIMIT = 5.0
HALTED_GRACE = 0.25  # for the halted tick once all prices are there
ADVICE_GRACE = 1.0  # for the next word after "part of it is not subscribed"
HOURS_AGAIN = 60.0  # between questions for the hours of a market that IB had none for
CONNECT_LIMIT = 14.0  # below the worker's own limit, so that the sentence about it is ours

DETAILS_AT_ONCE = 20
"""Of the 45 messages a second that the SDK lets through (TWS: 50)."""


@broker_register("interactiveBrokers", "盈透证券")
class InteractiveBrokers(BaseBroker):
    """Arguments: `host`, `port`, `timeout` (seconds to connect), `client_id`, `account_id`, and
    `timezone`, that of TWS, where it is not this machine's."""

    sdk = "ib-insync"
    arguments = frozenset({"host", "port", "timeout", "client_id", "account_id", "timezone"})
    quote_regions = frozenset(MARKETS)
    combinations = (
        combine(("US", "HK"), OrderType, TimeInForce, [Lifecycle.RTH])
        | combine(["US"], [OrderType.Limit], TimeInForce, [Lifecycle.ETH])
        | combine(["US"], [OrderType.Limit], [TimeInForce.DAY], [Lifecycle.OVERNIGHT])
        # China Connect takes limit orders only (HKEX).
        | combine(["CN"], [OrderType.Limit], TimeInForce, [Lifecycle.RTH])
    )
    ages = {"market_status": 5.0, "quote": 1.0}

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        given = self.broker_args
        self._host = str(given.get("host", "127.0.0.1"))
        self._port = _integer(given, "port", 7497, 1, 65535)
        self._client_id = _integer(given, "client_id", 1, 0, 2**31 - 1)
        self._timeout = min(float(given.get("timeout", 8)), CONNECT_LIMIT)
        if not self._timeout > 0:
            raise ValueError("InteractiveBrokers: timeout must be a positive number of seconds")
        self._account = str(given.get("account_id") or "")
        self._zone = _zone(given.get("timezone"))
        self._tws: TwsSession | None = None

    # --- the connection ---------------------------------------------------------------------
    async def connect(self) -> None:
        self._contracts: dict[tuple[str, str], Any] = {}
        self._regions: dict[int, str | None] = {}  # conId → region, of positions
        self._hours: dict[str, Hours | None] = {}
        self._hours_day = ""
        self._hours_again = 0.0
        ears = Ears(
            on_lost=self.lost,
            on_order=lambda booked: self.report(booked.report()),
            on_fill=self._on_fill,
        )
        self._tws = TwsSession(
            self._host,
            self._port,
            self._client_id,
            self._timeout,
            self._account,
            self._zone,
            ears,
        )
        await self._tws.open()

    async def close(self) -> None:
        if self._tws is not None:
            await self._tws.close()

    def abort(self) -> None:
        if self._tws is not None:
            self._tws.abort()

    def _on_fill(self, fill: Fill) -> None:
        self.report_fills(fill)
        self.stale()

    def _open(self) -> TwsSession:
        if self._tws is None:
            raise BrokerUnavailable("The connection to TWS is broken; nothing was sent")
        self._tws.client()
        return self._tws

    # --- contracts ----------------------------------------------------------------------------
    async def _find(self, contract: Contract) -> Any:
        """The SDK's contract of a security; Rejected for an unknown or an ambiguous one."""
        key = (contract.region, contract.ticker)
        if key not in self._contracts:
            place = contract.region
            if place == "CN":
                place = cn_exchange(contract.ticker)
            for exchange, currency in VENUES[place]:
                found = await self._details(
                    symbol=to_symbol(contract.region, contract.ticker),
                    exchange=exchange,
                    currency=currency,
                )
                if found:
                    self._contracts[key] = _the_only(contract, found)
                    break
            else:
                raise Rejected(f"IB knows no stock {contract.ticker} in region {contract.region}")
        return self._contracts[key]

    async def _details(self, **fields: Any) -> list[Any]:
        """ContractDetails of all stocks that fit."""
        tws = self._open()
        asked = tws.sdk.Contract(secType="STK", **fields)
        found = await tws.ask(
            lambda: tws.ib.reqContractDetailsAsync(asked), absent=NO_SUCH_CONTRACT
        )
        return list(found or ())

    def _routed(self, found: Any, exchange: str) -> Any:
        """The contract as an order or a quote request names it."""
        return self._open().sdk.Contract(
            conId=found.conId,
            secType="STK",
            symbol=found.symbol,
            currency=found.currency,
            primaryExchange=found.primaryExchange,
            exchange=exchange,
        )

    # --- orders -------------------------------------------------------------------------------
    async def place_order(
        self,
        contract: Contract,
        order_type: OrderType,
        time_in_force: TimeInForce,
        lifecycle: Lifecycle,
        direction: str,
        qty: int,
        price: float | None = None,
        *,
        mark: str = "",
        **kwargs: Any,
    ) -> str:
        """Returns the permId, which TWS says with its first message about the order."""
        with _nothing_sent():
            found = await self._find(contract)
        tws = self._open()
        order = tws.sdk.Order(
            orderId=tws.client().getReqId(),
            action=direction,
            totalQuantity=qty,
            orderType=WIRE_TYPES[order_type],
            tif=time_in_force.value,
            account=tws.account,
            orderRef=mark,
            outsideRth=lifecycle is Lifecycle.ETH,
        )
        if price is not None:
            # As text, which both SDKs pass on as it is: a float would go out as `1e-05`.
            order.lmtPrice = format(Decimal(repr(price)), "f")
        overnight = lifecycle is Lifecycle.OVERNIGHT
        exchange = OVERNIGHT_VENUE if overnight else found.exchange
        tws.book.sending(order.orderId, mark)
        with tws.hearing(order.orderId) as heard:
            try:
                tws.ib.placeOrder(self._routed(found, exchange), order)
            except ConnectionError:
                raise BrokerUnavailable("The connection to TWS is broken") from None
            return await self._placed(tws, order.orderId, heard)

    async def _placed(self, tws: TwsSession, api_id: int, heard: list[tuple[int, str]]) -> str:
        """Waits for TWS to take or refuse an order that was sent; its permId."""
        while True:
            booked, refused = _taken(tws, api_id), _refused(heard)
            # A reason for the end may follow it; 202 says that there is none.
            is_confirmed = any(code == CANCEL_CONFIRMED for code, _ in heard)
            is_doubtful = booked is not None and (
                booked.is_doubtful or booked.status in DEAD_IF_REFUSED and not is_confirmed
            )
            if booked is not None and booked.perm_id and not is_doubtful:
                return str(booked.perm_id)
            if booked is None and refused is not None and refused[0] in SURELY_REFUSED:
                raise refusal(*refused)
            _still_open(tws)
            if not await tws.change(DOUBT_GRACE if is_doubtful or refused is not None else None):
                break
        try:
            await tws.list_orders()
        except HttpTradingError:
            raise OutcomeUnknown("TWS has not said what became of the order") from None
        refused = _refused(heard)
        if _taken(tws, api_id) is None and refused is not None:
            raise refusal(*refused)
        return await self._numbered(tws, api_id)

    async def _numbered(self, tws: TwsSession, api_id: int) -> str:
        """The permId of an order that TWS's list has, or had before it; TWS may say it later."""
        while (booked := _taken(tws, api_id)) is not None:
            if booked.perm_id:
                return str(booked.perm_id)
            _still_open(tws)
            await tws.change()
        raise OutcomeUnknown("TWS has not said what became of the order")

    async def cancel_order(self, order_id: str) -> None:
        with _nothing_sent():
            booked = await self._known(order_id)
        tws = self._open()
        if booked.is_final:
            raise Rejected(f"Order {order_id} is finished: {_end(booked)}")
        if booked.wire is None and not booked.api_id:
            raise Rejected(f"TWS lists only executions of order {order_id}: it cannot be cancelled")
        if not booked.api_id or booked.client_id != tws.client_id:
            owner = f"API client {booked.client_id}" if booked.api_id else "somebody in TWS itself"
            raise Rejected(
                f"Order {order_id} was placed by {owner}; IB lets only its owner cancel it "
                f"(here: API client {tws.client_id})"
            )
        with tws.hearing(booked.api_id) as heard:
            try:
                tws.client().cancelOrder(booked.api_id)
            except ConnectionError:
                raise BrokerUnavailable("The connection to TWS is broken") from None
            while not (booked.is_canceled or booked.status == "PendingCancel"):
                for code, text in heard:
                    if code == CANCEL_CONFIRMED:
                        return
                    if code in CANCEL_REFUSED or is_refusal(code):
                        # It may have ended without a word: there is not one for every change
                        # (interactivebrokers.github.io/tws-api/order_submission.html).
                        with suppress(HttpTradingError):
                            await tws.list_orders()
                        if booked.is_canceled:
                            return
                        raise refusal(code, text)
                if booked.is_final:
                    raise Rejected(
                        f"Order {order_id} ended before the cancellation: {_end(booked)}"
                    )
                if not tws.is_open:
                    raise OutcomeUnknown("TWS closed the connection before it confirmed the cancel")
                await tws.change()

    async def order(self, order_id: str) -> OrderReport:
        return (await self._known(order_id)).report()

    async def _known(self, order_id: str) -> BookedOrder:
        """An order of this account, as current as TWS tells it.

        Pushes keep our own orders current, and finished ones do not change. Others are asked for:
        TWS pushes them to their own client only.
        """
        tws = self._open()
        perm_id = int(order_id) if order_id.isascii() and order_id.isdigit() else 0
        booked = tws.book.get(perm_id)
        if booked is not None and booked.wire is not None and tws.is_ours(booked):
            if booked.is_final or (booked.api_id and booked.client_id == tws.client_id):
                return booked
        listed = await tws.list_orders()
        booked = tws.book.get(perm_id)
        if booked is None or booked not in listed or not tws.shows(booked):
            raise OrderNotFound(f"TWS does not know an order {order_id} of this account")
        return booked

    def listed_since(self, now: datetime) -> datetime:
        """TWS lists the executions and the finished orders of its own day only (reqExecutions,
        reqCompletedOrders)."""
        return now.astimezone(self._zone).replace(hour=0, minute=0, second=0, microsecond=0)

    async def recent_orders(self) -> list[OrderReport]:
        """One without its permanent id yet is reported by its mark alone, so that it is not held
        to be missing."""
        tws = self._open()
        return [booked.report() for booked in await tws.list_orders() if tws.shows(booked)]

    async def fills(self, order_id: str) -> list[Fill]:
        booked = await self._known(order_id)
        tws = self._open()
        await tws.list_executions()
        return tws.book.fills(booked.perm_id)

    # --- the account --------------------------------------------------------------------------
    async def positions(self) -> list[Position]:
        """Stocks of the three markets, asked for each time, so that an empty list is TWS's own."""
        tws = self._open()
        held = await tws.positions()
        # The last word on each: one that is closed meanwhile is told again, as 0.
        latest = {each.contract.conId: each for each in held if each.account == tws.account}
        stocks = [
            each for each in latest.values() if each.contract.secType == "STK" and each.position
        ]
        await self._learn_regions([each.contract for each in stocks])
        return [
            Position(
                broker=self.broker_name,
                broker_display=self.broker_display,
                contract=Contract(
                    TradeType.Securities, to_ticker(region, each.contract.symbol), region
                ),
                unit=Unit.Share,
                currency=each.contract.currency,
                qty=exact(each.position),
            )
            for each in stocks
            if (region := self._regions[each.contract.conId])
        ]

    async def _learn_regions(self, contracts: list[Any]) -> None:
        """The message about a position has no primary exchange; its contract details have."""
        some = asyncio.Semaphore(DETAILS_AT_ONCE)

        async def learn(contract: Any) -> None:
            async with some:
                found = await self._details(conId=contract.conId)
            primary = found[0].contract.primaryExchange if found else ""
            region = region_of(contract.currency, primary, contract.exchange)
            self._regions[contract.conId] = region
            if region is None:
                log.warning("a position is in none of the three markets and is not shown")

        missing = [each for each in contracts if each.conId not in self._regions]
        await asyncio.gather(*map(learn, missing))

    async def cash(self, currency: str = "USD") -> Cash:
        """The ledger's cash balance in one currency, whatever the base currency is."""
        tws = self._open()
        wrapper, client = tws.ib.wrapper, tws.client()
        wrapper.acctSummary.clear()
        request_id = client.getReqId()

        def request() -> Awaitable[Any]:
            answer: Awaitable[Any] = wrapper.startReq(request_id)
            client.reqAccountSummary(request_id, "All", "$LEDGER:ALL")
            return answer

        try:
            await tws.ask(request)
        finally:
            if tws.is_open:  # TWS allows two such subscriptions
                client.cancelAccountSummary(request_id)
        balances = ledger(wrapper.acctSummary.values(), tws.account)
        if not balances:
            raise TimedOut("TWS has not loaded the account's cash ledger yet")
        names = CURRENCY_NAMES.get(currency, (currency,))
        name = next((name for name in names if name in balances), currency)
        return Cash(name, balance(name, balances))

    # --- the market ---------------------------------------------------------------------------
    async def ping(self) -> bool:
        return await self._open().check_alive()

    async def quote(self, contract: Contract) -> Quote:
        found = await self._find(contract)
        tws = self._open()
        request_id = tws.client().getReqId()
        wire = self._routed(found, found.exchange)
        with tws.receiving(request_id) as ticks:
            tws.client().reqMktData(request_id, wire, "", True, False, [])
            await self._receive(tws, ticks)
        refused = ticks.error or (None if ticks.prices else ticks.advice)
        if refused:
            raise refusal(*refused)
        if not ticks.is_ended and not ticks.prices:
            raise TimedOut(f"IB sent no quote of {contract.ticker} within {QUOTE_LIMIT:g} s")
        return ticks.quote(contract, found.currency, datetime.now(UTC))

    async def _receive(self, tws: TwsSession, ticks: Ticks) -> None:
        """Until the quote is there: TWS ends a snapshot after up to 11 s, its parts come sooner."""
        loop = asyncio.get_running_loop()
        end = loop.time() + QUOTE_LIMIT
        while not (ticks.is_ended or ticks.error):
            if not tws.is_open:
                raise BrokerUnavailable("TWS closed the connection")
            if ticks.is_complete:
                if ticks.is_halted is not None:
                    return
                end = min(end, loop.time() + HALTED_GRACE)
            elif ticks.advice and not ticks.prices:
                end = min(end, loop.time() + ADVICE_GRACE)
            if not await tws.change(max(0.0, end - loop.time())):
                return

    async def market_status(self) -> dict[TradeType, dict[str, MarketStatus]]:
        """From contract hours and TWS's own clock, so that ours may be wrong."""
        tws = self._open()
        now, clock = await tws.current_time(), asyncio.get_running_loop().time()
        if self._hours_day != now.date().isoformat() or clock >= self._hours_again:
            regions = (*MARKETS, OVERNIGHT_VENUE)
            found = await asyncio.gather(*map(self._learn_hours, regions))
            self._hours = dict(zip(regions, found, strict=True))
            self._hours_day = now.date().isoformat()
            # 200 ("no security definition") may be so for a moment: while the farm connects (2157).
            self._hours_again = clock + HOURS_AGAIN if None in found else math.inf
        night = self._hours[OVERNIGHT_VENUE]
        return {
            TradeType.Securities: {
                region: market_status(region, now, self._hours[region], night) for region in MARKETS
            }
        }

    async def _learn_hours(self, market: str) -> Hours | None:
        region = "US" if market == OVERNIGHT_VENUE else market
        ticker = MARKETS[region]
        try:
            found = await self._find(Contract(TradeType.Securities, ticker, region))
        except Rejected:
            return None
        exchange = market if market == OVERNIGHT_VENUE else found.exchange
        details = await self._details(conId=found.conId, exchange=exchange)
        for each in details:
            with suppress(ValueError):
                name = f"{found.symbol}@{exchange}"
                return hours(name, region, each.timeZoneId, each.tradingHours, each.liquidHours)
        return None


@contextmanager
def _nothing_sent() -> Iterator[None]:
    """What comes before sending may take too long: that is no unknown outcome, and whether TWS is
    still there is the session's to find out (`TwsSession.doubt`)."""
    try:
        yield
    except asyncio.CancelledError:
        raise Busy(f"{UNANSWERED}; nothing was sent", retry_after=1) from None
    except TimedOut as late:
        raise Busy(f"{late.text}; nothing was sent", retry_after=1) from None


def _taken(tws: TwsSession, api_id: int) -> BookedOrder | None:
    """What TWS has said of an order that was sent; Rejected when that is its end."""
    booked = tws.book.own(api_id)
    if booked is not None and booked.is_refused:
        raise Rejected(booked.error_reason)
    return booked


def _still_open(tws: TwsSession) -> None:
    if not tws.is_open:
        raise OutcomeUnknown("TWS closed the connection before it confirmed the order")


def _refused(heard: list[tuple[int, str]]) -> tuple[int, str] | None:
    return next((error for error in heard if is_refusal(error[0])), None)


def _the_only(contract: Contract, details: list[Any]) -> Any:
    """The one contract among ContractDetails; Rejected with the candidates when there are more."""
    found = {each.contract.conId: each for each in details}
    if len(found) > 1:
        candidates = "; ".join(
            f"{each.contract.primaryExchange or each.contract.exchange} "
            f"{each.contract.currency} ({each.longName})"
            for each in found.values()
        )
        raise Rejected(f"{contract.ticker} is ambiguous at IB: {candidates}")
    [only] = found.values()
    return only.contract


def _end(booked: BookedOrder) -> str:
    order = booked.order()
    return "filled" if order.is_filled else "cancelled" if order.is_canceled else "refused"


def _zone(name: Any) -> ZoneInfo | None:
    """None: this machine's."""
    try:
        return ZoneInfo(str(name)) if name else None
    except (OSError, ValueError, ZoneInfoNotFoundError):
        raise ValueError(
            "InteractiveBrokers: timezone must be a name like Asia/Hong_Kong"
        ) from None


def _integer(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    text = str(given.get(name, default))
    if not (text.isascii() and text.isdigit() and least <= int(text) <= most):
        raise ValueError(f"InteractiveBrokers: {name} must be a number from {least} to {most}")
    return int(text)
