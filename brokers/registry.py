"""Names and classes of brokers: `@broker_register` and the lookup by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class BrokerMeta:
    """`name` stands in answers as `broker`, `display` as `brokerDisplay`."""

    name: str
    display: str


_META: dict[type, BrokerMeta] = {}

BUILT_IN = {
    "Paper": "httptrading.brokers.paper",
    "Futu": "httptrading.brokers.futu",
    "Moomoo": "httptrading.brokers.futu",
    "InteractiveBrokers": "httptrading.brokers.interactive_brokers",
    "LongBridge": "httptrading.brokers.longbridge",
    "Tiger": "httptrading.brokers.tiger",
}
"""Class name → module; imported on use, so that no adapter costs anything unless it is used."""


def broker_register(name: str, display: str) -> Callable[[_Class], _Class]:
    """Gives a broker class its `broker` and `brokerDisplay`."""

    def register(broker_class: _Class) -> _Class:
        _META[broker_class] = BrokerMeta(name, display)
        return broker_class

    return register


def broker_meta(broker_class: type) -> BrokerMeta:
    """The nearest registration in the class's ancestry; its own name for an unregistered one."""
    for ancestor in broker_class.__mro__:
        if ancestor in _META:
            return _META[ancestor]
    return BrokerMeta(broker_class.__name__, broker_class.__name__)


def broker_class(name: str) -> type:
    """The class for a name like `Futu`, or for an import path like `package.module:Class`.

    Raises ValueError with a sentence that says what is wrong and what is near.
    """
    module_name, colon, class_name = name.partition(":")
    if not colon:
        if name not in BUILT_IN:
            near = difflib.get_close_matches(name, BUILT_IN, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = ", ".join(BUILT_IN)
            raise ValueError(
                f"unknown broker {name!r}{hint} (known: {known}, or an import path module:Class)"
            )
        module_name, class_name = BUILT_IN[name], name
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"broker {name!r} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ValueError(f"{name!r} is not a class")
    return found
