"""老虎证券 (Tiger) through its SDK tigeropen: the class `Tiger`.

Words and numbers are translated in `tiger_mapping.py`, HTTP lies in `tiger_http.py`, the push
connection in `tiger_push.py`; docs/brokers/tiger.md tells limits, quirks and troubleshooting.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, TypeVar

from httptrading.brokers import tiger_http, tiger_push
from httptrading.brokers import tiger_mapping as mapping
from httptrading.brokers.base import BaseBroker, Window
from httptrading.brokers.registry import broker_register
from httptrading.errors import (
    BrokerUnavailable,
    Busy,
    InvalidRequest,
    OrderNotFound,
    OutcomeUnknown,
    RateLimited,
    Rejected,
    TimedOut,
    Unsupported,
)
from httptrading.model import (
    CURRENCIES,
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
    UnifiedStatus,
    Unit,
)

log = logging.getLogger("httptrading.tiger")

_Result = TypeVar("_Result")

CONNECT_TIMEOUT = 5.0
LISTING_DAYS = 30
PAGE = 300  # orders in one answer at most
MOST_PAGES = 40
RESERVE_SHARE = 0.4  # of the timeout; the rest is for placing under the reserved number
EXPLAINED_WITHIN = 1.5  # seconds for why a cancellation was refused; the next ones wait for it
MOST_NUMBERS = 20_000  # order numbers remembered
NOT_SIGNED_AGAIN = 20.0  # seconds in which a key that Tiger did not accept is not tried again
NOT_GRABBED_AGAIN = 300.0  # seconds in which a market that a grab did not open is left alone


class UsedNumbers:
    """The order numbers that orders were placed under, or may have been. A number that Tiger gives
    again would name the older order: it would be answered with that one's id, or as a duplicate."""

    def __init__(self, most: int = MOST_NUMBERS) -> None:
        self._most = most
        self._lock = threading.Lock()
        # (tiger_id, account, number), oldest first
        self._used: dict[tuple[str, str, str], None] = {}

    def claim(self, number: tuple[str, str, str]) -> bool:
        """Whether it is used for the first time."""
        with self._lock:
            if number in self._used:
                return False
            self._used[number] = None
            if len(self._used) > self._most:
                del self._used[next(iter(self._used))]
            return True

    def release(self, number: tuple[str, str, str]) -> None:
        with self._lock:
            self._used.pop(number, None)


# Of the process: the brokers are copies, made anew with each connection.
_numbers = UsedNumbers()
_bad_keys: dict[int, float] = {}  # a key's hash → until when it is not tried again


