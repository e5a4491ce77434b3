"""Futu's words and ours: the tables, and pure translations of what the SDK shows.

Facts: https://openapi.futunn.com/futu-api-doc/ (pages named where used) and the SDK's own source
(futu-api 10.11, paths below `futu/`); summed up in docs/brokers/futu.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from httptrading.brokers.base import combine
from httptrading.errors import Unsupported
from httptrading.model import (
    CURRENCIES,
    Contract,
    Fill,
    Lifecycle,
    MarketStatus,
    Number,
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
from httptrading.tickers import canonical_ticker, cn_exchange, currency_of

TO_ORDER_TYPE = {OrderType.Limit: "NORMAL", OrderType.Market: "MARKET"}
FROM_ORDER_TYPE = {word: ours for ours, word in TO_ORDER_TYPE.items()}
DIRECTIONS = {"BUY": "BUY", "BUY_BACK": "BUY", "SELL": "SELL", "SELL_SHORT": "SELL"}
FROM_TIME_IN_FORCE = {"DAY": TimeInForce.DAY, "GTC": TimeInForce.GTC}
TO_SESSION = {Lifecycle.RTH: "RTH", Lifecycle.ETH: "ETH", Lifecycle.OVERNIGHT: "OVERNIGHT"}
FROM_SESSION = {word: ours for ours, word in TO_SESSION.items()}

# Order status (common/constant.py:1591, Trd_Common.proto OrderStatus). Every other one is open:
# TIMEOUT means that the result is not known yet.
CANCELED = {"CANCELLED_PART", "CANCELLED_ALL"}
PENDING_CANCEL = {"CANCELLING_PART", "CANCELLING_ALL"}
FAILED = {"SUBMIT_FAILED", "FAILED", "DISABLED", "DELETED", "FILL_CANCELLED"}

# Market state (qa/quote.html Q14). What is not listed is UNKNOWN: before the open, the auctions,
# futures and index options only, and numbers the SDK has no name for.
MARKET_STATES = {
    "MORNING": UnifiedStatus.RTH,
    "AFTERNOON": UnifiedStatus.RTH,
    "REST": UnifiedStatus.REST,
    "CLOSED": UnifiedStatus.CLOSED,
    "PRE_MARKET_BEGIN": UnifiedStatus.PRE_HOURS,
    "AFTER_HOURS_BEGIN": UnifiedStatus.AFTER_HOURS,
    "AFTER_HOURS_END": UnifiedStatus.CLOSED,
    "OVERNIGHT": UnifiedStatus.OVERNIGHT,
    "HK_CAS": UnifiedStatus.CLOSED,
    "ASHARE_AFTER_HOURS_WAIT": UnifiedStatus.CLOSED,
    "ASHARE_AFTER_HOURS_BEGIN": UnifiedStatus.AFTER_HOURS,
    "ASHARE_AFTER_HOURS_END": UnifiedStatus.CLOSED,
    "STIB_AFTER_HOURS_WAIT": UnifiedStatus.CLOSED,  # the same three, as older SDKs call them
    "STIB_AFTER_HOURS_BEGIN": UnifiedStatus.AFTER_HOURS,
    "STIB_AFTER_HOURS_END": UnifiedStatus.CLOSED,
}
OPENNESS = [UnifiedStatus.RTH, UnifiedStatus.AFTER_HOURS, UnifiedStatus.REST, UnifiedStatus.UNKNOWN]

TRADE_MARKETS = {"US": {"US"}, "HK": {"HK"}, "CN": {"HKCC", "CN"}}  # REAL, paper account
REGION_OF_MARKET = {"US": "US", "HK": "HK", "SH": "CN", "SZ": "CN"}
REGION_OF_TRADE_MARKET = {
    market: region for region, markets in TRADE_MARKETS.items() for market in markets
}
ZONES = {"US": "America/New_York", "HK": "Asia/Hong_Kong", "CN": "Asia/Shanghai"}
SECURITY_FIRMS = {  # common/constant.py:3200; N/A: the first real account's
    "N/A",
    "FUTUSECURITIES",
    "FUTUINC",
    "FUTUSG",
    "FUTUAU",
    "FUTUCA",
    "FUTUMY",
    "FUTUJP",
}
CASH_FIELDS = {  # trade/get-funds.html: the real balance in each currency
    "USD": "us_cash",
    "HKD": "hk_cash",
    "CNH": "cn_cash",
    "CNY": "cn_cash",
    "SGD": "sg_cash",
    "JPY": "jp_cash",
    "AUD": "au_cash",
    "CAD": "ca_cash",
    "MYR": "my_cash",
}
MARKET_OF_CURRENCY = {"USD": "US", "HKD": "HK", "CNH": "CN", "CNY": "CN"}
REAL = combine(
    ["US"], [OrderType.Limit], TimeInForce, [Lifecycle.RTH, Lifecycle.ETH, Lifecycle.OVERNIGHT]
)
REAL |= combine(["US"], [OrderType.Market], TimeInForce, [Lifecycle.RTH])
REAL |= combine(["HK", "CN"], [OrderType.Limit], TimeInForce, [Lifecycle.RTH])
REAL |= combine(["HK"], [OrderType.Market], [TimeInForce.DAY], [Lifecycle.RTH])
# Paper accounts: the day only, regular hours only (qa/trade.html Q1).
SIMULATE = combine(["US", "HK", "CN"], OrderType, [TimeInForce.DAY], [Lifecycle.RTH])


@dataclass(frozen=True)
class Arguments:
    """The arguments of `Futu`, checked; `unlock_pin` in lower case, as OpenD wants it."""

    host: str
    port: int
    trade_env: str
    pk_path: str
    unlock_pin: str = field(repr=False)
    security_firm: str
    acc_id: int


ARGUMENTS = frozenset(one.name for one in fields(Arguments))


def parse_arguments(given: Mapping[str, Any]) -> Arguments:
    """ValueError in a sentence that never shows a value: it may be a secret in the wrong place."""
    # int() would make 1 of 1.5 and of true; and getaddrinfo, port 4464 of 70000.
    port, acc_id = (str(given.get(name) or 0).strip() for name in ("port", "acc_id"))
    if not re.fullmatch("[0-9]{1,20}", port) or not re.fullmatch("[0-9]{1,20}", acc_id):
        raise ValueError("port and acc_id are whole numbers")
    if int(port) > 65535:
        raise ValueError("port is at most 65535")
    found = Arguments(
        host=str(given.get("host") or "127.0.0.1"),
        port=int(port) or 11111,
        trade_env=str(given.get("trade_env") or ""),
        pk_path=str(given.get("pk_path") or ""),
        unlock_pin=str(given.get("unlock_pin") or "").lower(),
        security_firm=str(given.get("security_firm") or "N/A"),
        acc_id=int(acc_id),
    )
    if found.trade_env not in ("REAL", "SIMULATE"):
        raise ValueError("trade_env is REAL or SIMULATE")
    if found.unlock_pin and not re.fullmatch(r"[0-9a-f]{32}", found.unlock_pin):
        raise ValueError("unlock_pin is the MD5 of the trading password: 32 hex digits")
    if found.security_firm not in SECURITY_FIRMS:
        raise ValueError(f"security_firm is one of {', '.join(sorted(SECURITY_FIRMS))}")
    return found


# --- pure translations ------------------------------------------------------------------------
def number(value: Any) -> Number:
    """A double of the wire, whole where it is whole; 0 where the SDK says `N/A`. A NaN stays one:
    as a holding it is not 0, and checked.py lets it go no further."""
    if isinstance(value, str):
        return 0
    return int(value) if float(value).is_integer() else float(value)


def known(value: Any) -> Number:
    """0, which means that it is not known, for what is no number as well."""
    found = number(value)
    return found if math.isfinite(found) else 0


def to_code(contract: Contract) -> str:
    """`US.BRK.B`, `HK.00700`, `SZ.000001` (qa/quote.html Q15)."""
    try:
        market = cn_exchange(contract.ticker) if contract.region == "CN" else contract.region
    except ValueError as error:  # Beijing has no market at Futu (common/constant.py:423)
        raise Unsupported(str(error)) from None
    return f"{market}.{contract.ticker}"


def to_contract(code: str, trade_market: str) -> Contract | None:
    """None for what is no security of the three regions: options, futures, other markets.

    `trade_market` tells the region where the code has none (`N/A.AAPL`): secMarket is an optional
    field of orders, fills and positions (Trd_Common.proto).
    """
    market, _, ticker = code.partition(".")
    region = REGION_OF_MARKET.get(market, "")
    if market == "N/A":
        region = REGION_OF_TRADE_MARKET.get(trade_market, "")
    try:
        return Contract(TradeType.Securities, canonical_ticker(region, ticker), region)
    except ValueError:
        return None


def parse_time(text: str, region: str) -> datetime:
    """`2026-03-02 09:30:00[.123]` in the market's own time (US: New York); ValueError for what is
    no time."""
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(ZONES[region]))


def parse_order(row: Mapping[str, Any]) -> OrderReport | None:
    """A row of an order list or a push; None when it is no order for a security. One with the
    gateway's mark is never left out, whatever its row lacks: it would count as not placed."""
    contract = to_contract(row["code"], row["order_market"])
    mark = str(row["remark"] or "")
    if contract is None and not mark.startswith("ht"):  # Journal.mark
        return None
    status = str(row["order_status"])
    words = str(row["last_err_msg"] or "")
    failure = f"{status}: {words}" if words else status
    currency = str(row["currency"])
    usual = CURRENCIES[contract.region] if contract else ""
    order = Order(
        order_id=str(row["order_id"]),
        currency=currency if currency in CASH_FIELDS else usual,
        qty=known(row["qty"]),
        filled_qty=known(row["dealt_qty"] or (status == "FILLED_ALL" and row["qty"])),  # optional
        avg_price=known(row["dealt_avg_price"]),
        error_reason=failure if status in FAILED else "",
        is_canceled=status in CANCELED,
        is_pending_cancel=status in PENDING_CANCEL,
    )
    order_type = FROM_ORDER_TYPE.get(row["order_type"])
    session = FROM_SESSION.get(row["session"])
    if session is None:
        session = Lifecycle.ETH if row["fill_outside_rth"] is True else Lifecycle.RTH
    time = None
    with suppress(ValueError):  # the order is told all the same, and with it all others
        time = parse_time(row["create_time"], contract.region) if contract else None
    return OrderReport(
        order,
        mark=mark,
        contract=contract,
        direction=DIRECTIONS.get(row["trd_side"]),
        order_type=order_type,
        price=known(row["price"]) if order_type is OrderType.Limit else None,
        time_in_force=FROM_TIME_IN_FORCE.get(row["time_in_force"]),
        lifecycle=session,
        time=time,
    )


