"""LongPort's words and ours: symbols, orders, money, refusals, as tables and pure functions.

Rows are those of LongPort's REST answers; sources: docs/brokers/longbridge.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from httptrading.brokers.longbridge_rest import UNREADABLE, NoAnswer, Refused
from httptrading.errors import BrokerUnavailable, RateLimited, Rejected, Unsupported
from httptrading.model import (
    CURRENCIES,
    Contract,
    Fill,
    Lifecycle,
    Order,
    OrderReport,
    OrderType,
    TimeInForce,
    TradeType,
)
from httptrading.tickers import currency_of

log = logging.getLogger("httptrading.longbridge")

_Result = TypeVar("_Result")

TO_LONGPORT = {
    OrderType.Limit: "LO",
    OrderType.Market: "MO",
    TimeInForce.DAY: "Day",
    TimeInForce.GTC: "GTC",
    Lifecycle.RTH: "RTH_ONLY",
    Lifecycle.ETH: "ANY_TIME",
    Lifecycle.OVERNIGHT: "OVERNIGHT",
    "BUY": "Buy",
    "SELL": "Sell",
}
FROM_LONGPORT = {word: value for value, word in TO_LONGPORT.items()}

WORKING = {
    "Unknown",
    "NotReported",
    "ReplacedNotReported",
    "ProtectedNotReported",
    "VarietiesNotReported",
    "WaitToNew",
    "New",
    "WaitToReplace",
    "PendingReplace",
    "Replaced",
    "PartialFilled",
    "Filled",
}
PENDING_CANCEL = {"WaitToCancel", "PendingCancel"}
CANCELED = {"Canceled", "PartialWithdrawal"}
FAILED = {"Rejected", "Expired"}
"""Every order status, in the SDK's spelling (openapi.pyi, OrderStatus); REST says some of them with
"Status" at the end. A status of none of these sets counts as Unknown: nothing is claimed. Expired
is the end of a day's order only: LongBridge calls one until cancelled so between two sessions, and
fills it in a later one (TraderAlice/OpenAlice#1126, seen on a live account)."""

OPEN_WORDS = [
    *sorted(WORKING - {"Unknown", "Filled", "New", "PendingReplace", "Replaced", "PartialFilled"}),
    *("NewStatus", "PendingReplaceStatus", "ReplacedStatus", "PartialFilledStatus"),
    *("WaitToCancel", "PendingCancelStatus"),
]

CN_EXCHANGES = (
    # First digits → exchange, the first match counts (docs/brokers/longbridge.md, "Symbols").
    (("92", "43", "83", "87", "88"), ""),
    (("900", "6", "5", "110", "111", "113", "118", "204"), "SH"),
    (("0", "2", "3", "15", "16", "18", "12"), "SZ"),
)


# --- pure: symbols ----------------------------------------------------------------------------
def to_symbol(contract: Contract) -> str:
    """LongPort's symbol; Unsupported for what it has no market for."""
    ticker = contract.ticker
    if contract.region == "US":
        return f"{ticker}.US"
    if contract.region == "HK":
        return f"{ticker.lstrip('0') or '0'}.HK"
    exchange = next((name for starts, name in CN_EXCHANGES if ticker.startswith(starts)), None)
    if not exchange:
        where = "is on the Beijing exchange" if exchange == "" else "is on no exchange it knows"
        raise Unsupported(f"LongBridge has no market for {ticker}: the code {where}")
    return f"{ticker}.{exchange}"


def to_contract(symbol: str) -> Contract | None:
    """None for what is not a security of US, HK or CN (options, SG, …)."""
    ticker, _, market = symbol.upper().rpartition(".")
    if market == "HK" and re.fullmatch(r"\d{1,5}", ticker):
        return Contract(TradeType.Securities, ticker.zfill(5), "HK")
    if market in ("SH", "SZ") and re.fullmatch(r"\d{6}", ticker):
        return Contract(TradeType.Securities, ticker, "CN")
    if market == "US" and re.fullmatch(r"[A-Z0-9]{1,6}([.\-/ ][A-Z0-9]{1,4})?", ticker):
        return Contract(TradeType.Securities, re.sub(r"[\-/ ]", ".", ticker), "US")
    return None


def usual_currency(contract: Contract) -> str | None:
    """The currency by the code alone; None where only LongPort knows (HK has counters in CNY and
    USD beside those in HKD)."""
    if contract.region == "HK":
        return None
    return currency_of(contract.region, contract.ticker)


# --- pure: orders -----------------------------------------------------------------------------
def to_order_body(
    contract: Contract,
    order_type: OrderType,
    time_in_force: TimeInForce,
    lifecycle: Lifecycle,
    direction: str,
    qty: int,
    price: float | None,
    mark: str,
) -> dict[str, str]:
    """The JSON of a placement; all values are strings, so that prices are exact."""
    body = {
        "symbol": to_symbol(contract),
        "order_type": TO_LONGPORT[order_type],
        "side": TO_LONGPORT[direction],
        "submitted_quantity": str(qty),
        "time_in_force": TO_LONGPORT[time_in_force],
    }
    if order_type is OrderType.Limit:
        assert price is not None
        body["submitted_price"] = (
            f"{Decimal(repr(price)).normalize():f}"  # 200, as the SDK writes it
        )
    if contract.region == "US":
        body["outside_rth"] = TO_LONGPORT[lifecycle]
    if mark:
        body["remark"] = mark
    return body


def rows_of(data: Any, key: str) -> list[Any]:
    """The rows of an answer, where the SDK needs a list, too (rust/src/trade/context.rs)."""
    rows = data[key]
    if not isinstance(rows, list):
        raise TypeError("no list")
    return rows


def parse_order(row: Mapping[str, Any]) -> OrderReport:
    """An order as REST lists it, or as `push_row` makes it of a push."""
    status = str(row["status"]).removesuffix("Status")
    time_in_force = _time_in_force(row)
    is_failed = status in FAILED and (status != "Expired" or time_in_force is TimeInForce.DAY)
    message = str(row.get("msg") or "").strip()
    contract = to_contract(str(row["symbol"]))
    price = _number(row.get("price"))
    qty = _required(row, "quantity")
    # Paper accounts call orders Filled without an executed quantity (longbridge/openapi-go#61).
    filled_qty = _number(row.get("executed_quantity")) or (qty if status == "Filled" else 0)
    order = Order(
        order_id=_id(row, "order_id"),
        currency=str(row.get("currency") or ""),
        qty=qty,
        filled_qty=filled_qty,
        avg_price=_number(row.get("executed_price")),
        error_reason=(message or status) if is_failed else "",
        is_canceled=status in CANCELED,
        is_pending_cancel=status in PENDING_CANCEL,
    )
    return OrderReport(
        order,
        mark=str(row.get("remark") or ""),
        contract=contract,
        direction=_known(row.get("side"), str),
        order_type=_known(row.get("order_type"), OrderType),
        price=price or None,
        time_in_force=time_in_force,
        lifecycle=_known(row.get("outside_rth"), Lifecycle),
        time=_moment(row.get("submitted_at")),
    )


def _time_in_force(row: Mapping[str, Any]) -> TimeInForce | None:
    """None where the row's tag, `Normal` or `Gtc` for a long-term order, says otherwise: lists have
    had Day and GTC the wrong way round (longbridge/openapi#247)."""
    told = _known(row.get("time_in_force"), TimeInForce)
    tag = str(row.get("tag") or "").upper()
    other = {"GTC": TimeInForce.DAY, "NORMAL": TimeInForce.GTC}.get(tag)
    return None if told is other else told


def parse_listed(row: Mapping[str, Any]) -> OrderReport:
    """An order of a listing, in which a missing one counts as not placed: of one that cannot be
    read, its id and mark. The gateway leaves a quantity of 0 as it is known."""
    try:
        return parse_order(row)
    except UNREADABLE as error:
        mark = row.get("remark") or ""
        if not isinstance(mark, str):
            raise
        order = Order(_id(row, "order_id"), currency="", qty=0)
        log.error("an order in a list could not be read (%s)", type(error).__name__)
        return OrderReport(order, mark)


def parse_readable(rows: Iterable[Mapping[str, Any]]) -> list[OrderReport]:
    """Those that can be read, where nothing follows from a missing one."""
    found = []
    for row in rows:
        try:
            found.append(parse_order(row))
        except UNREADABLE as error:
            log.error("an order in a list could not be read (%s)", type(error).__name__)
    return found


def push_row(event: Any) -> dict[str, Any]:
    """The SDK's PushOrderChanged in the words of REST. A push has no time in force, so it does not
    tell whether Expired is the end: whoever asks for the order is told by REST."""
    return {
        "order_id": event.order_id,
        "status": name_of(event.status),
        "symbol": event.symbol,
        "currency": event.currency,
        "quantity": event.submitted_quantity,
        "executed_quantity": event.executed_quantity,
        "executed_price": event.executed_price,
        "price": event.submitted_price,
        "side": name_of(event.side),
        "order_type": name_of(event.order_type),
        "msg": event.msg,
        "remark": event.remark,
        "submitted_at": event.submitted_at,
    }


def parse_fill(row: Mapping[str, Any]) -> Fill:
    return Fill(
        fill_id=_id(row, "trade_id"),
        order_id=_id(row, "order_id"),
        qty=_required(row, "quantity"),
        price=_required(row, "price"),
        time=_moment(row.get("trade_done_at")) or datetime.now(UTC),
    )


def _id(row: Mapping[str, Any], name: str) -> str:
    found = row[name]
    if isinstance(found, bool) or not isinstance(found, str | int) or not found:
        raise ValueError(f"no {name}")
    return str(found)


def _number(value: Any) -> Decimal:
    """A decimal text; LongPort leaves prices and executed values that do not apply empty."""
    number = Decimal(str(value)) if value not in (None, "") else Decimal(0)
    if not number.is_finite() or number.adjusted() > 30:
        raise ValueError("not a number")
    return number


def _required(row: Mapping[str, Any], name: str) -> Decimal:
    """What always applies: nothing is not 0 there."""
    if row[name] in (None, ""):
        raise ValueError(f"no {name}")
    return _number(row[name])


def _known(word: Any, kind: type[_Result]) -> _Result | None:
    value = FROM_LONGPORT.get(str(word))
    return value if isinstance(value, kind) else None


def _moment(value: Any) -> datetime | None:
    """Epoch seconds from REST; from the SDK a naive time in this machine's zone
    (python/src/time.rs). None where there is none, or none that can be read."""
    if isinstance(value, datetime):
        return value.astimezone()
    seconds = epoch_seconds(value)
    try:
        return datetime.fromtimestamp(seconds, UTC) if seconds else None
    except (ValueError, OverflowError, OSError):
        return None


def epoch_seconds(value: Any) -> int | None:
    """None for what is no number."""
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return None


def name_of(constant: Any) -> str:
    """`Filled` of the SDK's `OrderStatus.Filled`."""
    return str(constant).rpartition(".")[2]


# --- pure: account ----------------------------------------------------------------------------
RENMINBI = ("CNH", "CNY")
"""LongPort keeps renminbi as CNH (open.longportapp.com/docs/trade/asset/account); clients say
either."""


def asked_currency(currency: str) -> str:
    return RENMINBI[0] if currency in RENMINBI else currency


def parse_cash(data: Mapping[str, Any], currency: str) -> Decimal:
    """Available cash in one currency; 0 when the account's currencies are told and it is none of
    them."""
    accounts = rows_of(data, "list")
    if not accounts:
        raise ValueError("no account")
    told = {
        str(info["currency"] or ""): info
        for account in reversed(accounts)  # the first one counts
        for info in _cash_infos(account)
    }
    names = RENMINBI if currency in RENMINBI else (currency,)
    name = next((name for name in names if name in told), None)
    if name is None and not all(told):
        raise ValueError("no currency")
    return Decimal(0) if name is None else _required(told[name], "available_cash")


def _cash_infos(account: Mapping[str, Any]) -> list[Any]:
    """LongPort may leave them out (documentation; the SDK's default), which tells nothing of an
    account that has cash."""
    if "cash_infos" not in account and not _required(account, "total_cash"):
        return []
    return rows_of(account, "cash_infos")


def parse_positions(data: Mapping[str, Any]) -> dict[Contract, tuple[str, Decimal]]:
    """Contract → currency and quantity, over every account channel (paper accounts have their
    own)."""
    held: dict[Contract, tuple[str, Decimal]] = {}
    for channel in rows_of(data, "list"):
        for row in channel.get("stock_info") or ():
            symbol = row["symbol"]
            if not isinstance(symbol, str) or "." not in symbol:
                raise ValueError("no symbol")
            contract = to_contract(symbol)
            if contract is None:
                continue
            # The documentation's sample says HK where it means HKD.
            currency = CURRENCIES.get(row["currency"], row["currency"])
            if not isinstance(currency, str):
                raise TypeError("no currency")
            before = held.get(contract, (currency, Decimal(0)))[1]
            held[contract] = (currency, before + _required(row, "quantity"))
    return {contract: value for contract, value in held.items() if value[1]}


# --- pure: refusals ---------------------------------------------------------------------------
ACCESS_CODES = {
    403201: "the signature is wrong: check app_secret, and this machine's clock",
    403203: "the app key is not known: check app_key",
    403205: "this machine's IP address is not allowed: check the developer centre",
}
DUPLICATE_CODE = 403202
UNKNOWN_ORDER_CODE = 602001  # "param check failed"; for an order id: not (yet) known
QUOTE_RATE_CODE = 301606
# Of an error within LongBridge: "server error, try again" (open.longportapp.com/docs/error-codes).
# The second came with the words (longbridge/developers#1256), others do (longbridge/openapi#484).
SERVER_CODES = {301602, 602023}
SERVER_WORDS = ("internal server error", "internal error")


class CodedRejection(Rejected):
    """LongPort's refusal, with its code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(f"{text} (LongBridge code {code})")
        self.longport_code = code


def refusal(refused: Refused, token_file: Path) -> Exception:
    """LongPort's refusal as an error of the tree, or NoAnswer where it proves nothing."""
    code = refused.code
    if refused.status == 429 or 429000 <= code < 430000 or code == QUOTE_RATE_CODE:
        return RateLimited("LongBridge's rate limit refused it; nothing was done", retry_after=3)
    if refused.status == 401 or 401000 <= code < 402000:
        return BrokerUnavailable(
            f"LongBridge no longer accepts the token in {token_file} (code {code}): fetch "
            "a new one in the developer centre and put it there"
        )
    if code in ACCESS_CODES:
        return BrokerUnavailable(f"LongBridge refuses access: {ACCESS_CODES[code]}")
    if (
        code == DUPLICATE_CODE
        or code in SERVER_CODES
        or refused.message.strip().lower() in SERVER_WORDS
        or refused.status >= 500
        or 500000 <= code < 501000
    ):
        return NoAnswer(str(code))
    return CodedRejection(refused.message or "LongBridge refused it", code)
