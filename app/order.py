"""Orders: place, cancel, ask for one, list, fills."""

from __future__ import annotations

from typing import Any

from httptrading.app.ask import Ask
from httptrading.brokers.journal_rows import OrderRequest
from httptrading.errors import InvalidRequest
from httptrading.schemas.fields import client_order_id
from httptrading.schemas.request import (
    CancelAll,
    CancelOrder,
    FillsQuery,
    ListQuery,
    OrderListQuery,
    OrderName,
    OrderQuery,
    PlaceBody,
    PlaceOrder,
)
from httptrading.schemas.response import (
    FillNode,
    dump,
    dump_args,
    dump_listed_order,
)


def place(ask: Ask) -> tuple[dict[str, Any], Any]:
    """Answers with the body and the `Placed`, whose time and replay mark stand outside of it."""
    body = ask.body(PlaceOrder, PlaceBody)
    request = OrderRequest(
        contract=body.contract,
        order_type=body.order_type,
        time_in_force=body.time_in_force,
        lifecycle=body.lifecycle,
        direction=body.direction,
        qty=body.qty,
        price=body.price,
    )
    placed = ask.instance.place(request, _name(ask, body.client_order_id), ask.deadline)
    answer = {
        "orderId": placed.order_id,
        "args": dump_args(body),
        "clientOrderId": placed.client_order_id,
    }
    return answer, placed


def _name(ask: Ask, in_body: str | None) -> str | None:
    """The order's name from the body or the header `Idempotency-Key`, which must not differ."""
    in_header = ask.request.headers.get("Idempotency-Key")
    if in_header is None:
        return in_body
    try:
        client_order_id().deserialize(in_header)
    except Exception:
        raise InvalidRequest(
            "The header Idempotency-Key must be 1 to 64 of A-Z a-z 0-9 . _ : -",
            {"Idempotency-Key": ["must be 1 to 64 of A-Z a-z 0-9 . _ : -"]},
        ) from None
    if in_body not in (None, in_header):
        raise InvalidRequest(
            "clientOrderId and the header Idempotency-Key differ; give one of them.",
            {"clientOrderId": ["differs from the header Idempotency-Key"]},
        )
    return in_header


def cancel(ask: Ask) -> dict[str, Any]:
    name = ask.body(CancelOrder, OrderName)
    ask.instance.cancel(name.order_id, name.client_order_id, ask.deadline)
    return {}


def cancel_all(ask: Ask) -> dict[str, Any]:
    ask.refuse_query()
    if ask.has_body:
        ask.body(CancelAll, dict)
    return {
        "orders": [
            {
                "type": "cancellation",
                "orderId": order_id,
                "requested": error is None,
                "ex": None if error is None else error.text,
            }
            for order_id, error in ask.instance.cancel_all(ask.deadline)
        ]
    }


def state(ask: Ask) -> dict[str, Any]:
    name = ask.query(OrderQuery, OrderName)
    order = ask.instance.order(name.order_id, name.client_order_id, ask.deadline, fresh=ask.fresh)
    return {"order": dump(ask.order_node, order)}


def list_(ask: Ask) -> dict[str, Any]:
    query = ask.query(OrderListQuery, ListQuery)
    rows = ask.instance.orders(
        open_=query.open_,
        since=query.since,
        limit=query.limit,
        deadline=ask.deadline,
        fresh=ask.fresh,
    )
    return {"orders": [dump_listed_order(row) for row in rows]}


def fills(ask: Ask) -> dict[str, Any]:
    order_id = ask.query(FillsQuery, dict)["orderId"]
    found = ask.instance.fills(order_id, ask.deadline, fresh=ask.fresh)
    return {"fills": [dump(FillNode, fill) for fill in found]}
