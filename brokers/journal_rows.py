"""A row of the order journal in our models' words, and what the broker's news change in it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from httptrading.brokers.journal_tables import NOT_PLACED, PLACED, REFUSED, SEEN, UNSETTLED
from httptrading.model import (
    Contract,
    Fill,
    Lifecycle,
    Number,
    Order,
    OrderReport,
    OrderType,
    TimeInForce,
    TradeType,
    exact,
)

Names = tuple[str, str]  # what a report calls its order: the mark and the order id, "" for none

REOPENS_AFTER = 60.0
"""Seconds after an order's end from which on a broker that calls it open is believed: ends are not
always for good (Futu lets a disabled order be enabled again, trade/modify-order.html)."""


@dataclass(frozen=True)
class OrderRequest:
    """What a client asked for: an order's content."""

    contract: Contract
    order_type: OrderType
    time_in_force: TimeInForce
    lifecycle: Lifecycle
    direction: str
    qty: int
    price: Decimal | None


@dataclass(frozen=True)
class Outcome:
    """What became of a sent order: the row's next state, with the broker's id or the reason."""

    state: str
    order_id: str = ""
    reason: str = ""


@dataclass(frozen=True)
class JournalOrder:
    """One row: `order` is the best knowledge, the rest is what was asked and how it stands."""

    row_id: int
    client_order_id: str | None
    attempt: int
    mark: str | None
    state: str
    order: Order
    contract: Contract | None
    direction: str | None
    order_type: OrderType | None
    time_in_force: TimeInForce | None
    lifecycle: Lifecycle | None
    price: Decimal | None
    asked_qty: Decimal | None
    is_open: bool
    is_priced_in_part: bool  # the average price is not yet that of all that is filled
    created: datetime
    updated: datetime

    @property
    def order_id(self) -> str:
        return self.order.order_id

    def same_content(self, request: OrderRequest) -> bool:
        return (
            self.contract == request.contract
            and self.direction == request.direction
            and self.order_type == request.order_type
            and self.time_in_force == request.time_in_force
            and self.lifecycle == request.lifecycle
            and self.asked_qty == request.qty
            and self.price == request.price
        )


def merge(
    known: Order, news: Order, is_open: bool = True, priced_qty: Number | None = None
) -> Order:
    """What is known after the news: fills only grow, a final state stays.

    `priced_qty`: how much of the filled quantity the known average price is of (None: all). A
    report that counts more fills without a price leaves the price as it is until one is told.

    >>> merge(Order("1", "USD", 10, 5, 2.0), Order("1", "USD", 10, 3, 9.0)).filled_qty
    5
    """
    if priced_qty is None:
        priced_qty = known.filled_qty if known.avg_price else 0
    older = news.filled_qty < known.filled_qty
    priced = bool(news.avg_price) and not older and news.filled_qty > priced_qty
    merged = replace(
        known,
        order_id=news.order_id or known.order_id,
        currency=news.currency or known.currency,
        filled_qty=known.filled_qty if older else news.filled_qty,
        avg_price=news.avg_price if priced else known.avg_price,
    )
    failed = news.is_canceled or bool(news.error_reason)
    if not is_open or known.is_completed or (older and not failed):
        return merged
    merged = replace(
        merged,
        qty=known.qty if older else news.qty or known.qty,
        error_reason=news.error_reason,
        is_canceled=news.is_canceled,
        is_pending_cancel=news.is_pending_cancel,
    )
    return replace(merged, is_pending_cancel=merged.is_pending_cancel and not merged.is_completed)


def names_of(report: OrderReport) -> Names:
    return report.mark, report.order.order_id


def news_of(
    instance_id: str, moment: float, row: sa.Row[Any] | None, report: OrderReport
) -> dict[str, Any]:
    """What a report changes in its row, or the whole of a new one; nothing: no news."""
    # A float is not what is read back: 0.3 is less than Decimal("0.3").
    order = replace(
        report.order,
        qty=exact(report.order.qty),
        filled_qty=exact(report.order.filled_qty),
        avg_price=exact(report.order.avg_price),
    )
    now = time.time()
    if row is None and not order.order_id:
        return {}
    if row is None:
        return {
            "instance_id": instance_id,
            "attempt": 1,
            "state": SEEN,
            "order_id": order.order_id,
            **_asked(report),
            **_known(order),
            "priced_qty": digits(order.filled_qty) if order.avg_price else "0",
            "is_open": not order.is_completed,
            "created": report.time.timestamp() if report.time else now,
            "updated": now,
        }
    # News from before the refusal (a push that was overtaken) does not call it in question.
    alive = order.filled_qty > 0 or (not order.is_completed and moment > row.updated)
    revived = row.state in (NOT_PLACED, REFUSED) and alive
    values = changes(row, order, revived or _reopened(row, order, moment))
    if order.order_id and row.order_id is None:
        values["order_id"] = order.order_id
    if revived or (row.state in UNSETTLED and order.order_id):
        values["state"] = PLACED
    if row.state == SEEN and None in (row.ticker, row.direction, row.order_type, row.lifecycle):
        # Not every report tells everything.
        asked = _asked(report).items()
        values |= {name: told for name, told in asked if told and getattr(row, name) is None}
    if values:
        values["updated"] = now
    return values


