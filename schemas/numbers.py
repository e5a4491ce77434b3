"""JSON text with exact numbers: read into `Decimal`, written as plain decimal digits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import simplejson

from httptrading.model import Number, exact

DEEPEST = 32
"""How deeply a request's JSON may be nested; no documented body has more than one level."""

_BEYOND_DOUBLES = 400  # a power of ten that no double reaches


class _Plain(Decimal):
    """Written without an exponent and without trailing zeros: `200`, `0.00773`."""

    def __str__(self) -> str:
        text = format(self, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text


class _WithFraction(Decimal):
    """Written with a fraction always: `30877.0`, as a Python float is."""

    def __str__(self) -> str:
        text = str(_Plain(self))
        return text if "." in text else text + ".0"


def plain(number: Number) -> Decimal:
    return _Plain(_finite(number))


def with_fraction(number: Number) -> Decimal:
    return _WithFraction(_finite(number))


def _finite(number: Number) -> Decimal:
    """ValueError for NaN and infinities."""
    value = exact(number)
    if not value.is_finite():
        raise ValueError("not a finite number")
    return value or Decimal(0)  # -0 is 0


class HalfSurrogate(ValueError):
    """`field`: the key of the body in which it stands; "" when that is a key itself."""

    def __init__(self, field: str) -> None:
        super().__init__(f"has half a surrogate pair in {field or 'a key'}")
        self.field = field


def load_json(text: str | bytes) -> Any:
    """Parses strict JSON with exact numbers; NaN and infinities come back as such Decimals, so that
    the field they stand in can be named.

    ValueError, whose text goes on after "The body …", for what is no JSON, and for JSON that two
    readers may understand differently: a key that stands twice, half a surrogate pair.
    """
    try:
        value = json.loads(
            text,
            parse_float=_fraction,
            parse_constant=Decimal,
            parse_int=_integer,
            object_pairs_hook=_object,
        )
    except json.JSONDecodeError:
        raise ValueError("is not valid JSON") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    _check_depth_and_texts(value)
    return value


def _integer(digits: str) -> int | Decimal:
    # int() of thousands of digits is slow on purpose (CPython limits it); such a number is no use.
    return int(digits) if len(digits) <= 40 else Decimal(digits)


def _fraction(text: str) -> Decimal:
    """Beyond what a double holds, a number becomes an infinity or 0, as for most readers of JSON:
    printing 1e999999999 would take a billion digits."""
    try:
        number = Decimal(text)
    except InvalidOperation:  # an exponent of more digits than the decimal module takes
        return Decimal(0) if "e-" in text.lower() else Decimal("Infinity")
    if number and number.adjusted() > _BEYOND_DOUBLES:
        return Decimal("Infinity").copy_sign(number)
    return number if number.adjusted() > -_BEYOND_DOUBLES else Decimal(0)


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("names a key twice")
    return found


def _check_depth_and_texts(value: Any) -> None:
    level = [("", value)]
    for _ in range(DEEPEST):
        inner: list[tuple[str, Any]] = []
        for field, item in level:
            if isinstance(item, dict):
                inner += ((field, key) for key in item)
                inner += ((field or key, below) for key, below in item.items())
            elif isinstance(item, list):
                inner += ((field, below) for below in item)
            elif isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise HalfSurrogate(field) from None
        if not inner:
            return
        level = inner
    raise ValueError("is nested too deeply")


_ENCODER = simplejson.JSONEncoder(use_decimal=True, ensure_ascii=False, allow_nan=False)


def dump_json(value: Any) -> str:
    """JSON text; ValueError for what is none (a NaN)."""
    return str(_ENCODER.encode(value))
