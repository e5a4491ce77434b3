"""The kinds of values that requests carry, strict about JSON types."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from marshmallow import ValidationError, fields

LARGEST_QTY = 1_000_000_000
LARGEST_PRICE = Decimal(1_000_000_000)
SIGNIFICANT_DIGITS = 15
"""A decimal of so many digits survives a binary double and back through its shortest text, which
is how some SDKs carry prices."""

_CLIENT_ORDER_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_DIGITS = re.compile(r"[0-9]{1,9}")
_ORDER_ID = re.compile(r"[\x21-\x7e]{1,64}")


class Price(fields.Field[Decimal]):
    """A positive JSON number with at most 15 significant digits, kept exactly as typed."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> Decimal:
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise ValidationError("must be a number")
        number = Decimal(value)
        if not number.is_finite() or number <= 0:
            raise ValidationError("must be greater than 0")
        if number > LARGEST_PRICE:
            raise ValidationError(f"must be at most {LARGEST_PRICE}")
        # Not normalize(): that rounds to the context's 28 digits.
        digits = "".join(map(str, number.as_tuple().digits)).rstrip("0")
        if len(digits) > SIGNIFICANT_DIGITS:
            raise ValidationError(f"must have at most {SIGNIFICANT_DIGITS} significant digits")
        if number.adjusted() < -SIGNIFICANT_DIGITS:
            raise ValidationError("is too small")
        return number


class Quantity(fields.Field[int]):
    """A positive whole JSON number."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> int:
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise ValidationError("must be a whole number")
        number = Decimal(value)
        if not number.is_finite() or number <= 0:
            raise ValidationError("must be a whole number greater than 0")
        if number > LARGEST_QTY:
            raise ValidationError(f"must be at most {LARGEST_QTY}")
        if number != number.to_integral_value():
            raise ValidationError("must be a whole number")
        return int(number)


class EnumName(fields.Field[enum.Enum]):
    """One of an enum's names, spelled exactly."""

    def __init__(self, kind: type[enum.Enum], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind
        self.names = [member.name for member in kind]

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> enum.Enum:
        if not isinstance(value, str) or value not in self.names:
            raise ValidationError(f"must be one of: {', '.join(self.names)}")
        return self.kind[value]


class OneOf(fields.Field[str]):
    """One of the given texts, spelled exactly."""

    def __init__(self, names: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = list(names)

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> str:
        if not isinstance(value, str) or value not in self.names:
            raise ValidationError(f"must be one of: {', '.join(self.names)}")
        return value


class Text(fields.Field[str]):
    """A JSON string of a given form."""

    def __init__(self, form: re.Pattern[str], sentence: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.form = form
        self.sentence = sentence

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> str:
        if not isinstance(value, str) or self.form.fullmatch(value) is None:
            raise ValidationError(self.sentence)
        return value


class Digits(fields.Integer):
    """A whole number in a query: ASCII digits alone, where `int()` takes those of any script."""

    def _deserialize(
        self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any
    ) -> int:
        if not isinstance(value, str) or _DIGITS.fullmatch(value) is None:
            raise self.make_error("invalid")
        return int(value)


def client_order_id(**kwargs: Any) -> Text:
    return Text(_CLIENT_ORDER_ID, "must be 1 to 64 of A-Z a-z 0-9 . _ : -", **kwargs)


def order_id(**kwargs: Any) -> Text:
    return Text(_ORDER_ID, "must be a string of 1 to 64 visible ASCII characters", **kwargs)
