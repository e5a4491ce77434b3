"""What Tiger's words and numbers mean: tables, and pure functions from the SDK's objects to ours.

Sources: the SDK's code (file:line of tigeropen 3.8.0) and https://docs.itigerup.com/docs/
(error-code, place-order, quote-common). docs/brokers/tiger.md has the same tables for people.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal, InvalidOperation
from typing import Any

from httptrading.brokers import tiger_http
from httptrading.brokers.base import combine
from httptrading.errors import HttpTradingError, OrderNotFound, Rejected
from httptrading.model import (
    CURRENCIES,
    Contract,
    Fill,
    Lifecycle,
    Number,
    Order,
    OrderReport,
    OrderType,
    Quote,
    TimeInForce,
    TradeType,
    UnifiedStatus,
)
from httptrading.tickers import canonical_ticker, currency_of

# --- tables -----------------------------------------------------------------------------------
TO_ORDER_TYPE = {OrderType.Limit: "LMT", OrderType.Market: "MKT"}
FROM_ORDER_TYPE = {word: ours for ours, word in TO_ORDER_TYPE.items()}
FROM_TIME_IN_FORCE = {"DAY": TimeInForce.DAY, "GTC": TimeInForce.GTC}

# Lifecycle → (outside_rth, trading_session_type) of a US limit order. Always said: an order
# without outside_rth trades outside regular hours in the US.
TO_SESSION = {
    Lifecycle.RTH: (False, "RTH"),
    Lifecycle.ETH: (True, "PRE_RTH_POST"),
    Lifecycle.OVERNIGHT: (True, "OVERNIGHT"),
}

# What ends an order; every other word (Initial, PendingSubmit, Submitted, PartiallyFilled …, and
# whatever Tiger adds) leaves it open. Beside Tiger's words those of the SDK, which pushes carry as
# well, and Tiger's numbers (common/consts/__init__.py:146, common/util/order_utils.py:246).
FILLED = {"Filled", "FILLED", "6"}
PENDING_CANCEL = {"PendingCancel", "PENDING_CANCEL", "3"}
CANCELED = {"Cancelled", "CANCELLED", "4"}
FAILED = {
    **dict.fromkeys(("Inactive", "REJECTED", "7"), "Rejected"),
    **dict.fromkeys(("Invalid", "EXPIRED", "-2"), "Expired"),
}

MARKET_STATES = {
    "NOT_YET_OPEN": UnifiedStatus.UNKNOWN,
    "PRE_HOUR_TRADING": UnifiedStatus.PRE_HOURS,
    "TRADING": UnifiedStatus.RTH,
    "MIDDLE_CLOSE": UnifiedStatus.REST,
    "POST_HOUR_TRADING": UnifiedStatus.AFTER_HOURS,
    "OVERNIGHT_TRADING": UnifiedStatus.OVERNIGHT,
    "CLOSING": UnifiedStatus.CLOSED,
    "EARLY_CLOSING": UnifiedStatus.CLOSED,
    "EARLY_CLOSED": UnifiedStatus.CLOSED,
    "MARKET_CLOSED": UnifiedStatus.CLOSED,
}

UNTRADABLE = ("HALTED", "DELIST")  # a quote's status; NEW and ALTER trade (quote_client.py:386)

# Tiger holds yuan offshore and knows no CNY (common/consts/__init__.py:78).
TO_CURRENCY = {"CNY": "CNH"}
REGION_OF_MARKET = {
    **{region: region for region in CURRENCIES},
    **{"SEHK": "HK", "SH": "CN", "SZ": "CN", "SSE": "CN", "SZSE": "CN"},
}
REGION_OF_CURRENCY = {"USD": "US", "HKD": "HK", "CNH": "CN", "CNY": "CN"}

LIMIT, MARKET = OrderType.Limit, OrderType.Market
REAL = combine(["US"], [LIMIT], TimeInForce, Lifecycle)
REAL |= combine(["HK"], [LIMIT], TimeInForce, [Lifecycle.RTH])
REAL |= combine(["US", "HK"], [MARKET], [TimeInForce.DAY], [Lifecycle.RTH])
PAPER = frozenset(one for one in REAL if one.time_in_force is TimeInForce.DAY)
"""No GTC for market orders and paper accounts; no extended session for market orders and HK."""

BEIJING = timezone(timedelta(hours=8))  # of transaction times that come without a number
# As Tiger writes them (quote/response/market_status_response.py); CST may be Chicago's or China's.
ZONES = {"EST": "-05:00", "EDT": "-04:00", "HKT": "+08:00", "UTC": "+00:00", "GMT": "+00:00"}
SCALES = range(19)  # of quantities, which are 64-bit integers
YEAR_1973, YEAR_2286 = 10**8, 10**10  # seconds; what lies outside is counted in another unit
NO_TIME = datetime.fromtimestamp(0, UTC)  # of a fill whose time Tiger does not tell


# --- parsing: pure functions ------------------------------------------------------------------
def number(value: Any) -> Number | None:
    """An exact number; None for what is missing: None, NaN, and the SDK's infinite defaults, and
    for what no amount is as large as."""
    try:
        found = Decimal(str(value))
    except InvalidOperation:
        return None
    if not found.is_finite() or found.adjusted() > 30:
        return None
    whole = found == found.to_integral_value()
    return int(found) if whole else found


def scaled(quantity: Any, scale: Any) -> Number:
    """773 with scale 5 is 0.00773 shares; 0 when that is not told."""
    found, digits = number(quantity), number(scale or 0)
    if not found or digits is None or digits not in SCALES:
        return 0
    return number(Decimal(found).scaleb(-int(digits))) or 0


def held(position: Mapping[str, Any]) -> Number | None:
    """`positionQty`; `position` and `positionScale`, which docs.itigerup.com/docs/accounts calls
    deprecated, tell what the former does not. None when nothing is told."""
    told = number(position.get("positionQty"))
    old, scale = position.get("position"), position.get("positionScale")
    if told or number(old) is None or number(scale or 0) not in SCALES:
        return told
    return scaled(old, scale)


def moment(told: Any) -> datetime | None:
    """A time in milliseconds, or in micro- or nanoseconds, or written out in ISO's form with a zone
    (Beijing's if there is none); None for anything else."""
    found = number(told)
    if found is None:
        return _written_moment(str(told or "").strip())
    for unit in (1_000, 1_000_000, 1_000_000_000):
        seconds = Decimal(found) / unit
        if YEAR_1973 < seconds < YEAR_2286:
            return datetime.fromtimestamp(float(seconds), UTC)
    return None


def _written_moment(text: str) -> datetime | None:
    date, _, zone = text.rpartition(" ")
    if zone in ZONES:
        text = f"{date}{ZONES[zone]}"
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=BEIJING)


