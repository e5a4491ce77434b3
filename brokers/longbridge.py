"""LongBridge (长桥证券): trading by LongPort's signed REST, quotes and order pushes by its SDK.

Three connections, each in a child process of its own, because the SDK holds the GIL in every call:
"trade" needs no SDK (why: `longbridge_rest`), so a silent LongBridge cannot freeze it; "quote" has
the SDK's QuoteContext; "push" its TradeContext, which tells what becomes of orders.
Facts and their sources: docs/brokers/longbridge.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

from httptrading.brokers import longbridge_sdk
from httptrading.brokers.base import BaseBroker, Window, combine
from httptrading.brokers.longbridge_hours import (
    ZONES,
    Calendar,
    Period,
    parse_market_codes,
    session_state,
)
from httptrading.brokers.longbridge_renewal import Account, Renewer
from httptrading.brokers.longbridge_rest import (
    UNREADABLE,
    LongPortRest,
    NoAnswer,
    NotSent,
    Query,
    Refused,
    address,
)
from httptrading.brokers.longbridge_token import (
    US_ACCOUNT,
    US_PREFIX,
    Token,
    TokenFile,
    TokenFileError,
)
from httptrading.brokers.longbridge_words import (
    OPEN_WORDS,
    UNKNOWN_ORDER_CODE,
    CodedRejection,
    asked_currency,
    name_of,
    parse_cash,
    parse_fill,
    parse_listed,
    parse_order,
    parse_positions,
    parse_readable,
    push_row,
    refusal,
    rows_of,
    to_order_body,
    to_symbol,
    usual_currency,
)
from httptrading.brokers.registry import broker_register
from httptrading.errors import (
    BrokerError,
    BrokerUnavailable,
    Busy,
    OrderNotFound,
    OutcomeUnknown,
    RateLimited,
    Rejected,
    TimedOut,
)
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
    Unit,
)

log = logging.getLogger("httptrading.longbridge")

# --- tables -----------------------------------------------------------------------------------
ADDRESSES = {
    "http_url": "https://openapi.longportapp.{0}",
    "quote_ws_url": "wss://openapi-quote.longportapp.{0}/v2",
    "trade_ws_url": "wss://openapi-trade.longportapp.{0}/v2",
}
"""The SDK's own defaults (rust/src/config.rs); `.cn` where LONGPORT_REGION is CN, else `.com`."""

GAP = 0.02
"""Seconds between two trade calls, at least (LongPort's documentation, "Rate Limit")."""

CALLS_TO_CONNECT = 5
"""Quote calls that the SDK makes by itself while it connects: the quote profile, and the trading
days of four markets (rust/src/quote/core.rs)."""

PROBE_SECONDS = 4.0
UNFAMILIAR_SECONDS = 1.0  # how long LongPort may not know a new order (longbridge/openapi issue #9)
PLACED_KEPT = 10_000
WATCH_SECONDS = 0.5
RENEWAL_LOOK_SECONDS = 5.0
LISTING_DAYS = timedelta(days=8)  # a gateway that was down over a long weekend finds its orders
HISTORY = timedelta(days=89)  # one history request spans 90 days at most