@broker_register("tiger", "老虎证券")
class Tiger(BaseBroker):
    """One account at Tiger: prime, global (U…) or paper (17 digits and more).

    Arguments: tiger_id, account, pk_path; optional server_url, push_host ("" switches push off),
    push_port, push_ssl, tiger_public_key, secret_key, timeout (seconds for one operation).
    """

    # HTTP has no state, so each kind of operation gets a connection of its own: neither a hanging
    # order nor a hanging list or quote keeps a cancellation waiting.
    connections = {
        "trade": ("place_order",),
        "cancel": ("cancel_order",),
        "account": ("ping", "cash", "positions", "order", "recent_orders", "fills"),
        "quote": ("quote", "market_status"),
    }
    booked_within = 15.0  # tiger_open_config.TIMEOUT
    sdk = "tigeropen"
    arguments = frozenset(
        {
            *("tiger_id", "account", "pk_path", "secret_key", "tiger_public_key", "server_url"),
            *("push_host", "push_port", "push_ssl", "timeout"),
        }
    )

    # docs.itigerup.com/docs/ratelimit, taken for all methods of a class together, which is the
    # stricter reading. A second more than its 60, because a slot got with `take` is stamped
    # before its call. Grabs share Tiger's 10 a minute with market states, and neither may use them
    # up: a permission that was taken away is taken back also in the minute of the first grab.
    windows = {
        "high": Window(120, 61.0, kept=10, kept_for_orders=20),
        "medium": Window(60, 61.0),
        "low": Window(10, 61.0),
        "market": Window(9, 61.0),
        "grab": Window(4, 61.0),
    }
    costs = {
        "place_order": ("high", "high"),  # reserves a number first
        "cancel_order": ("high",),
        "order": ("high",),
        "recent_orders": ("high", "high"),  # one page, and what is open from before
        "quote": ("high",),
        "ping": ("medium",),
        "cash": ("medium",),
        "positions": ("medium",),
        "fills": ("medium",),
        "market_status": ("low", "market"),
    }
    ages = {"market_status": 7.0, "ping": 4.0, "cash": 4.0, "positions": 4.0}
    quote_regions: ClassVar[frozenset[str] | None] = frozenset({"US", "HK"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        given = self.broker_args
        for name in ("tiger_id", "account", "pk_path"):
            if not str(given.get(name) or "").strip():
                raise ValueError(f"Tiger needs the argument {name}")
        self._timeout = _number_of(given, "timeout", 8, 1, 30)
        self._push_port = int(_number_of(given, "push_port", 9883, 1, 65535))
        if not isinstance(given.get("push_ssl", True), bool):
            raise ValueError("Tiger's push_ssl must be true or false")
        if not str(given.get("server_url") or "https://").startswith(("http://", "https://")):
            raise ValueError("Tiger's server_url must begin with https://")
        self._tiger_id = str(given["tiger_id"]).strip()
        self._account = str(given["account"]).strip()
        self.combinations = mapping.PAPER if self.is_paper else mapping.REAL
        self._http: tiger_http.Transport | None = None
        self._trade: Any = None
        self._quotes: Any = None
        self._push: tuple[tiger_push.Address, tiger_push.Subscription] | None = None
        self._holdings: dict[tuple[str, ...], tuple[float, ...]] = {}  # as pushed last
        # Regions whose last quote was allowed: a denial means that it was taken away.
        self._may_quote: set[str] = set()
        self._hidden: set[str] = set()  # positions that cannot be shown, once told in the log
        self._not_grabbed: dict[str, float] = {}  # region → until when grabbing is known to fail

    @property
    def is_paper(self) -> bool:
        """common/util/account_util.py: 17 digits and more."""
        return self._account.isdigit() and len(self._account) >= 17

    @property
    def is_global(self) -> bool:
        return self._account.upper().startswith("U")

    def account_key(self) -> str:
        """Tiger counts calls per tiger_id, so all its accounts share the windows."""
        return f"tiger:{tiger_http.device_id(self._tiger_id)}"

    # --- the connection ---------------------------------------------------------------------
    def connect(self) -> None:
        given = self.broker_args
        key = tiger_http.read_private_key(str(given["pk_path"]))
        self._trade, self._quotes, self._http = tiger_http.make_clients(
            tiger_http.Credentials(
                tiger_id=self._tiger_id,
                account=self._account,
                private_key=key,
                secret_key=str(given.get("secret_key") or ""),
                public_key=str(given.get("tiger_public_key") or ""),
                server_url=str(given.get("server_url") or ""),
            )
        )
        with self._http.within(min(CONNECT_TIMEOUT, self._timeout)):
            self._http.open()
            if self.connection == "account":
                self._introduce(hash((given.get("server_url"), self._tiger_id, key)))
        if self.connection == "trade":
            self._listen(key)

    def _introduce(self, key: int) -> None:
        """Key, signature and account are checked once. Any other failure says nothing about them,
        and without a connection nothing else would be served. A bad signature is not sent with
        every attempt to connect: Tiger black-lists accounts with too many requests in error
        (docs.itigerup.com/docs/error-code, 4)."""
        if time.monotonic() < _bad_keys.get(key, 0.0):
            raise BrokerUnavailable(mapping.BAD_SIGNATURE)
        try:
            self.take("medium")
            is_known = self._ask(self._knows_account)
        except tiger_http.Unbelieved as unbelieved:
            raise BrokerUnavailable(unbelieved.text) from None
        except (Rejected, RateLimited, Busy, tiger_http.NoAnswer) as error:
            if isinstance(error, Rejected) and error.text == mapping.BAD_SIGNATURE:
                _bad_keys[key] = time.monotonic() + NOT_SIGNED_AGAIN
                raise BrokerUnavailable(error.text) from None
            log.warning("Tiger did not tell its accounts, so key and account are not checked yet")
            return
        if not is_known:
            raise BrokerUnavailable(
                "Tiger knows no such account for this tiger_id; check both arguments"
            )

    def _knows_account(self) -> bool:
        """Asked without an account, which must not be a paper one (docs.itigerup.com/docs/accounts:
        "不支持传入模拟账号，不传会返回全部账号")."""
        known = self._trade.get_managed_accounts()
        return any(str(one.account) == self._account for one in known or [])

    def _listen(self, key: str) -> None:
        given = self.broker_args
        host = given.get("push_host")
        if host is None:
            # Never the real push with a gateway of somebody's own.
            host = "" if given.get("server_url") else "openapi.tigerfintech.com"
        if not host:
            return
        address = tiger_push.Address(
            tiger_id=self._tiger_id,
            host=str(host),
            port=self._push_port,
            tls=given.get("push_ssl", True),
        )
        subscription = tiger_push.Subscription(
            account=self._account,
            on_order=self._order_pushed,
            on_holding=self._holding_pushed,
            on_up=self.restored,
        )
        self._push = address, subscription
        tiger_push.subscribe(address, key, subscription)

    def _order_pushed(self, data: Any) -> None:
        """Tiger pushes orders of every kind, and lists stocks' only: another's end would be missed
        whenever push is down."""
        if data.id > 0 and data.secType in ("", "STK"):
            self.report(mapping.parse_push(data))

    def _holding_pushed(self, data: Any) -> None:
        """Tiger pushes assets and positions also when nothing but their value at the market's price
        has changed, which no answer tells: with each of those asked anew, clients that poll would
        have used the windows up within seconds."""
        holding, amount = mapping.pushed_holding(data)
        if self._holdings.get(holding) != amount:
            self._holdings[holding] = amount
            self.stale()

    def close(self) -> None:
        self._hush()
        if self._http is not None:
            self._http.close()

    def abort(self) -> None:
        self._hush()
        if self._http is not None:
            self._http.abort()

    def _hush(self) -> None:
        if self._push is not None:
            tiger_push.unsubscribe(*self._push)

    def _transport(self) -> tiger_http.Transport:
        if self._http is None:
            raise BrokerUnavailable("Not connected to Tiger")
        return self._http

    def _ask(self, call: Callable[[], _Result]) -> _Result:
        """One SDK call; raises NoAnswer when its fate is open."""
        with self._transport().within(self._timeout):
            try:
                return tiger_http.ask(call)
            except tiger_http.Refused as refused:
                said = self._masked(refused.words)
                error = mapping.refusal(refused.code, said)
                if error is None:
                    raise tiger_http.NoAnswer(
                        f"Tiger answered error {refused.code}: {said}"
                    ) from None
                raise error from None

    def _read(self, call: Callable[[], _Result]) -> _Result:
        try:
            return self._ask(call)
        except tiger_http.NoAnswer as silence:
            # Not BrokerUnavailable: HTTP has no state, and the connection serves others, too.
            if silence.late:
                raise TimedOut(silence.text) from None
            raise TimedOut(
                f"Tiger gave no intelligible answer ({silence.text}); try again"
            ) from None

    def _change(self, call: Callable[[], _Result]) -> _Result:
        try:
            return self._ask(call)
        except tiger_http.NoAnswer as silence:
            raise OutcomeUnknown(f"{silence.text}; whether it was done is not known yet") from None

    def _masked(self, text: str) -> str:
        """Tiger's words, without what it may quote from the request."""
        for secret in (self.broker_args.get("secret_key"), self._account, self._tiger_id):
            text = text.replace(str(secret), "***") if secret else text
        return mapping.words(text)

    # --- orders -----------------------------------------------------------------------------
    def place_order(
        self,
        contract: Contract,
        order_type: OrderType,
        time_in_force: TimeInForce,
        lifecycle: Lifecycle,
        direction: str,
        qty: int,
        price: float | None = None,
        *,
        mark: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Reserves an order number, then places under it: Tiger takes each number once."""
        if price is not None and not math.isfinite(price):
            raise InvalidRequest("The price is not a number", {"price": ["must be a number"]})
        outside_rth, session = mapping.TO_SESSION[lifecycle]
        is_us_limit = contract.region == "US" and order_type is OrderType.Limit
        with self._transport().within(self._timeout):
            order = self._reserve(
                account=self._account,
                contract=self._sdk_contract(contract),
                action=direction,
                order_type=mapping.TO_ORDER_TYPE[order_type],
                quantity=qty,
                limit_price=float(price)
                if order_type is OrderType.Limit and price is not None
                else None,
                time_in_force=time_in_force.name,
                outside_rth=outside_rth,
                trading_session_type=session if is_us_limit else None,
                user_mark=mark,
            )
            placed = self._place_under(order)
        order_id = mapping.order_id_of(placed)
        if order_id is None:
            raise OutcomeUnknown("Tiger took the order without telling its id")
        return order_id

    def _place_under(self, order: Any) -> Any:
        number = self._tiger_id, self._account, str(order.order_id)
        if not _numbers.claim(number):
            raise _not_sent("Tiger gave an order number that was used before")
        try:
            return self._change(lambda: self._trade.place_order(order))
        except (Rejected, RateLimited, BrokerUnavailable, Busy):  # nothing bears the number
            _numbers.release(number)
            raise

    def _reserve(self, **fields: Any) -> Any:
        try:
            with self._transport().within(self._timeout * RESERVE_SHARE):
                order = self._ask(lambda: self._trade.create_order(**fields))
        except tiger_http.NoAnswer as silence:
            raise _not_sent(silence.text) from None
        if order is None or mapping.order_id_of(order.order_id) is None:
            raise _not_sent("Tiger gave no order number")
        return order

    @staticmethod
    def _sdk_contract(contract: Contract) -> Any:
        from tigeropen.common.util.contract_utils import stock_contract

        return stock_contract(contract.ticker, CURRENCIES[contract.region])

    def cancel_order(self, order_id: str) -> None:
        number_ = mapping.order_number(order_id)
        try:
            self._change(lambda: self._trade.cancel_order(self._account, id=number_))
        except Rejected as refused:
            try:
                self.take("high")
                with self._transport().within(EXPLAINED_WITHIN):
                    order = self.order(order_id).order
            except OrderNotFound:
                # Tiger has just refused to cancel it, so it need only not be told yet.
                if mapping.is_unknown_order(refused):
                    raise
            except (RateLimited, BrokerUnavailable, Busy, TimedOut):
                pass
            else:
                if order.is_completed:
                    raise Rejected(
                        f"The order is finished ({mapping.what_became(order)})"
                    ) from None
            raise refused from None

    def order(self, order_id: str) -> OrderReport:
        wanted = mapping.order_number(order_id)
        try:
            found, _ = self._orders(lambda: self._trade.order(self._account, wanted))
        except Rejected as refused:
            if not mapping.is_unknown_order(refused):
                raise
            found = []
        for report in found:
            if report.order.order_id == order_id:
                return report
        raise OrderNotFound("Tiger does not know the order")

    def _orders(self, ask: Callable[[], Any]) -> tuple[list[OrderReport], str | None]:
        return self._read(lambda: mapping.parse_orders(ask()))

    def listed_since(self, now: datetime) -> datetime:
        return now - timedelta(days=LISTING_DAYS)

    def recent_orders(self) -> list[OrderReport]:
        """Everything of the last LISTING_DAYS, page by page, and what is open from before."""
        since = int((datetime.now(UTC) - timedelta(days=LISTING_DAYS)).timestamp() * 1000)
        found: dict[str, OrderReport] = {}
        token, seen = "", {""}
        for _ in range(MOST_PAGES):
            if token:
                self.take("high")
            page, following = self._orders(
                lambda token=token: self._trade.orders(  # type: ignore[misc]
                    self._account, since, PAGE, token
                )
            )
            if token and following is None:
                raise TimedOut("Tiger answered no order list; try again")
            found |= {report.order.order_id: report for report in page}
            token = following or ""
            if token in seen:
                break
            seen.add(token)
        else:
            raise TimedOut("Tiger's order list does not end; try again")
        older, _ = self._orders(lambda: self._trade.open_orders(self._account, since, PAGE))
        if len(older) >= PAGE:  # this list has no pages
            raise Rejected(f"There are {PAGE} and more open orders of long ago")
        for report in older:
            found.setdefault(report.order.order_id, report)
        return list(found.values())

    def fills(self, order_id: str) -> list[Fill]:
        wanted = mapping.order_number(order_id)
        if self.is_global:
            raise Unsupported("Tiger tells the single fills of prime and paper accounts only")
        found: list[Fill] = []
        token, seen = "", {""}
        while True:
            page, token = self._read(
                lambda token=token: self._transactions(wanted, token)  # type: ignore[misc]
            )
            found += page
            if token in seen:
                return found
            seen.add(token)
            self.take("medium")

    def _transactions(self, order_id: int, token: str) -> tuple[list[Fill], str]:
        """A page of an order's fills, and the token of the next one."""
        page = self._trade.get_transactions(
            self._account, order_id=order_id, limit=100, page_token=token
        )
        if page is None:
            return [], ""
        mine = [one for one in page.result if str(one.order_id) == str(order_id)]
        return [mapping.parse_fill(one) for one in mine], str(page.next_page_token or "")

    # --- the account ------------------------------------------------------------------------
    def ping(self) -> bool:
        """Asks Tiger for this account: key, signature, account and gateway are all in order."""
        return self._read(self._knows_account)

    def cash(self, currency: str = "USD") -> Cash:
        asked = mapping.TO_CURRENCY.get(currency, currency)
        if self.is_global:
            accounts = self._read(lambda: self._trade.get_assets(self._account, market_value=True))
            amounts = [
                mapping.global_cash(one, asked)
                for one in accounts or []
                if str(one.account) == self._account
            ]
        else:
            assets = self._read(lambda: self._trade.prime_assets(self._account, asked))
            amounts = [mapping.prime_cash(assets, asked)]
        if not amounts or amounts[0] is None:
            raise Rejected(f"Tiger tells no available amount in {currency} for this account")
        return Cash(currency, amounts[0])

    def positions(self) -> list[Position]:
        listed = mapping.items_of(self._read(lambda: self._trade.positions(self._account)))
        if listed is None:
            raise TimedOut("Tiger answered no position list; try again")
        found = []
        for one in listed:
            contract = mapping.contract_of(
                one.get("symbol"), one.get("market"), one.get("currency"), one.get("secType")
            )
            qty = mapping.held(one)
            if contract is None:
                self._say_hidden(one)
                continue
            if qty is None:  # left out, it would look sold
                raise TimedOut(f"Tiger tells no quantity of {contract.ticker} held; try again")
            if not qty:
                continue
            currency = str(one.get("currency") or CURRENCIES[contract.region])
            found.append(
                Position(self.broker_name, self.broker_display, contract, Unit.Share, currency, qty)
            )
        return found

    def _say_hidden(self, position: Mapping[str, Any]) -> None:
        """What cannot be shown is said, once for each security."""
        known = f"{position.get('symbol')} ({position.get('market')}, {position.get('secType')})"
        if known not in self._hidden:
            self._hidden.add(known)
            log.warning("a position in %s is not shown", mapping.words(known))

    # --- quotes -----------------------------------------------------------------------------
    def quote(self, contract: Contract) -> Quote:
        brief = self._brief(contract)
        found = mapping.parse_quote(contract, brief) if brief else None
        if found is None:
            raise Rejected(f"Tiger has no price of {contract.ticker} right now")
        return found

    def _brief(self, contract: Contract) -> Mapping[str, Any] | None:
        """Quotes belong to one device: ours grabs the permission when it does not have it. A market
        without a subscription is denied in the same words, and stays so after a grab."""
        region = contract.region
        try:
            brief = self._ask_brief(contract.ticker)
        except Rejected as denied:
            if not mapping.is_device_denied(denied) or self._is_beyond_grabbing(region):
                raise
            if region in self._may_quote:
                self._may_quote.clear()  # it was taken for all regions
                raise Rejected(
                    "Another device of this tiger_id has taken the quote permission; "
                    "the next request takes it back"
                ) from None
            brief = self._grab_and_ask(contract)
        self._may_quote.add(region)
        self._not_grabbed.pop(region, None)
        return brief

    def _is_beyond_grabbing(self, region: str) -> bool:
        return time.monotonic() < self._not_grabbed.get(region, 0.0)

    def _grab_and_ask(self, contract: Contract) -> Mapping[str, Any] | None:
        self.take("grab")
        self.take("low")
        self._read(self._quotes.grab_quote_permission)
        self.take("high")
        try:
            return self._ask_brief(contract.ticker)
        except Rejected as denied:
            if mapping.is_device_denied(denied):
                self._not_grabbed[contract.region] = time.monotonic() + NOT_GRABBED_AGAIN
            raise

    def _ask_brief(self, symbol: str) -> Mapping[str, Any] | None:
        rows = mapping.rows(self._read(lambda: self._quotes.real_time(symbol)))
        return next((row for row in rows if str(row.get("symbol")) == symbol), None)

    def market_status(self) -> dict[str, dict[str, MarketStatus]]:
        listed = mapping.rows(self._read(self._quotes.market_states))
        if not listed:
            raise TimedOut("Tiger answered no market states; try again")
        found = {}
        for one in listed:
            region, word = str(one.get("market")), str(one.get("status") or "UNKNOWN")
            if region in CURRENCIES:
                unified = mapping.MARKET_STATES.get(word, UnifiedStatus.UNKNOWN)
                found[region] = MarketStatus(region, word, unified)
        return {"securities": found}


def _not_sent(reason: str) -> Busy:
    """Not BrokerUnavailable, which would end a connection that may be in order."""
    return Busy(f"{reason}; the order was not sent", retry_after=1)


def _number_of(given: Mapping[str, Any], name: str, default: int, least: int, most: int) -> float:
    value = given.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:
        raise ValueError(f"Tiger's {name} must be a number from {least} to {most}")
    return float(value)
