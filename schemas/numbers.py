"""JSON text with exact numbers: read into `Decimal`, written as plain decimal digits."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import simplejson


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


def exact(number: Any) -> Decimal:
    """A number's shortest exact decimal; ValueError for NaN and infinities.

    >>> exact(200.01)
    Decimal('200.01')
    """
    value = number if isinstance(number, Decimal) else Decimal(repr(number))
    if not value.is_finite():
        raise ValueError("not a finite number")
    return value


def plain(number: Any) -> Decimal:
    return _Plain(exact(number) or 0)  # -0 is 0


def with_fraction(number: Any) -> Decimal:
    return _WithFraction(exact(number) or 0)


def load_json(text: str | bytes) -> Any:
    """Parses strict JSON with exact numbers; NaN and infinities come back as such Decimals, so that
    the field they stand in can be named. ValueError for anything else than JSON."""
    try:
        return json.loads(text, parse_float=Decimal, parse_constant=Decimal, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _integer(digits: str) -> int | Decimal:
    # int() of thousands of digits is slow on purpose (CPython limits it); such a number is no use.
    return int(digits) if len(digits) <= 40 else Decimal(digits)


def dump_json(value: Any) -> str:
    return str(simplejson.dumps(value, use_decimal=True, ensure_ascii=False, allow_nan=False))