def order_id_of(value: Any) -> str | None:
    """A global order id (about 4e16) as text; None for 0, None and anything else."""
    text = str(value)
    return text if re.fullmatch(r"[1-9][0-9]{0,18}", text) and int(text) < 2**63 else None


def order_number(order_id: str) -> int:
    """Tiger's global order id. Anything else is no order: the SDK drops a 0 and then takes the
    only order there is, and `int()` reads `1_000`."""
    if order_id_of(order_id) is None:
        raise OrderNotFound("Tiger's order ids are whole numbers; there is no such order")
    return int(order_id)


def contract_of(symbol: Any, market: Any, currency: Any, sec_type: Any = "STK") -> Contract | None:
    """None for what is no stock in a market of ours; an odd ticker stays as Tiger writes it."""
    region = REGION_OF_MARKET.get(str(market))
    if not market:
        region = REGION_OF_CURRENCY.get(str(currency))
    if not region or not symbol or sec_type not in (None, "", "STK"):
        return None
    try:
        ticker = canonical_ticker(region, str(symbol))
    except ValueError:
        ticker = str(symbol)
    return Contract(TradeType.Securities, ticker, region)


def lifecycle_of(outside_rth: Any, session: Any) -> Lifecycle | None:
    """A push does not tell the session: an order outside regular hours may be an overnight one."""
    told = {words: ours for ours, (_, words) in TO_SESSION.items()}
    if session in told:
        return told[session]
    return None if outside_rth or session else Lifecycle.RTH


def order_of(
    order_id: Any, status: str, currency: str, qty: Number, filled: Number, avg: Any, reason: Any
) -> Order:
    """Filled is decided by quantities alone: a partial fill hides behind any status, `Filled` of a
    global account included, and the SDK's computed `Order.status` compares unscaled numbers."""
    done = filled >= qty > 0
    failed = FAILED.get(status, "") if not done else ""
    return Order(
        order_id=str(order_id),
        currency=currency,
        qty=qty,
        filled_qty=filled,
        avg_price=(number(avg) or 0) if filled else 0,
        error_reason=failed and (words(reason) or failed),
        is_canceled=status in CANCELED and not done,
        is_pending_cancel=status in PENDING_CANCEL,
    )


