"""What goes out: the nodes of success bodies, field for field, in the documented order."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any

from marshmallow import Schema, fields

from httptrading.model import (
    Lifecycle,
    MarketStatus,
    OrderType,
    TimeInForce,
    TradeType,
    UnifiedStatus,
    Unit,
)
from httptrading.schemas.numbers import plain


class Number(fields.Field[Any]):
    """A plain decimal JSON number."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> Any:
        return None if value is None else plain(value)


class Name(fields.Field[Any]):
    """An enum member's name."""

    def __init__(self, kind: type, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> Any:
        return None if value is None else value.name


class Timestamp(fields.Field[Any]):
    """A moment as milliseconds since the epoch."""

    def _serialize(self, value: Any, attr: str | None, obj: Any, **kwargs: Any) -> Any:
        return None if value is None else int(value.timestamp() * 1000)


class ContractNode(Schema):
    type = fields.Constant("contract")
    tradeType = Name(TradeType, attribute="trade_type")
    region = fields.String()
    ticker = fields.String()


class QuoteNode(Schema):
    type = fields.Constant("quote")
    contract = fields.Nested(ContractNode)
    currency = fields.String()
    isTradable = fields.Boolean(attribute="is_tradable")
    latest = Number()
    preClose = Number(attribute="pre_close")
    highPrice = Number(attribute="high_price")
    lowPrice = Number(attribute="low_price")
    openPrice = Number(attribute="open_price")
    timestamp = Timestamp(attribute="time")


class MarketStatusNode(Schema):
    type = fields.Constant("marketStatus")
    region = fields.String()
    originStatus = fields.String(attribute="origin_status")
    unifiedStatus = Name(UnifiedStatus, attribute="unified_status")


class CashNode(Schema):
    type = fields.Constant("cash")
    currency = fields.String()
    amount = Number()


class PositionNode(Schema):
    type = fields.Constant("position")
    broker = fields.String()
    brokerDisplay = fields.String(attribute="broker_display")
    contract = fields.Nested(ContractNode)
    unit = Name(Unit)
    currency = fields.String()
    qty = Number()


class OrderNode(Schema):
    type = fields.Constant("order")
    orderId = fields.String(attribute="order_id")
    currency = fields.String()
    qty = Number()
    filledQty = Number(attribute="filled_qty")
    avgPrice = Number(attribute="avg_price")
    errorReason = fields.String(attribute="error_reason")
    isCanceled = fields.Boolean(attribute="is_canceled")
    isFilled = fields.Boolean(attribute="is_filled")
    isCompleted = fields.Boolean(attribute="is_completed")


class AskedNode(Schema):
    """What order/list adds to an order's node: what was asked for, null where nobody knows."""

    clientOrderId = fields.String(attribute="client_order_id", allow_none=True)
    contract = fields.Nested(ContractNode, allow_none=True)
    price = Number(allow_none=True)
    orderType = Name(OrderType, attribute="order_type", allow_none=True)
    timeInForce = Name(TimeInForce, attribute="time_in_force", allow_none=True)
    lifecycle = Name(Lifecycle, allow_none=True)
    direction = fields.String(allow_none=True)
    created = fields.AwareDateTime(format="iso")


class CombinationNode(Schema):
    """A kind of order that a broker takes."""

    type = fields.Constant("orderKind")
    region = fields.String()
    orderType = Name(OrderType, attribute="order_type")
    timeInForce = Name(TimeInForce, attribute="time_in_force")
    lifecycle = Name(Lifecycle)


class FillNode(Schema):
    type = fields.Constant("fill")
    fillId = fields.String(attribute="fill_id")
    orderId = fields.String(attribute="order_id")
    qty = Number()
    price = Number()
    timestamp = Timestamp(attribute="time")


class ArgsNode(Schema):
    """What was asked for, as order/place answers it."""

    tradeType = Name(TradeType, attribute="contract.trade_type")
    ticker = fields.String(attribute="contract.ticker")
    region = fields.String(attribute="contract.region")
    price = Number()
    qty = Number()
    orderType = Name(OrderType, attribute="order_type")
    timeInForce = Name(TimeInForce, attribute="time_in_force")
    lifecycle = Name(Lifecycle)
    direction = fields.String()


@cache
def _dumper(schema: type[Schema]) -> Schema:
    """One instance for all answers: making one costs more than dumping with it."""
    return schema()


def dump(schema: type[Schema], value: Any) -> Mapping[str, Any]:
    """One node, not to be changed: what is answered from memory again is not worded again."""
    try:
        return _dump_hashable(schema, value)
    except TypeError:  # a custom broker's own kind of answer need not be hashable
        return _dump(schema, value)


def _dump(schema: type[Schema], value: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = _dumper(schema).dump(value)
    return found


_dump_hashable = lru_cache(1000)(_dump)


def dump_args(body: Any) -> dict[str, Any]:
    """What was asked for; without a price for a market order."""
    found = _dumper(ArgsNode).dump(body)
    return {key: value for key, value in found.items() if key != "price" or value is not None}


def dump_market_status(states: Mapping[str, Mapping[str, MarketStatus]]) -> dict[str, Any]:
    """The map of maps of market/state."""
    return {
        "type": "marketStatusMap",
        **{
            kind: {region: dump(MarketStatusNode, state) for region, state in regions.items()}
            for kind, regions in states.items()
        },
    }


def dump_listed_order(row: Any) -> dict[str, Any]:
    """A journal row: its order's node, and what was asked for."""
    return {**dump(OrderNode, row.order), **dump(AskedNode, row)}


def dump_instance_state(state: Any) -> dict[str, Any]:
    return {
        "type": "instanceState",
        "connections": [
            {
                "type": "connection",
                "name": connection.name,
                "connected": connection.state.connected,
                "since": iso(datetime.fromtimestamp(connection.state.since, UTC)),
                "lastError": connection.state.last_error,
                "queued": connection.queued,
                "reconnects": connection.state.reconnects,
                "replacements": connection.state.replacements,
            }
            for connection in state.connections
        ],
        "limits": [
            {
                "type": "limit",
                "name": name,
                "limit": window.limit,
                "seconds": plain(window.seconds),
                "left": window.left,
                "kept": window.kept,
                "keptForOrders": window.kept_for_orders,
            }
            for name, window in state.windows.items()
        ],
        "operations": list(state.operations),
        "orders": None
        if state.combinations is None
        else [dump(CombinationNode, combination) for combination in state.combinations],
        "quoteRegions": None if state.quote_regions is None else list(state.quote_regions),
        "unsettledOrders": state.unsettled,
        "oldestUnsettled": None if state.oldest_unsettled is None else iso(state.oldest_unsettled),
    }


def iso(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds")