def _reopened(row: Any, news: Order, moment: float) -> bool:
    """Whether an order that had ended is open again. An overtaken push says so as well, but not
    so much later."""
    ended = row.state in (PLACED, SEEN) and not row.is_open and Decimal(row.filled_qty) < news.qty
    older = news.filled_qty < Decimal(row.filled_qty)
    is_late = moment > row.updated + REOPENS_AFTER
    return bool(ended and is_late and not older and not news.is_completed)


def changes(row: Any, news: Order, revived: bool = False) -> dict[str, Any]:
    """The columns that the news changes. `revived`: the row counted as no order, or as one that
    had ended, until now."""
    known = order_of(row)
    base = replace(known, error_reason="", is_canceled=False) if revived else known
    merged = merge(base, news, row.is_open or revived, Decimal(row.priced_qty))
    before, after = _known(known), _known(merged)
    values = {name: after[name] for name in after if after[name] != before[name]}
    if "avg_price" in values:
        values["priced_qty"] = digits(news.filled_qty)
    is_open = (row.is_open or revived) and not merged.is_completed
    if is_open != row.is_open:
        values["is_open"] = is_open
    return values


def _known(order: Order) -> dict[str, Any]:
    return {
        "qty": digits(order.qty),
        "currency": order.currency,
        "filled_qty": digits(order.filled_qty),
        "avg_price": digits(order.avg_price),
        "error_reason": order.error_reason,
        "is_canceled": order.is_canceled,
        "is_pending_cancel": order.is_pending_cancel,
    }


def _asked(report: OrderReport) -> dict[str, Any]:
    contract = report.contract
    return {
        "trade_type": contract.trade_type.name if contract else None,
        "region": contract.region if contract else None,
        "ticker": contract.ticker if contract else None,
        "direction": report.direction,
        "order_type": report.order_type.name if report.order_type else None,
        "time_in_force": report.time_in_force.name if report.time_in_force else None,
        "lifecycle": report.lifecycle.name if report.lifecycle else None,
        "price": digits(report.price),
        "asked_qty": digits(report.order.qty),
    }


def digits(number: Number | None) -> str | None:
    """A number's plain decimal digits, without trailing zeros: equal numbers, equal text."""
    if number is None:
        return None
    text = format(exact(number), "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def order_of(row: Any) -> Order:
    return Order(
        order_id=row.order_id or "",
        currency=row.currency,
        qty=Decimal(row.qty),
        filled_qty=Decimal(row.filled_qty),
        avg_price=Decimal(row.avg_price),
        error_reason=row.error_reason,
        is_canceled=row.is_canceled,
        is_pending_cancel=row.is_pending_cancel,
    )


def journal_order(row: Any) -> JournalOrder:
    contract = None
    if row.region and row.ticker:
        contract = Contract(TradeType[row.trade_type], row.ticker, row.region)
    return JournalOrder(
        row_id=row.id,
        client_order_id=row.client_order_id,
        attempt=row.attempt,
        mark=row.mark,
        state=row.state,
        order=order_of(row),
        contract=contract,
        direction=row.direction,
        order_type=OrderType[row.order_type] if row.order_type else None,
        time_in_force=TimeInForce[row.time_in_force] if row.time_in_force else None,
        lifecycle=Lifecycle[row.lifecycle] if row.lifecycle else None,
        price=Decimal(row.price) if row.price is not None else None,
        asked_qty=Decimal(row.asked_qty) if row.asked_qty is not None else None,
        is_open=row.is_open,
        is_priced_in_part=0 < Decimal(row.priced_qty) < Decimal(row.filled_qty),
        created=datetime.fromtimestamp(row.created, UTC),
        updated=datetime.fromtimestamp(row.updated, UTC),
    )


as_read = lru_cache(1000)(journal_order)
"""Of a row that was read: whoever polls reads the same again."""


def fill_of(row: Any) -> Fill:
    time = datetime.fromtimestamp(row.time, UTC)
    return Fill(row.fill_id, row.order_id, Decimal(row.qty), Decimal(row.price), time)
