"""Futu and moomoo through OpenD.

The tables and translations are in futu_vocabulary.py, what the SDK must be kept from doing in
futu_sdk.py, facts and quirks in docs/brokers/futu.md. Pages named here are those of
https://openapi.futunn.com/futu-api-doc/.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar

from httptrading.brokers import futu_sdk
from httptrading.brokers.base import BaseBroker, Window
from httptrading.brokers.futu_vocabulary import (
    ARGUMENTS,
    CASH_FIELDS,
    MARKET_OF_CURRENCY,
    REAL,
    SIMULATE,
    TO_ORDER_TYPE,
    TO_SESSION,
    Account,
    parse_accounts,
    parse_arguments,
    parse_cash,
    parse_fill,
    parse_market_states,
    parse_order,
    parse_position,
    parse_quote,
    to_code,
)
from httptrading.brokers.registry import broker_register
from httptrading.errors import (
    BrokerUnavailable,
    HttpTradingError,
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
)

PIN_REFUSAL = "refused-pin"
ACCOUNTS = "accounts"  # those that were chosen with their firms, the first ones first
LISTING_DAYS = 10  # a gateway that was down over a long weekend finds its orders
LOGIN_WINDOWS = {"unlock", "quote"}  # the others are counted for each account
EXPLAINED_WITHIN = 1.5  # seconds for why OpenD refused something; the next calls wait for it
SHOWN_SECONDS = 1.0  # between two looks into OpenD's memory for those who may not have a listing
HISTORY_DAYS = 90  # what one history request spans at most
REFUSED = -1  # Common.proto RetType_Failed; -100, -200, -400 and -500 leave the outcome open
OFTEN = re.compile(r"频率太高|頻率太高|频繁|頻繁|too (high|often|frequent)|frequen", re.IGNORECASE)
LOCKED = re.compile(r"解锁|解鎖|unlock", re.IGNORECASE)
# NN_ProtoRet_TimeOut, …_ByDisConnOrCacnel (sic), …_SvrFailed: OpenD's own request to Futu ended
# without an answer (py-futu-api issues 11, 194).
DOUBTFUL = re.compile(
    r"超时|超時|逾时|time.?out|timed out|网络|網絡|network|断开|斷開|disconnect|no response"
    r"|NN_ProtoRet",
    re.IGNORECASE,
)
WRONG_PIN = re.compile(
    r"密码|密碼|password|pwd|\bpin\b|不正确|不正確|incorrect|wrong", re.IGNORECASE
)


class _Locked(Rejected):
    """OpenD wants UnlockTrade first; the request was refused."""


@broker_register("futu", "富途证券")
class Futu(BaseBroker):
    """One environment (REAL or SIMULATE) of an OpenD login.

    Arguments: `host`, `port`, `trade_env`; optional `pk_path` (RSA key where OpenD encrypts),
    `unlock_pin` (MD5 of the trading password), `security_firm` (default: the first real account's),
    `acc_id` (default: the first account that trades the order's market).
    """

    package: ClassVar[str] = "futu"
    booked_within = 12.0  # OpenContextBase._query_timeout
    arguments = ARGUMENTS
    sdk: ClassVar[str] = "futu-api"
    connections: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "trade": (
            "ping",
            "cash",
            "positions",
            "order",
            "recent_orders",
            "fills",
            "place_order",
            "cancel_order",
        ),
        "quote": ("quote", "market_status"),
    }
    # trade/place-order.html, modify-order.html, unlock.html, get-order-list.html (counted only with
    # refresh_cache), get-history-order-list.html, quote/get-market-snapshot.html. The lists are
    # limited per account: paper accounts are one per market.
    windows: ClassVar[Mapping[str, Window]] = {
        "place": Window(15, 30, gap=0.02),
        "cancel": Window(20, 30, gap=0.04),
        "unlock": Window(10, 30),
        "quote": Window(60, 30),
        **{
            f"{name} {region}": Window(10, 30)
            for name in ("orders", "history", "positions", "cash", "fills")
            for region in CURRENCIES
        },
    }
    costs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "place_order": ("place",),
        "cancel_order": ("cancel",),
        "quote": ("quote",),
    }
    ages: ClassVar[Mapping[str, float]] = {"recent_orders": 3.0}

    def __init__(
        self,
        broker_args: Mapping[str, Any] | None = None,
        instance_id: str | None = None,
        tokens: Iterable[str] | None = None,
    ) -> None:
        super().__init__(broker_args, instance_id, tokens)
        self._given = parse_arguments(self.broker_args)
        self.combinations = REAL if self._given.trade_env == "REAL" else SIMULATE
        # The SDK's key and its table of connection ids are process-wide: an encrypted instance
        # would break a plain one beside it (common/utils.py:929, common/conn_mng.py).
        self.isolation = "process" if self._given.pk_path else "thread"
        self._life = secrets.token_hex(8)  # of this prototype: its copies have the same
        self._context: Any = None
        self._accounts: list[Account] = []
        self._account_of: dict[str, Account] = {}  # order id → account
        self._refreshed: set[tuple[str, int]] = set()  # what, account; of this connection
        self._shown = float("-inf")  # when OpenD's memory was last looked into for a listing

    def account_key(self) -> str:
        given = self._given
        return f"{self._login()}:{given.trade_env}:{given.acc_id}"

    def window_key(self, window: str) -> str:
        return self._login() if window in LOGIN_WINDOWS else self.account_key()

    def _login(self) -> str:
        """An OpenD has one."""
        return f"opend:{self._given.host}:{self._given.port}"

    def check_contract(self, contract: Contract) -> None:
        super().check_contract(contract)
        to_code(contract)

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
        super().check_order(contract, order_type, time_in_force, lifecycle, direction, qty, price)
        to_code(contract)
        places = 4 if contract.region == "US" and (price or 0) < 1 else 3
        exponent = Decimal(repr(price or 0)).normalize().as_tuple().exponent
        if -int(exponent) > places:
            raise Unsupported(
                f"{self.broker_display} takes prices of at most {places} decimals here and would "
                "cut the rest off"
            )

    # --- the connection ---------------------------------------------------------------------
    def connect(self) -> None:
        given = self._given
        self._refreshed = set()
        where = {
            "host": futu_sdk.probe(given.host, given.port),  # before the costly import
            "port": given.port,
            "is_encrypt": bool(given.pk_path),
        }
        sdk = futu_sdk.load(self.package, self.data_dir)
        futu_sdk.use_key(sdk, given.pk_path)
        if self.connection == "quote":
            self._open(sdk.OpenQuoteContext, **where)
        else:
            accounts = {"filter_trdmarket": "N/A", "security_firm": self._firm()}
            self._open(sdk.OpenSecTradeContext, **where, **accounts)
        self._check_login()
        login = "qotLogined" if self.connection == "quote" else "trdLogined"
        self._context.set_handler(futu_sdk.login_handler(sdk, login, self.lost))
        if self.connection == "trade":
            self._choose_accounts()
            self._listen(sdk)

    def _open(self, base: type, **arguments: Any) -> None:
        def keep(context: Any) -> None:
            self._context = context

        futu_sdk.open_context(base, self.lost, keep, **arguments)

    def _check_login(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._ask(self._context.get_global_state, check_login=False)
        if not _logged_in(state, self.connection):
            raise BrokerUnavailable(
                f"OpenD is running but not logged in (it says {state['program_status_type']}): "
                "log in there"
            )
        return state

    def _choose_accounts(self) -> None:
        rows = self._ask(self._context.keep_accounts).to_dict("records")
        if self._context.unlisted:
            # The SDK has then neither subscribed to pushes nor kept to one security_firm
            # (trade/open_trade_context.py:198).
            raise BrokerUnavailable("OpenD did not tell its accounts at first; connecting again")
        given = self._given
        before = self._chosen_before()
        self._accounts = parse_accounts(rows, given.trade_env, given.acc_id, before)
        if not self._accounts:
            wanted = f"no {given.trade_env} account" + (" with this acc_id" if given.acc_id else "")
            raise BrokerUnavailable(f"The OpenD login has {wanted} (security_firm {self._firm()})")
        firms = {int(row["acc_id"]): str(row["security_firm"]) for row in rows}
        chosen = before | {account.acc_id: firms[account.acc_id] for account in self._accounts}
        if chosen != before and not given.acc_id:
            new = self.data_dir / f"{ACCOUNTS}.new"
            with suppress(OSError):  # a full disk: they are chosen anew after the next connection
                new.write_text(
                    "\n".join(f"{acc_id} {chosen[acc_id]}" for acc_id in chosen), "utf-8"
                )
                new.replace(self.data_dir / ACCOUNTS)

    def _chosen_before(self) -> dict[int, str]:
        """Account id → its security firm, in the order they were chosen."""
        try:
            lines = (self.data_dir / ACCOUNTS).read_text("utf-8").splitlines()
            parts = [line.partition(" ") for line in lines]
            return {int(acc_id): firm for acc_id, _, firm in parts}
        except (OSError, ValueError):
            return {}

    def _firm(self) -> str:
        """The configured one, else that of the accounts chosen before: the SDK would take the one
        that is first in OpenD's list by now (trade/open_trade_context.py:198)."""
        if self._given.security_firm != "N/A" or self._given.acc_id:
            return self._given.security_firm
        known = self._chosen_before().values()
        return next((firm for firm in known if firm not in ("", "N/A")), "N/A")

    def close(self) -> None:
        if self._context is not None:
            futu_sdk.close_context(self._context)

    abort = close

    # --- orders -------------------------------------------------------------------------------
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
        mark: str = "",
        **kwargs: Any,
    ) -> str:
        account = self._account(contract.region)
        american = contract.region == "US"
        order_id: str = self._change(
            "place",
            self._context.place_order,
            acc_id=account.acc_id,
            code=to_code(contract),
            trd_side=direction,
            order_type=TO_ORDER_TYPE[order_type],
            qty=qty,
            price=price or 0.0,  # required and ignored for market orders (qa/trade.html Q9)
            time_in_force=time_in_force.name,
            session=TO_SESSION[lifecycle] if american else "N/A",
            fill_outside_rth=american and lifecycle is Lifecycle.ETH,
            remark=mark or None,
        )
        if not order_id:
            raise OutcomeUnknown("OpenD took the order and gave no order id")
        self._account_of[order_id] = account
        return order_id

    def cancel_order(self, order_id: str) -> None:
        known = account = self._account_of.get(order_id)
        if account is None and len(self._accounts) == 1:
            account = self._accounts[0]
        try:
            account = account or self._find(order_id)[1]
        except TimedOut:
            raise BrokerUnavailable("OpenD did not tell whose it is; nothing was sent") from None
        try:
            self._change(
                "cancel",
                self._context.modify_order,
                acc_id=account.acc_id,
                modify_order_op="CANCEL",
                order_id=order_id,
                qty=0,
                price=0,
            )
        except Rejected as refused:
            try:
                with self._context.within(EXPLAINED_WITHIN):
                    order = self._find(order_id)[0].order
            except HttpTradingError as error:
                if known is None and isinstance(error, OrderNotFound):
                    raise  # says more than the refusal
                raise refused from None
            if order.is_completed:
                raise Rejected(f"The order is finished already: {refused.text}") from None
            raise

    def order(self, order_id: str) -> OrderReport:
        return self._find(order_id)[0]

    def recent_orders(self) -> list[OrderReport]:
        """Open and today's orders from the server, and what is finished of the last LISTING_DAYS:
        the list of today's has nothing from before midnight."""
        found: dict[str, OrderReport] = {}
        try:
            for account in self._accounts:
                self.take(self._window("orders", account))
                rows = self._rows(self._context.order_list_query, account, refresh_cache=True)
                rows = self._history(account, LISTING_DAYS) + rows
                found |= {one.order.order_id: one for one in self._reports(rows, account)}
        except RateLimited:
            # OpenD's own memory is not limited. It is no listing, but an order whose outcome is
            # not known yet may be in it, and others may use the windows up for long.
            if time.monotonic() - self._shown >= SHOWN_SECONDS:
                self._shown = time.monotonic()
                for account in self._accounts:
                    rows = self._rows(self._context.order_list_query, account)
                    self.report(*self._reports(rows, account))
            raise
        return list(found.values())

    def _reports(self, rows: list[dict[str, Any]], account: Account) -> list[OrderReport]:
        reports = (self._remember(row, account) for row in rows)
        return [report for report in reports if report is not None]

    def listed_since(self, now: datetime) -> datetime:
        """The dates of a listing are tomorrow's and back, and days of the market: one that is
        behind our own time zone has begun its first up to a day later."""
        return now - timedelta(days=LISTING_DAYS - 3)

    def fills(self, order_id: str) -> list[Fill]:
        if self._given.trade_env == "SIMULATE":
            raise Unsupported("Paper accounts at Futu have no list of fills")  # qa/trade.html Q1
        report, account = self._find(order_id)
        today = _fills_of(report, self._rows(self._context.deal_list_query, account))
        if sum(fill.qty for fill in today) >= report.order.filled_qty:
            return today
        self.take(self._window("fills", account))
        rows = self._rows(self._context.history_deal_list_query, account, **_dates(HISTORY_DAYS))
        found = {fill.fill_id: fill for fill in [*_fills_of(report, rows), *today]}
        return list(found.values())

    def _find(self, order_id: str) -> tuple[OrderReport, Account]:
        """Open and today's orders first (OpenD's own memory, not limited), then 90 days back."""
        known = self._account_of.get(order_id)
        accounts = [known] if known else self._accounts
        for account in accounts:
            rows = self._rows(self._context.order_list_query, account, order_id=order_id)
            for row in rows:
                if row["order_id"] == order_id and (report := self._remember(row, account)):
                    return report, account
        for account in accounts:
            for row in self._history(account, HISTORY_DAYS):
                if row["order_id"] == order_id and (report := self._remember(row, account)):
                    return report, account
        raise OrderNotFound(f"{self.broker_display} knows no order {order_id}")

    def _history(self, account: Account, days: int) -> list[dict[str, Any]]:
        self.take(self._window("history", account))
        return self._rows(self._context.history_order_list_query, account, **_dates(days))

    def _remember(self, row: Mapping[str, Any], account: Account) -> OrderReport | None:
        report = parse_order(row)
        if report is not None:
            self._account_of[report.order.order_id] = account
        return report

    # --- money and holdings -------------------------------------------------------------------
    def cash(self, currency: str = "USD") -> Cash:
        if currency not in CASH_FIELDS:
            known = ", ".join(CASH_FIELDS)
            raise Unsupported(f"{self.broker_display} does not tell cash in {currency}: {known}")
        region = MARKET_OF_CURRENCY.get(currency, "")
        account = next((one for one in self._accounts if one.serves(region)), self._accounts[0])
        shown = "CNH" if currency == "CNY" else currency
        rows = self._current("cash", self._context.accinfo_query, account, currency=shown)
        alone = len(account.markets) == 1 and account.serves(region)
        amount = parse_cash(rows[0], currency, alone)
        if amount is None:
            raise Unsupported(
                f"No {self._given.trade_env} account of this login tells its cash in {currency}"
            )
        return Cash(currency, amount)

    def positions(self) -> list[Position]:
        found = []
        for account in self._accounts:
            rows = self._current("positions", self._context.position_list_query, account)
            # A position told twice is one: its id is its own (Trd_Common.proto).
            once = {(row["position_id"], row["code"]): row for row in rows}
            found += [
                parse_position(row, self.broker_name, self.broker_display) for row in once.values()
            ]
        return [position for position in found if position is not None]

    # --- market -------------------------------------------------------------------------------
    def quote(self, contract: Contract) -> Quote:
        context, code = self._context, to_code(contract)
        rows = self._ask(context.unpacked, context.get_market_snapshot, [code])
        try:
            quote = next(parse_quote(row, contract) for row in rows if row["code"] == code)
        except (StopIteration, ValueError):  # no time: it is listed and was never traded
            raise Rejected(f"{self.broker_display} has no quote for {code}") from None
        if quote.latest <= 0:
            raise Rejected(f"{self.broker_display} has no price for {code}")
        return quote

    def market_status(self) -> dict[str, dict[str, MarketStatus]]:
        return {"securities": parse_market_states(self._ask(self._context.get_global_state))}

    def ping(self) -> bool:
        """Whether OpenD is logged in at the trade servers, not merely connected to us."""
        self._check_login()
        return True

    # --- requests -----------------------------------------------------------------------------
    def _account(self, region: str) -> Account:
        for account in self._accounts:
            if account.serves(region):
                return account
        raise Unsupported(f"This login has no {self._given.trade_env} account for region {region}")

    def _window(self, name: str, account: Account) -> str:
        return f"{name} {next((r for r in CURRENCIES if account.serves(r)), 'US')}"

    def _current(
        self, name: str, function: Callable[..., Any], account: Account, **arguments: Any
    ) -> list[dict[str, Any]]:
        """Rows of OpenD's memory, which the first request of a connection refreshes: pushes keep it
        current, and no limit holds the later ones back."""
        first = (name, account.acc_id) not in self._refreshed
        if first:
            self.take(self._window(name, account))
        rows = self._rows(function, account, refresh_cache=first, **arguments)
        self._refreshed.add((name, account.acc_id))
        return rows

    def _rows(
        self, function: Callable[..., Any], account: Account, **arguments: Any
    ) -> list[dict[str, Any]]:
        """The rows of one of the SDK's list queries."""
        arguments |= {"trd_env": self._given.trade_env, "acc_id": account.acc_id}
        rows: list[dict[str, Any]] = self._ask(self._context.unpacked, function, **arguments)
        return rows

    def _change(self, window: str, function: Callable[..., Any], **arguments: Any) -> Any:
        """Places or cancels; when OpenD refuses because trading is locked, unlocks and asks again.

        The refusal proves that nothing was done, so this is no second order.
        """
        arguments["trd_env"] = self._given.trade_env
        try:
            return self._ask(self._context.unpacked, function, changes=True, **arguments)
        except _Locked:
            self._unlock()
            self.take(window)
            time.sleep(self.windows[window].gap)
            return self._ask(self._context.unpacked, function, changes=True, **arguments)

    def _unlock(self) -> None:
        """Unlocking is a state of OpenD, for all its clients, until it restarts (unlock.html)."""
        if not self._given.unlock_pin:
            raise Rejected(
                "Trading is locked in OpenD, and nothing was sent to the market: unlock it there, "
                "or configure unlock_pin"
            )
        if words := self._refused_pin():
            raise Rejected(words)
        self.take("unlock")
        try:
            self._ask(self._context.unlock_trade, password_md5=self._given.unlock_pin)
        except Rejected as refused:
            words = f"OpenD refused to unlock trading, nothing was sent to the market: {refused}"
            if WRONG_PIN.search(refused.text):
                words += ". unlock_pin is not tried again before the service is restarted"
                (self.data_dir / PIN_REFUSAL).write_text(f"{self._life}\n{words}", "utf-8")
            raise Rejected(words) from None
        except TimedOut as error:
            raise BrokerUnavailable(
                f"OpenD did not unlock trading, nothing was sent to the market: {error.text}"
            ) from None

    def _refused_pin(self) -> str:
        """OpenD's words when it refused the pin to a copy of this prototype, in whatever process:
        Futu locks an account after a few wrong ones."""
        try:
            life, _, words = (self.data_dir / PIN_REFUSAL).read_text("utf-8").partition("\n")
        except FileNotFoundError:
            return ""
        return words if life == self._life else ""

    def _ask(
        self,
        function: Callable[..., Any],
        *args: Any,
        changes: bool = False,
        check_login: bool = True,
        **arguments: Any,
    ) -> Any:
        """One request; its data, or the error that OpenD's answer or silence means."""
        context = self._context
        context.begin()
        ret, data = function(*args, **arguments)
        if ret == 0:
            return data
        if context.answer is not None and context.answer[0]:
            words = str(context.answer[1])
            if context.answer[0] == REFUSED and not DOUBTFUL.search(words):
                raise self._refusal(words, check_login)
            if changes:
                raise OutcomeUnknown(f"OpenD could not say what became of it: {words}")
            raise TimedOut(f"OpenD could not answer: {words}")
        if context.answer is None and str(data) in futu_sdk.NOT_SENT:
            raise BrokerUnavailable("The connection to OpenD is broken")
        if not context.packed:
            raise Unsupported(
                f"The {self.package} SDK does not take this request; nothing was sent"
            )
        if not context.hurried:
            self.lost("OpenD does not answer as it should")
        if changes:
            raise OutcomeUnknown("Sent to OpenD, but no clear answer came back")
        raise TimedOut("OpenD gave no clear answer in time")

    def _refusal(self, words: str, check_login: bool) -> Exception:
        """What OpenD's refusal means; a refused request was not done."""
        if OFTEN.search(words):
            seconds = re.search(r"(\d+)\s*(秒|s)", words)
            return RateLimited(words, retry_after=float(seconds[1]) if seconds else 30.0)
        if LOCKED.search(words):
            return _Locked(words)
        if check_login:
            try:
                with self._context.within(EXPLAINED_WITHIN):
                    self._check_login()
            except BrokerUnavailable:
                raise
            except HttpTradingError:
                pass  # what OpenD said first stands
        return Rejected(words or "OpenD refused without giving a reason")

    # --- pushes, on the SDK's callback thread -------------------------------------------------
    def _listen(self, sdk: Any) -> None:
        accounts = {account.acc_id: account for account in self._accounts}

        def on_order(row: Mapping[str, Any], acc_id: int) -> None:
            account = accounts.get(acc_id)
            if account is not None and (report := self._remember(row, account)) is not None:
                self.report(report)
                self.stale()

        def on_fill(row: Mapping[str, Any], acc_id: int) -> None:
            if acc_id in accounts and (fill := parse_fill(row)) is not None:
                self.report_fills(fill)

        orders, fills = sdk.TradeOrderHandlerBase, sdk.TradeDealHandlerBase
        pushed = sdk.trade.trade_query
        for handler in (
            futu_sdk.row_handler(orders, pushed.UpdateOrderPush, on_order),
            futu_sdk.row_handler(fills, pushed.UpdateDealPush, on_fill),
        ):
            self._context.set_handler(handler)


@broker_register("moomoo", "moomoo")
class Moomoo(Futu):
    """Futu's international brand: the same OpenD and protocol, the SDK package `moomoo`."""

    package: ClassVar[str] = "moomoo"
    sdk: ClassVar[str] = "moomoo-api"


def _logged_in(state: Mapping[str, Any], connection: str) -> bool:
    login = state["qot_logined"] if connection == "quote" else state["trd_logined"]
    return bool(login) and state["program_status_type"] in futu_sdk.READY


def _fills_of(report: OrderReport, rows: list[dict[str, Any]]) -> list[Fill]:
    mine = (
        parse_fill(row, report.contract) for row in rows if row["order_id"] == report.order.order_id
    )
    return [fill for fill in mine if fill is not None]


def _dates(days: int) -> dict[str, str]:
    """A range for the history queries: up to tomorrow, since the SDK takes the local date."""
    tomorrow = datetime.now().date() + timedelta(days=1)
    return {"start": str(tomorrow - timedelta(days=days - 1)), "end": str(tomorrow)}
