"""What comes in: bodies and queries of the routes, loaded into the model's objects.

Bodies refuse unknown keys (a misspelt `price` must not become a market order); queries ignore them.
What is wrong with a field is told as a predicate: the answer's `ex` puts its name before that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from marshmallow import (
    EXCLUDE,
    RAISE,
    Schema,
    ValidationError,
    fields,
    post_load,
    pre_load,
    validate,
    validates_schema,
)

from httptrading.model import Contract, Lifecycle, OrderType, TimeInForce, TradeType
from httptrading.schemas.fields import (
    Digits,
    EnumName,
    OneOf,
    Price,
    Quantity,
    Text,
    client_order_id,
    order_id,
)
from httptrading.tickers import REGIONS, canonical_ticker

DIRECTIONS = ("BUY", "SELL")
ANY_TEXT = re.compile(r"[\s\S]{1,32}")
_CURRENCY = re.compile(r"[A-Z]{3}")
MOST_LISTED = 1000
"""Orders in one answer of order/list."""
_LIMIT_SENTENCE = f"must be a whole number from 1 to {MOST_LISTED}"


@dataclass(frozen=True)
class PlaceBody:
    """A loaded order/place body; `OrderRequest` is the same without a name."""

    contract: Contract
    order_type: OrderType
    time_in_force: TimeInForce
    lifecycle: Lifecycle
    direction: str
    qty: int
    price: Any
    client_order_id: str | None


@dataclass(frozen=True)
class OrderName:
    """One order, by the broker's id or by the client's."""

    order_id: str | None
    client_order_id: str | None


@dataclass(frozen=True)
class ListQuery:
    open_: bool | None
    since: datetime | None
    limit: int


class _ContractFields(Schema):
    """`symbol` is taken as another name of `ticker`."""

    tradeType = EnumName(TradeType, required=True)
    region = OneOf(REGIONS, required=True)
    ticker = Text(ANY_TEXT, "must be a string of 1 to 32 characters", required=True)

    @pre_load
    def symbol_is_ticker(self, data: Any, **kwargs: Any) -> Any:
        if isinstance(data, Mapping) and "symbol" in data:
            data = dict(data)
            symbol = data.pop("symbol")
            if data.setdefault("ticker", symbol) != symbol:
                raise ValidationError("differs from ticker; give one of them", "symbol")
        return data

    @validates_schema(skip_on_field_errors=False)
    def check_ticker(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        if "region" in data and "ticker" in data:
            _canonical(data["region"], data["ticker"])


def _canonical(region: str, ticker: str) -> str:
    try:
        return canonical_ticker(region, ticker)
    except ValueError as error:
        raise ValidationError(f"is not valid: {error}", "ticker") from None


def _contract(data: Mapping[str, Any]) -> Contract:
    return Contract(
        data["tradeType"], canonical_ticker(data["region"], data["ticker"]), data["region"]
    )


class ContractQuery(_ContractFields):
    """market/quote."""

    class Meta:
        unknown = EXCLUDE

    @post_load
    def to_contract(self, data: Mapping[str, Any], **kwargs: Any) -> Contract:
        return _contract(data)


class PositionQuery(Schema):
    """position/state: all three optional, to ask for one holding or one market."""

    class Meta:
        unknown = EXCLUDE

    tradeType = EnumName(TradeType)
    region = OneOf(REGIONS)
    ticker = Text(ANY_TEXT, "must be a string of 1 to 32 characters")
    symbol = Text(ANY_TEXT, "must be a string of 1 to 32 characters")

    @post_load
    def canonical(self, data: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """{"region": …, "ticker": …}, either of them None."""
        region, ticker = data.get("region"), data.get("ticker", data.get("symbol"))
        if data.get("symbol", ticker) != ticker:
            raise ValidationError("differs from ticker; give one of them", "symbol")
        if ticker is not None:
            if region is None:
                raise ValidationError("needs region beside it", "ticker")
            ticker = _canonical(region, ticker)
        return {"region": region, "ticker": ticker}


class CashQuery(Schema):
    """cash/state."""

    class Meta:
        unknown = EXCLUDE

    currency = Text(_CURRENCY, "must be three capital letters, like USD or HKD")


class PlaceOrder(_ContractFields):
    """The body of order/place."""

    class Meta:
        unknown = RAISE

    price = Price(allow_none=True)
    qty = Quantity(required=True)
    orderType = EnumName(OrderType, required=True)
    timeInForce = EnumName(TimeInForce, required=True)
    lifecycle = EnumName(Lifecycle, required=True)
    direction = OneOf(DIRECTIONS, required=True)
    clientOrderId = client_order_id()

    @validates_schema(pass_original=True, skip_on_field_errors=False)
    def check_price(self, data: Mapping[str, Any], original: Any, **kwargs: Any) -> None:
        given = isinstance(original, Mapping) and original.get("price") is not None
        if data.get("orderType") is OrderType.Limit and not given:
            raise ValidationError("is missing: a limit order needs a price", "price")
        if data.get("orderType") is OrderType.Market and given:
            raise ValidationError("must be left out: a market order takes no price", "price")

    @post_load
    def to_body(self, data: Mapping[str, Any], **kwargs: Any) -> PlaceBody:
        return PlaceBody(
            contract=_contract(data),
            order_type=data["orderType"],
            time_in_force=data["timeInForce"],
            lifecycle=data["lifecycle"],
            direction=data["direction"],
            qty=data["qty"],
            price=data.get("price"),
            client_order_id=data.get("clientOrderId"),
        )


class _OrderNameFields(Schema):
    orderId = order_id()
    clientOrderId = client_order_id()

    @validates_schema
    def check_one(self, data: Mapping[str, Any], **kwargs: Any) -> None:
        if "orderId" in data and "clientOrderId" in data:
            raise ValidationError("cannot stand beside clientOrderId; give one of them", "orderId")
        if not data:
            raise ValidationError("is missing; give it or clientOrderId", "orderId")

    @post_load
    def to_name(self, data: Mapping[str, Any], **kwargs: Any) -> OrderName:
        return OrderName(data.get("orderId"), data.get("clientOrderId"))


class CancelOrder(_OrderNameFields):
    """The body of order/cancel."""

    class Meta:
        unknown = RAISE


class CancelAll(Schema):
    """The body of order/cancel-all, which has no choice to offer: whoever names a region or a
    ticker is told so, before every order is cancelled."""

    class Meta:
        unknown = RAISE


class OrderQuery(_OrderNameFields):
    """order/state."""

    class Meta:
        unknown = EXCLUDE


class FillsQuery(Schema):
    """order/fills."""

    class Meta:
        unknown = EXCLUDE

    orderId = order_id(required=True)


class OrderListQuery(Schema):
    """order/list."""

    class Meta:
        unknown = EXCLUDE

    status = OneOf(("open", "closed", "all"), load_default="all")
    since = fields.AwareDateTime(
        format="iso",
        default_timezone=UTC,
        error_messages={"invalid": "must be a time like 2025-05-28T05:20:07Z"},
    )
    limit = Digits(
        load_default=100,
        validate=validate.Range(1, MOST_LISTED, error=_LIMIT_SENTENCE),
        error_messages={"invalid": _LIMIT_SENTENCE},
    )

    @post_load
    def to_query(self, data: Mapping[str, Any], **kwargs: Any) -> ListQuery:
        open_ = {"open": True, "closed": False, "all": None}[data["status"]]
        return ListQuery(open_, data.get("since"), data["limit"])