ORDER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""LongPort documents a text; so far all have been 18 digits."""

NOT_INTELLIGIBLE = "LongBridge gave no intelligible answer; try again"


# --- the broker -------------------------------------------------------------------------------
@broker_register("longBridge", "长桥证券")
class LongBridge(BaseBroker):
    """Arguments: `app_key`, `app_secret`, `token_file`, `auto_refresh_token` (False), and for
    other regions `http_url`, `quote_ws_url`, `trade_ws_url`."""

    connections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "trade": (
            *("ping", "cash", "positions", "order", "recent_orders", "fills"),
            *("place_order", "cancel_order"),
        ),
        "quote": ("quote", "market_status"),
        "push": (),
    }
    isolation = "process"
    booked_within = 15.0  # LongPort does not say; its SDK waits 30 s (httpclient/src/request.rs)
    sdk: ClassVar[str] = "longport"
    arguments = frozenset({"app_key", "app_secret", "token_file", "auto_refresh_token", *ADDRESSES})
    windows: ClassVar[Mapping[str, Window]] = {
        "trade": Window(30, 30.0, gap=GAP, kept=2, kept_for_orders=4),
        "quote": Window(10, 1.0),
    }
    costs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **dict.fromkeys(("cash", "positions", "order", "recent_orders", "fills"), ("trade",)),
        **dict.fromkeys(("place_order", "cancel_order"), ("trade",)),
        **dict.fromkeys(("quote", "market_status"), ("quote",)),
    }
    # All trade calls share one window: cash, positions and one order polled at this pace take 22
    # of the 24 slots that are for reads. Pushes and the gateway's own changes make the memory stale
    # before that.
    ages: ClassVar[Mapping[str, float]] = {
        "cash": 4.0,
        "positions": 4.0,
        "order": 4.0,
        "recent_orders": 6.0,
    }
    combinations = (
        combine(["US"], [OrderType.Limit], TimeInForce, Lifecycle)
        | combine(["US", "HK"], [OrderType.Market], [TimeInForce.DAY], [Lifecycle.RTH])
        | combine(["HK"], [OrderType.Limit], TimeInForce, [Lifecycle.RTH])
    )
    quote_regions: ClassVar[frozenset[str] | None] = frozenset(ZONES)

    read_seconds: ClassVar[float] = 5.0
    """A read that hangs is given up then, whatever its deadline: cancellations wait behind it."""

    def __init__(
        self,
        broker_args: Mapping[str, Any] | None = None,
        instance_id: str | None = None,
        tokens: Iterable[str] | None = None,
    ) -> None:
        super().__init__(broker_args, instance_id, tokens)
        given = self.broker_args
        missing = [name for name in ("app_key", "app_secret", "token_file") if not given.get(name)]
        if missing:
            raise ValueError(f"LongBridge needs {', '.join(missing)} in its arguments")
        self._app_key, self._app_secret = str(given["app_key"]), str(given["app_secret"])
        for name in ("app_key", "app_secret"):
            if not re.fullmatch(r"[!-~]+", str(given[name])):  # what HTTP carries in a header
                raise ValueError(f"LongBridge's {name} has a character that no {name} has")
            if str(given[name]).startswith(US_PREFIX):
                raise ValueError(f"LongBridge's {name} is of {US_ACCOUNT}")
        self._renews = given.get("auto_refresh_token", False)
        if not isinstance(self._renews, bool):
            raise ValueError("LongBridge's auto_refresh_token is true or false")
        path = Path(str(given["token_file"])).expanduser().absolute()
        top_level = "cn" if os.environ.get("LONGPORT_REGION", "").upper() == "CN" else "com"
        self._urls = {
            name: _url(name, str(given.get(name) or default.format(top_level)))
            for name, default in ADDRESSES.items()
        }
        self._file = TokenFile(path, self._app_key)
        self._rest: LongPortRest | None = None
        self._context: Any = None
        self._tasks: list[asyncio.Task[None]] = []
        self._renewer: Renewer | None = None
        self._periods: dict[str, list[Period]] = {}
        self._periods_day: date | None = None
        self._calendars: dict[str, Calendar] = {}
        self._currencies: dict[str, str] = {}
        self._has_market_codes = True
        self._placed: deque[str] = deque(maxlen=PLACED_KEPT)

    def account_key(self) -> str:
        return self._key(str(self._file.path.resolve()))

    def window_key(self, window: str) -> str:
        """Quotes are limited for all accounts of a customer together (open.longportapp.com/docs/qa/
        general, Q6); a live and a paper account have one app key and two tokens (Q3)."""
        return self._key() if window == "quote" else self.account_key()

    def _key(self, *parts: str) -> str:
        whole = (self._app_key, *parts, self._urls["http_url"])
        return f"{self.broker_name}:{hashlib.sha256(repr(whole).encode()).hexdigest()}"

    def check_contract(self, contract: Contract) -> None:
        super().check_contract(contract)
        to_symbol(contract)

    # --- the connection ---------------------------------------------------------------------
    async def connect(self) -> None:
        self._file = TokenFile(self._file.path, self._app_key)  # this copy's own view of it
        token = self._usable_token(self._file.read)
        self._tasks, self._calendars, self._currencies = [], {}, {}
        self._placed = deque(maxlen=PLACED_KEPT)
        self._rest = LongPortRest(
            self._urls["http_url"],
            self._app_key,
            self._app_secret,
            lambda: self._file.current().text,
        )
        # Before the SDK, which would wait for a silent LongBridge for 30 s.
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self.ping()
        except (TimeoutError, TimedOut):
            raise BrokerUnavailable("LongBridge does not answer") from None
        if self.connection == "trade":
            account = Account(self._app_key, self._app_secret, self._urls["http_url"])
            self._renewer = Renewer(self._file, account, renews=self._renews)
            self._watch(self._renewer.look, RENEWAL_LOOK_SECONDS)
        elif self.connection == "quote":
            self._context = longbridge_sdk.quote_context(self._access(token))
            for _ in range(CALLS_TO_CONNECT):
                await self._take("quote", patience=2.0)
        else:
            self._context = longbridge_sdk.push_context(self._access(token), self._on_order_changed)
            self._watch(self._look_at_push)
            await self._report_today()
        self._watch(lambda: self._look_at_token(token))

    def _access(self, token: Token) -> longbridge_sdk.Access:
        return longbridge_sdk.Access(
            self._app_key, self._app_secret, token.text, self._urls, self._file.path
        )

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._renewer is not None:
            await self._renewer.finish(1.5)
        self._context = None  # dropping it closes its sockets
        if self._rest is not None:
            self._rest.close()

    def _watch(self, look: Callable[[], Awaitable[None]], pause: float = WATCH_SECONDS) -> None:
        async def forever() -> None:
            while True:
                try:
                    await look()
                except Exception as error:
                    log.error("LongBridge: a look failed (%s)", type(error).__name__)
                await asyncio.sleep(pause)

        self._tasks.append(asyncio.get_running_loop().create_task(forever()))

    async def _look_at_token(self, connected_with: Token) -> None:
        """A bad file ends the connection, a new token ends the SDK's (REST simply takes it)."""
        try:
            token = self._file.current()
        except TokenFileError as error:
            self.lost(str(error))
            return
        if token.text != connected_with.text and self.connection != "trade":
            self.lost("The LongBridge token was replaced: connecting with the new one")

    async def _look_at_push(self) -> None:
        if self._context.is_broken:
            # What was pushed meanwhile is lost: the next copy lists today's orders.
            self.lost("The connection for LongBridge's order pushes broke")

    async def _report_today(self) -> None:
        """What changed while no pushes came."""
        try:
            await self._take("trade", patience=5.0)
        except RateLimited:
            log.warning("no free slot to list today's orders after connecting LongBridge's pushes")
            return
        data = await self._get("/v1/trade/order/today")
        try:
            rows = rows_of(data, "orders")
        except UNREADABLE:
            log.error("LongBridge's list of today's orders could not be read; pushes work")
            return
        self.report(*parse_readable(rows))

    def _on_order_changed(self, event: Any) -> None:
        """On a thread of the SDK, which swallows whatever is raised here."""
        try:
            self.report(parse_order(push_row(event)))
        except Exception as error:
            log.error("an order push could not be read (%s)", type(error).__name__)
            self.stale()

    # --- the token ----------------------------------------------------------------------------
    def _usable_token(self, read: Callable[[], Token]) -> Token:
        try:
            return read()
        except TokenFileError as error:
            raise BrokerUnavailable(str(error)) from None

    def _holds_the_only_token(self) -> bool:
        """Then BrokerUnavailable, which ends this connection, would lose it."""
        return self._renewer is not None and self._renewer.holds_the_only_token

    # --- asking -------------------------------------------------------------------------------
    async def _get(self, path: str, query: Query | None = None) -> Any:
        """A read's `data`."""
        try:
            async with asyncio.timeout(self.read_seconds):
                return await self._ask("GET", path, query)
        except TimeoutError:
            raise TimedOut(f"LongBridge did not answer within {self.read_seconds:g} s") from None
        except NoAnswer:
            raise TimedOut(NOT_INTELLIGIBLE) from None

    async def _change(
        self, method: str, query: Query | None, body: Mapping[str, str] | None
    ) -> Any:
        """The `data` of a placement or a cancellation."""
        try:
            return await self._ask(method, "/v1/trade/order", query, body)
        except NoAnswer:
            raise OutcomeUnknown("Sent to LongBridge, but no intelligible answer came") from None

    async def _ask(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Mapping[str, str] | None = None,
    ) -> Any:
        used = self._usable_token(self._file.current)
        try:
            return await self._send(method, path, query, body)
        except Refused as refused:
            if refused.status == 401 and (
                self._holds_the_only_token()
                or self._usable_token(self._file.current).text != used.text
            ):  # the old token died while this was under way: the new one is here, or coming
                raise Busy(
                    "LongBridge's token is being renewed; nothing was sent", retry_after=1
                ) from None
            raise refusal(refused, self._file.path) from None

    async def _send(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Mapping[str, str] | None = None,
    ) -> Any:
        """The `data` of an answer, or Refused or NoAnswer as they are."""
        assert self._rest is not None
        try:
            return await self._rest.request(method, path, query, body)
        except TokenFileError as error:
            raise BrokerUnavailable(str(error)) from None
        except NotSent as error:
            what = "certificates and clock" if "SSL" in str(error) else "network and proxy"
            text = f"LongBridge cannot be reached ({error}): check this machine's {what}"
            if self._holds_the_only_token():
                raise Busy(f"{text}; nothing was sent", retry_after=1) from None
            raise BrokerUnavailable(text) from None

    # --- the operations: trading --------------------------------------------------------------
    async def ping(self) -> bool:
        """Asks for a one-time password: the one request that needs a living token and counts
        against no documented limit."""
        await self._get("/v1/socket/token")
        return True

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
        body = to_order_body(
            contract,
            order_type,
            time_in_force,
            lifecycle,
            direction,
            qty,
            price,
            str(kwargs.get("mark") or ""),
        )
        data = await self._change("POST", None, body)
        order_id = data.get("order_id") if isinstance(data, dict) else None
        if isinstance(order_id, bool | float) or not ORDER_ID.fullmatch(str(order_id or "")):
            raise OutcomeUnknown("LongBridge took the order but gave no order id")
        self._placed.append(str(order_id))
        return str(order_id)

    async def cancel_order(self, order_id: str) -> None:
        _check_order_id(order_id)
        try:
            await self._change("DELETE", {"order_id": order_id}, None)
        except Rejected as refused:
            order = await self._order_after(refused, order_id)
            if order.is_pending_cancel:
                return
            if order.is_completed:
                over = f"over ({order.error_reason})"
                state = "filled" if order.is_filled else "cancelled" if order.is_canceled else over
                raise Rejected(f"The order is already {state}: {refused.text}") from None
            raise

    async def _order_after(self, refused: Rejected, order_id: str) -> Order:
        """What the order is whose cancellation was refused; the refusal itself if that can't be
        learnt, also for an order of this connection that LongPort does not know as yet."""
        try:
            try:
                await self._another_slot()
                return (await self.order(order_id)).order
            except OrderNotFound:
                await asyncio.sleep(UNFAMILIAR_SECONDS)
                await self._another_slot()
                return (await self.order(order_id)).order
        except OrderNotFound:
            if order_id in self._placed:
                raise refused from None
            raise
        except (BrokerError, asyncio.CancelledError):  # cancelled at the deadline
            raise refused from None

    async def order(self, order_id: str) -> OrderReport:
        _check_order_id(order_id)
        try:
            data = await self._get("/v1/trade/order", {"order_id": order_id})
        except CodedRejection as refused:
            if refused.longport_code == UNKNOWN_ORDER_CODE:
                raise OrderNotFound(f"LongBridge knows no order {order_id}") from None
            raise
        with _reading():
            report = parse_order(data)
            if report.order.order_id != order_id:
                raise ValueError("another order")
        return report

    def listed_since(self, now: datetime) -> datetime:
        return now - LISTING_DAYS

    async def recent_orders(self) -> list[OrderReport]:
        """Today's, those of the last LISTING_DAYS, and older ones that are still open."""
        now = datetime.now(UTC)
        data = await self._get("/v1/trade/order/today")
        with _reading():
            rows = rows_of(data, "orders")
        rows += await self._history("order", "orders", now - LISTING_DAYS, now)
        rows += await self._history("order", "orders", now - HISTORY, now, status=OPEN_WORDS)
        with _reading():
            # Today's list first: of an order in several, it has the latest.
            reports = [parse_listed(row) for row in reversed(rows)]
        return list({report.order.order_id: report for report in reports}.values())

    async def fills(self, order_id: str) -> list[Fill]:
        _check_order_id(order_id)
        data = await self._get("/v1/trade/execution/today", {"order_id": order_id})
        with _reading():
            rows = rows_of(data, "trades")
        now = datetime.now(UTC)
        rows += await self._history("execution", "trades", now - HISTORY, now)
        with _reading():
            mine = [row for row in rows if str(row["order_id"]) == order_id]
            return list({row["trade_id"]: parse_fill(row) for row in mine}.values())

    async def _history(
        self, what: str, key: str, begin: datetime, end: datetime, **more: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Every row of a history request. An answer has 1000 at most, in no order that would tell
        which ones (longbridge/openapi#143): of a span with more, both halves are asked for."""
        rows: list[dict[str, Any]] = []
        spans = [(int(begin.timestamp()), round(end.timestamp()))]
        while spans:
            first, last = spans.pop()
            await self._another_slot()
            query: Query = {"start_at": str(first), "end_at": str(last), **more}
            data = await self._get(f"/v1/trade/{what}/history", query)
            with _reading():
                page = rows_of(data, key)
                is_whole = not (page and data.get("has_more"))
            if is_whole:
                rows += page
            elif last - first < 2:
                raise TimedOut(f"LongBridge's {what} history does not end; try again")
            else:
                middle = (first + last) // 2
                spans += [(first, middle), (middle, last)]
        return rows

    async def _another_slot(self) -> None:
        """For a further trade call within one operation."""
        await asyncio.sleep(GAP)
        await self._take("trade", patience=5 * GAP)

    async def _take(self, window: str, *, patience: float) -> None:
        """Takes a slot that is free within so many seconds; RateLimited else."""
        while True:
            try:
                self.take(window)
                return
            except RateLimited as error:
                wait = error.retry_after or GAP
                if wait > patience:
                    raise
                patience -= wait
                await asyncio.sleep(wait)

    async def cash(self, currency: str = "USD") -> Cash:
        data = await self._get("/v1/asset/account", {"currency": asked_currency(currency)})
        with _reading():
            return Cash(currency, parse_cash(data, currency))

    async def positions(self) -> list[Position]:
        data = await self._get("/v1/asset/stock")
        with _reading():
            held = parse_positions(data)
        return [
            Position(self.broker_name, self.broker_display, contract, Unit.Share, currency, qty)
            for contract, (currency, qty) in held.items()
        ]

    # --- the operations: quotes ---------------------------------------------------------------
    async def quote(self, contract: Contract) -> Quote:
        symbol = to_symbol(contract)
        currency = usual_currency(contract) or await self._currency(symbol)
        with longbridge_sdk.errors("quote", self._file.path):
            rows = self._context.quote([symbol])
        row = next((row for row in rows if row.symbol == symbol), None)
        if row is None:
            raise Rejected(f"LongBridge has no quote for {symbol}")
        if not row.last_done:  # the SDK makes 0 of what it cannot read (rust/src/quote/types.rs)
            raise Rejected(f"LongBridge has no price for {symbol}")
        return Quote(
            contract=contract,
            currency=currency,
            is_tradable=name_of(row.trade_status) == "Normal",
            latest=row.last_done,
            pre_close=row.prev_close,
            open_price=row.open,
            high_price=row.high,
            low_price=row.low,
            time=row.timestamp.astimezone(),
        )

    async def _currency(self, symbol: str) -> str:
        """Asked once for each security."""
        if symbol not in self._currencies:
            with longbridge_sdk.errors("quote", self._file.path):
                rows = self._context.static_info([symbol])
            found = [row.currency for row in rows if row.symbol == symbol and row.currency]
            if not found:
                raise Rejected(f"LongBridge knows no security {symbol}")
            self._currencies[symbol] = str(found[0])
            await self._take("quote", patience=2.0)
        return self._currencies[symbol]

    async def market_status(self) -> Mapping[Any, Mapping[str, MarketStatus]]:
        found = await self._states_by_code() if self._has_market_codes else {}
        for region in ZONES:
            if region not in found:
                found[region] = await self._session_state(region)
        return {TradeType.Securities: {region: found[region] for region in ZONES}}

    async def _states_by_code(self) -> dict[str, MarketStatus]:
        """Nothing where this account has no such request, or it fails today."""
        try:
            async with asyncio.timeout(self.read_seconds):
                data = await self._send("GET", "/v1/quote/market-status")
            return parse_market_codes(data)
        except Refused as refused:
            said_no = isinstance(refusal(refused, self._file.path), CodedRejection)
            self._has_market_codes = not (said_no or refused.status == 404)
        except NoAnswer as error:
            self._has_market_codes = error.status != 404
        except (*UNREADABLE, TimeoutError, BrokerUnavailable):
            pass
        return {}

    async def _session_state(self, region: str) -> MarketStatus:
        openapi = longbridge_sdk.load()

        now = datetime.now(ZoneInfo(ZONES[region]))
        today = now.date()
        if self._periods_day != datetime.now(UTC).date():
            await self._take("quote", patience=2.0)
            with longbridge_sdk.errors("quote", self._file.path):
                sessions = self._context.trading_session()
            self._periods_day = datetime.now(UTC).date()
            self._periods = {
                name_of(market.market): [
                    (each.begin_time, each.end_time, name_of(each.trade_session))
                    for each in market.trade_sessions
                ]
                for market in sessions
            }
        calendar = self._calendars.get(region)
        if calendar is None or not calendar.first <= today < calendar.last:
            first, last = today, today + timedelta(days=7)
            await self._take("quote", patience=2.0)
            with longbridge_sdk.errors("quote", self._file.path):
                days = self._context.trading_days(getattr(openapi.Market, region), first, last)
            half = frozenset(days.half_trading_days)
            calendar = Calendar(first, last, frozenset(days.trading_days) | half, half)
            self._calendars[region] = calendar
        return session_state(region, now, self._periods.get(region, ()), calendar)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """What is not as documented is no answer: asked again, LongPort may give one."""
    try:
        yield
    except UNREADABLE as error:
        log.error("LongBridge: an answer could not be read (%s)", type(error).__name__)
        raise TimedOut(NOT_INTELLIGIBLE) from None


def _url(name: str, text: str) -> str:
    """An address that works: without TLS where `https` is misspelt, the token would be readable."""
    scheme = "http" if name == "http_url" else "ws"
    is_url = re.fullmatch(rf"{scheme}s?://[A-Za-z0-9.:\[\]_-]+(/[!-~]*)?", text)
    try:
        parts = urlsplit(text)
        _, port = address(parts.netloc)
    except ValueError:  # no host, or no such port
        is_url = None
    if not is_url or port == 0 or parts.query or parts.fragment:
        raise ValueError(f"LongBridge's {name} must be an address that begins with {scheme}s://")
    # The SDK puts its paths behind it as it is: a `//v1/…` is another path.
    return text.rstrip("/") if scheme == "http" else text


def _check_order_id(order_id: str) -> None:
    if not ORDER_ID.fullmatch(order_id):
        raise OrderNotFound(f"LongBridge has no order ids like {order_id[:40]!r}")