def parse_fill(row: Mapping[str, Any], order: Contract | None = None) -> Fill | None:
    """None when it is no fill of a security, and when a push does not tell its order, which the
    list of fills does. `order`: what that was for. One that was cancelled (OrderFillStatus) has the
    quantity 0."""
    contract = to_contract(row["code"], row["deal_market"]) or order
    if contract is None or row["order_id"] in ("", "N/A"):
        return None
    return Fill(
        fill_id=str(row["deal_id"]),
        order_id=str(row["order_id"]),
        qty=0 if row["status"] == "CANCELLED" else number(row["qty"]),
        price=number(row["price"]),
        time=parse_time(row["create_time"], contract.region),
    )


def parse_position(row: Mapping[str, Any], broker: str, display: str) -> Position | None:
    """None for other things than securities, and for what was closed today (quantity 0)."""
    contract = to_contract(row["code"], row["position_market"])
    qty: Any = number(row["qty"])
    if contract is None or not qty:
        return None
    currency = str(row["currency"])
    short = row["position_side"] == "SHORT"
    return Position(
        broker,
        display,
        contract,
        Unit.Share,
        currency if currency in CASH_FIELDS else CURRENCIES[contract.region],
        -abs(qty) if short else qty,
    )


def parse_cash(row: Mapping[str, Any], currency: str, alone: bool) -> Number | None:
    """What is held in one currency; None when the account does not tell.

    `cash` is everything converted into one currency, so it counts only for an account of this
    currency `alone` that lists none: a paper account, or an old real one.
    """
    listed = {
        name: row[column]
        for name, column in CASH_FIELDS.items()
        if not isinstance(row[column], str)
    }
    if listed:
        return number(listed.get(currency, 0))
    return number(row["cash"]) if alone else None