def parse_orders(data: Any) -> tuple[list[OrderReport], str | None]:
    """The orders of an answer, a list of them or the one asked for, and the token of the next page;
    None when there is no data (of a code 0), which is no order. Raises when it makes no sense."""
    if not data:
        return [], None
    listed = data["items"] if "items" in data else [data]
    return [parse_order(one) for one in listed], str(data.get("nextPageToken") or "")


def parse_order(row: Mapping[str, Any]) -> OrderReport:
    """An order as Tiger writes it (trade/response/orders_response.py)."""
    status, currency = str(row.get("status")), row.get("currency")
    qty = scaled(row.get("totalQuantity"), row.get("totalQuantityScale"))
    filled = scaled(row.get("filledQuantity"), row.get("filledQuantityScale"))
    if status in FILLED and row.get("filledQuantity") is None:
        filled = qty
    if status in FILLED and not qty and row.get("totalCashAmount"):
        qty = filled  # an order for an amount of money has no other quantity
    order_id, action = order_id_of(row["id"]), row.get("action")
    if order_id is None:
        raise ValueError("an order without an id")
    return OrderReport(
        order_of(
            order_id,
            status,
            str(currency or ""),
            qty,
            filled,
            row.get("avgFillPrice"),
            row.get("remark"),
        ),
        mark=str(row.get("userMark") or ""),
        contract=contract_of(row.get("symbol"), row.get("market"), currency, row.get("secType")),
        direction=action if isinstance(action, str) else None,
        order_type=FROM_ORDER_TYPE.get(str(row.get("orderType"))),
        price=number(row.get("limitPrice")) or None,  # a market order's is 0.0
        time_in_force=FROM_TIME_IN_FORCE.get(str(row.get("timeInForce"))),
        lifecycle=lifecycle_of(row.get("outsideRth"), row.get("tradingSessionType")),
        time=moment(row.get("openTime")),
    )


def parse_push(data: Any) -> OrderReport:
    """An OrderStatusData message (push/pb/OrderStatusData.proto); absent fields are 0 or ""."""
    qty = scaled(data.totalQuantity, data.totalQuantityScale)
    filled = scaled(data.filledQuantity, data.filledQuantityScale)
    return OrderReport(
        order_of(
            data.id, data.status, data.currency, qty, filled, data.avgFillPrice, data.errorMsg
        ),
        mark=data.userMark,
        contract=contract_of(data.symbol, data.market, data.currency, data.secType),
        direction=data.action or None,
        order_type=FROM_ORDER_TYPE.get(data.orderType),
        price=number(data.limitPrice) or None,
        time_in_force=FROM_TIME_IN_FORCE.get(data.timeInForce),
        lifecycle=lifecycle_of(data.outsideRth, None),
        time=moment(data.openTime),
    )


