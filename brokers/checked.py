"""What a broker says, checked before anybody believes it: the documented types, finite numbers.

An adapter (anybody's own, too) that returns something else has a bug. It is named here by operation
and field, never by value, and goes no further: not into an answer, the memory or the journal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

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
    UnifiedStatus,
    Unit,
)


class NonsenseAnswer(ValueError):
    """The text goes on after "The broker's answer has …"."""


def checked(operation: str, value: Any) -> Any:
    """The answer, order ids as text; NonsenseAnswer says what is wrong."""
    return _CHECKS[operation](value)


def _ping(value: Any) -> bool:
    return bool(value)


def _placed(value: Any) -> str:
    """ "", blanks and 0 are some SDKs' words for "no id"."""
    order_id = _id(value, "order id")
    if order_id.strip() in ("", "0"):
        raise NonsenseAnswer("no order id")
    return order_id


def _id(value: Any, name: str) -> str:
    """Numbers are some SDKs' ids."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise NonsenseAnswer(f"no {name}")
    text = str(value)
    _text(text, name)
    return text


def _quote(value: Any) -> Quote:
    quote: Quote = _of(value, Quote, "a quote")
    _contract(quote.contract)
    _text(quote.currency, "currency")
    _of(quote.is_tradable, bool, "is_tradable")
    for name in ("latest", "pre_close", "open_price", "high_price", "low_price"):
        _number(getattr(quote, name), name)
    if not _is_moment(_of(quote.time, datetime, "time")):
        raise NonsenseAnswer("a quote of no possible time")
    return quote


def _market_status(value: Any) -> Mapping[Any, Any]:
    states: Mapping[Any, Any] = _of(value, Mapping, "market states")
    for kind, regions in states.items():
        if not isinstance(regions, Mapping):
            continue  # brokers for httptrading 1.0 put a "type" beside the kinds
        _of(kind, str | TradeType, "a kind of market")
        for region, status in regions.items():
            _text(region, "region")
            _of(status, MarketStatus, "a market's state")
            _text(status.region, "region")
            _text(status.origin_status, "origin_status")
            _of(status.unified_status, UnifiedStatus, "unified_status")
    return states


def _cash(value: Any) -> Cash:
    cash: Cash = _of(value, Cash, "cash")
    _text(cash.currency, "currency")
    _number(cash.amount, "amount")
    return cash


def _positions(value: Any) -> list[Position]:
    return [_position(one) for one in _listed(value)]


def _position(value: Any) -> Position:
    position: Position = _of(value, Position, "a position")
    _text(position.broker, "broker")
    _text(position.broker_display, "broker_display")
    _contract(position.contract)
    _of(position.unit, Unit, "unit")
    _text(position.currency, "currency")
    _number(position.qty, "qty")
    return position


def _order(value: Any) -> Order | OrderReport:
    return _report(value) if isinstance(value, OrderReport) else _bare_order(value)


def _bare_order(value: Any, *, mark: str = "") -> Order:
    """One with a mark may have no id yet: left out of a listing it would count as not placed."""
    order: Order = _of(value, Order, "an order")
    for name in ("qty", "filled_qty", "avg_price"):
        _number(getattr(order, name), name)
    _text(order.currency, "currency")
    _of(order.is_canceled, bool, "is_canceled")
    _of(order.is_pending_cancel, bool, "is_pending_cancel")
    reason = _words(order.error_reason or "", "error_reason")
    order_id = "" if mark and order.order_id == "" else _placed(order.order_id)
    if (order_id, reason) != (order.order_id, order.error_reason):
        order = replace(order, order_id=order_id, error_reason=reason)
    return order


def _report(value: Any) -> OrderReport:
    report: OrderReport = _of(value, OrderReport, "an order report")
    mark = _words(report.mark, "mark")
    order = _bare_order(report.order, mark=mark)
    if report.contract is not None:
        _contract(report.contract)
    if report.price is not None:
        _number(report.price, "price")
    time = report.time
    if time is not None and not _is_moment(_of(time, datetime, "time")):
        time = None  # one odd row must not cost all others
    if report.direction is not None:
        _text(report.direction, "direction")
    # Of these very kinds: the journal keeps their names, and reads them as such for ever.
    _of(report.order_type, OrderType | None, "order_type")
    _of(report.time_in_force, TimeInForce | None, "time_in_force")
    _of(report.lifecycle, Lifecycle | None, "lifecycle")
    if order is report.order and time is report.time and mark == report.mark:
        return report
    return replace(report, order=order, time=time, mark=mark)


def _reports(value: Any) -> list[OrderReport]:
    return [_report(one) for one in _listed(value)]


def _fills(value: Any) -> list[Fill]:
    return [_fill(one) for one in _listed(value)]


def _fill(value: Any) -> Fill:
    fill: Fill = _of(value, Fill, "a fill")
    _number(fill.qty, "qty")
    _number(fill.price, "price")
    if not _is_moment(_of(fill.time, datetime, "time")):
        raise NonsenseAnswer("a fill at no possible time")
    fill_id, order_id = _id(fill.fill_id, "fill_id"), _placed(fill.order_id)
    if (fill_id, order_id) != (fill.fill_id, fill.order_id):
        fill = replace(fill, fill_id=fill_id, order_id=order_id)
    return fill


_CHECKS: Mapping[str, Callable[[Any], Any]] = {
    "ping": _ping,
    "quote": _quote,
    "market_status": _market_status,
    "cash": _cash,
    "positions": _positions,
    "order": _order,
    "recent_orders": _reports,
    "fills": _fills,
    "place_order": _placed,
    "cancel_order": lambda value: None,  # an SDK's object could not leave its process
}


# --- the smallest parts --------------------------------------------------------------------------
def _of(value: Any, kind: Any, what: str) -> Any:
    if not isinstance(value, kind):
        raise NonsenseAnswer(f"{type(value).__name__} where {what} belongs")
    return value


def _listed(value: Any) -> Iterable[Any]:
    listed: Iterable[Any] = _of(value, list | tuple, "a list")
    return listed


def _text(value: Any, name: str) -> None:
    """Text that names something; half a character can be neither sent nor recorded."""
    if _words(value, name) != value:
        raise NonsenseAnswer(f"half a character in its {name}")


def _words(value: Any, name: str) -> str:
    """Text for people to read: half a character becomes a `?`."""
    if not isinstance(value, str):
        raise NonsenseAnswer(f"{name} of type {type(value).__name__}, not text")
    return str(value) if value.isascii() else value.encode("utf-8", "replace").decode()


def _is_moment(value: datetime) -> bool:
    try:
        value.astimezone(UTC)
    except (ValueError, OverflowError, OSError):  # the first year, or the last
        return False
    return True


def _contract(value: Any) -> None:
    contract = _of(value, Contract, "a contract")
    _of(contract.trade_type, TradeType, "trade_type")
    _text(contract.ticker, "ticker")
    _text(contract.region, "region")


def _number(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise NonsenseAnswer(f"{name} of type {type(value).__name__}, not a number")
    # math.isfinite() raises for a signalling NaN, as any arithmetic does.
    if not (value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)):
        raise NonsenseAnswer(f"{name} that is no finite number")