def parse_quote(row: Mapping[str, Any], contract: Contract) -> Quote:
    """ValueError when it has no time."""
    return Quote(
        contract=contract,
        currency=currency_of(contract.region, contract.ticker),  # a snapshot does not tell it
        is_tradable=row["sec_status"] in ("NORMAL", "N/A") and not row["suspension"],
        latest=known(row["last_price"]),
        pre_close=known(row["prev_close_price"]),
        open_price=known(row["open_price"]),
        high_price=known(row["high_price"]),
        low_price=known(row["low_price"]),
        time=parse_time(row["update_time"], contract.region),
    )


def parse_market_states(state: Mapping[str, Any]) -> dict[str, MarketStatus]:
    """Of Shanghai and Shenzhen the one that is more open speaks for CN."""
    by_region: dict[str, MarketStatus] = {}
    for market, region in REGION_OF_MARKET.items():
        word = str(state[f"market_{market.lower()}"])
        status = MarketStatus(region, word, MARKET_STATES.get(word, UnifiedStatus.UNKNOWN))
        known = by_region.setdefault(region, status)
        if _openness(status) < _openness(known):
            by_region[region] = status
    return by_region


def _openness(status: MarketStatus) -> int:
    unified = status.unified_status
    return OPENNESS.index(unified) if unified in OPENNESS else len(OPENNESS)