def pushed_holding(data: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """What an AssetData or a PositionData message (push/pb) is about, and how much of it is held;
    not what that is worth."""
    if data.DESCRIPTOR.name == "AssetData":
        return (data.segType, data.currency), (data.cashBalance,)
    which = data.secType, data.market, data.symbol, data.identifier
    return which, (data.position, data.positionScale, data.positionQty)


def parse_fill(transaction: Any) -> Fill:
    """Raises when an id, a quantity or a price is not told: recorded without its id a fill counts
    twice, with a quantity of 0 it counts as taken back."""
    told = moment(getattr(transaction, "transaction_time", None))
    told = told or moment(getattr(transaction, "transacted_at", None)) or NO_TIME
    qty = scaled(transaction.filled_quantity, transaction.filled_quantity_scale)
    price = number(transaction.filled_price)
    fill_id = transaction.id
    if not (isinstance(fill_id, str | int) and fill_id and qty) or price is None:
        raise ValueError("a fill without id, quantity or price")
    return Fill(str(fill_id), str(transaction.order_id), qty, price, told)


def parse_quote(contract: Contract, brief: Mapping[str, Any]) -> Quote | None:
    """One item of quote_real_time, which tells no currency; None when there is no price or no time
    in it."""
    latest, time = number(brief.get("latestPrice")), moment(brief.get("latestTime"))
    if latest is None or time is None:
        return None
    return Quote(
        contract=contract,
        currency=currency_of(contract.region, contract.ticker),
        is_tradable=brief.get("status") not in UNTRADABLE,
        latest=latest,
        pre_close=number(brief.get("preClose")) or 0,
        open_price=number(brief.get("open")) or 0,
        high_price=number(brief.get("high")) or 0,
        low_price=number(brief.get("low")) or 0,
        time=time,
    )


def rows(listed: Any) -> list[Mapping[str, Any]]:
    """The objects of a JSON list; none when it is no list."""
    return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []


def items_of(data: Any) -> list[Mapping[str, Any]] | None:
    """`items` of an answer, which the SDK reads as empty when there is no data; None when it makes
    no sense."""
    if not data:
        return []
    items = data.get("items") or [] if isinstance(data, dict) else None
    return items if isinstance(items, list) and len(rows(items)) == len(items) else None


def prime_cash(assets: Any, currency: str) -> Number | None:
    """`cashAvailableForTrade` of securities, which Tiger's own app shows as 可用资金."""
    segments = rows(assets.get("segments")) if isinstance(assets, dict) else []
    segment = next((one for one in segments if one.get("category") == "S"), None)
    if segment is None:
        return None
    if assets_of := rows(segment.get("currencyAssets")):
        held = next((one for one in assets_of if one.get("currency") == currency), None)
        if held is None:  # 0 only when it is none of those told
            return 0 if all(one.get("currency") for one in assets_of) else None
        available = held.get("cashAvailableForTrade")
        return number(held.get("cashBalance") if available is None else available)
    told = segment.get("cashAvailableForTrade")
    return number(told) if segment.get("currency") == currency else None


def global_cash(account: Any, currency: str) -> Number | None:
    """`available_funds` in the account's own currency, the cash balance in another."""
    if currency == (account.summary.currency or "USD"):
        return number(account.summary.available_funds)
    if currency not in account.market_values:
        return 0
    return number(account.market_values[currency].cash_balance)


SIGNATURE = ("verify signature", "sign check error", "public key error", "developer information")
"""Words of code 1000 (docs.itigerup.com/docs/error-code and /docs/faq)."""

BAD_SIGNATURE = (
    "Tiger does not accept the signature; check tiger_id and pk_path, and that the key is the one "
    "registered on Tiger's site"
)


def words(text: Any) -> str:
    """The broker's words, fit for one line."""
    return " ".join(str(text or "").split())[:300]


TOO_OFTEN = ("rate limit", "too_many_requests", "requestrateexceedlimit", "rate exceeded")
"""Words of what Tiger has not done because it was asked too often: of the gateway, and from behind
it, where an account's orders, changes and cancellations are counted together (Tiger's own tests of
its SDKs wait and repeat place_order after them: openapi-python-sdk, tests/integ/_helpers.py)."""

IN_DOUBT = ("internal_error", "duplicate order id")
"""Words of answers from behind the gateway that leave open whether an order was taken. The first
goes on "A system error occurred, please try again later": Tiger's own Java SDK asks again after it,
except when it was an order (client/util/HttpUtils.java, client/https/client/TigerHttpClient.java).
"""


def refusal(code: int, said: str) -> HttpTradingError | None:
    """What a refusal means; None when it leaves open whether something was done.

    docs.itigerup.com/docs/error-code: 1 server error, 2 network time-out behind the gateway,
    4 access forbidden, 5 rate limit, 1000 common and 1010 business parameter, 1100 global, 1200
    prime, 1300 paper account. The texts tell apart what shares a code.
    """
    lower = said.lower()
    if code == 5 or any(one in lower for one in TOO_OFTEN):
        return tiger_http.rate_limited(said)
    if code == 4 and "permission" in lower:
        return Rejected(f"Tiger: {said}")
    if code == 4:
        return Rejected(f"Tiger denies access ({said})")
    if code == 1000 and any(one in lower for one in SIGNATURE):
        return Rejected(BAD_SIGNATURE)
    if code < 1000 or any(one in lower for one in IN_DOUBT):
        return None
    return Rejected(f"Tiger: {said}")


def is_unknown_order(refused: Rejected) -> bool:
    """`1200 standard account response error(not_found:Order does not exist)`, `BAD_REQUEST:Order
    does not exist`, `order is not exist`, `not_found:订单不存在`: said of an order that is looked
    for or cancelled, not placed."""
    said = refused.text.lower()
    return any(one in said for one in ("order does not exist", "order is not exist", "订单不存在"))


def is_device_denied(denied: Rejected) -> bool:
    """`4000:permission denied(Current device does not have permission)`, and of a market without a
    subscription `(Current user and device do not have permissions in the US market)`."""
    return "permission" in denied.text.lower() and "device" in denied.text.lower()


def what_became(order: Order) -> str:
    if order.is_filled:
        return "filled"
    return order.error_reason or "cancelled"
