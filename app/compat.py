"""`compat="1.0"`: answers as clients of the published httptrading 1.0.x expect them.

One layer over the finished answer: HTTP 200 with `ex` for every error after authentication,
`symbol` beside `ticker`, `canceled: true` on cancel, `isCancelable` on orders, amounts with a
fraction; and under its input. (Unknown body keys are ignored where the body is loaded, and so is
its content type: 1.0 asked aiohttp's `request.json()`, which looks at the text alone.)
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from marshmallow import fields

from httptrading.schemas.numbers import with_fraction
from httptrading.schemas.response import OrderNode

_AMOUNTS = frozenset(
    {"amount", "latest", "preClose", "highPrice", "lowPrice", "openPrice", "avgPrice"}
)


class OrderNode10(OrderNode):
    """The order node of 1.0."""

    isCancelable = fields.Boolean(attribute="is_cancelable")


def request_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body in the words of today: 1.0 took a price as text and none as 0, ignored the price of a
    market order, and took order ids as numbers."""
    found = dict(body)
    price = found.get("price")
    if isinstance(price, str):
        try:
            number = Decimal(price or 0)
        except InvalidOperation:
            number = Decimal("NaN")
        if number.is_finite():  # else the field says what is wrong
            price = found["price"] = number
    if found.get("orderType") == "Market" or (price == 0 and not isinstance(price, bool)):
        found.pop("price", None)
    order_id = found.get("orderId")
    if isinstance(order_id, int) and not isinstance(order_id, bool):
        found["orderId"] = str(order_id)
    return found


def success(path: str, body: Mapping[str, Any], raw_body: Any) -> dict[str, Any]:
    """A success body as 1.0 words it; `raw_body` is the request's, which 1.0 echoes as it came."""
    found = {key: _node(key, value) for key, value in body.items()}
    if path == "order/place":
        del found["clientOrderId"]
        found["args"] = _echo(raw_body)
    elif path == "order/cancel":
        found["canceled"] = True
    return found


def _node(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_node("", item) for item in value]
    if not isinstance(value, Mapping):
        return with_fraction(value) if name in _AMOUNTS and value is not None else value
    node = {key: _node(key, item) for key, item in value.items()}
    if node.get("type") == "contract":
        node["symbol"] = node["ticker"]
    return node


def _echo(value: Any) -> Any:
    """A client's own JSON; numbers that are no JSON (NaN) become null."""
    if isinstance(value, Mapping):
        return {key: _echo(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_echo(item) for item in value]
    if isinstance(value, Decimal):
        return with_fraction(value) if value.is_finite() else None
    return value