@dataclass(frozen=True)
class Account:
    """A trading account; `markets` in the SDK's words (US, HK, HKCC for Stock Connect, CN)."""

    acc_id: int
    markets: tuple[str, ...]

    def serves(self, region: str) -> bool:
        return (
            bool({"HKCC", "CN"} & set(self.markets)) if region == "CN" else region in self.markets
        )


def parse_accounts(
    rows: Iterable[Mapping[str, Any]], env: str, acc_id: int, before: Iterable[int] = ()
) -> list[Account]:
    """The accounts orders go to: for each region the first active one of this environment that
    trades stocks there, as they were `before`: the list's order changes when an account is opened
    or closed (get-funds.html on acc_index). What lies in others is not shown, since it cannot be
    sold from here.

    SIMULATE lists accounts for options, futures and competitions beside those for stocks, FUTUJP
    one for derivatives, which has the US for its options. A MASTER of other accounts comes last:
    it may not place orders (place_order.py of Futu's own skill futuapi).
    """
    places = {known: place for place, known in enumerate(before)}

    def rank(row: Mapping[str, Any]) -> tuple[bool, int]:
        return row["acc_role"] == "MASTER", places.get(int(row["acc_id"]), len(places))

    fit = [
        Account(int(row["acc_id"]), tuple(row["trdmarket_auth"]))
        for row in sorted(rows, key=rank)
        if row["trd_env"] == env
        and row["acc_status"] != "DISABLED"
        and row["acc_role"] != "IPO"
        and row["acc_type"] != "DERIVATIVES"
        and (env == "REAL" or row["sim_acc_type"] in ("STOCK", "STOCK_AND_OPTION", "N/A"))
        and (not acc_id or int(row["acc_id"]) == acc_id)
    ]
    firsts = {next((one for one in fit if one.serves(region)), None) for region in TRADE_MARKETS}
    return [account for account in dict.fromkeys(fit) if account in firsts]  # told twice: once
