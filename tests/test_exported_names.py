"""The public names: those of the documents, and nothing that is merely lying about."""

from __future__ import annotations

import builtins
import re
import types
from pathlib import Path

import httptrading
import httptrading.model

ROOT = Path(__file__).parent.parent

DOCUMENTED = {
    "BaseBroker",
    "Futu",
    "InteractiveBrokers",
    "LongBridge",
    "Paper",
    "Tiger",
    "broker_register",
    "create_app",
    "create_blueprint",
    "run",
}

MODEL = {
    "Cash",
    "Contract",
    "Lifecycle",
    "MarketStatus",
    "Order",
    "OrderType",
    "Position",
    "Quote",
    "TimeInForce",
    "TradeType",
    "UnifiedStatus",
    "Unit",
}


def test_every_documented_name_is_public() -> None:
    assert set(httptrading.__all__) >= DOCUMENTED
    assert set(httptrading.model.__all__) >= MODEL


def test_the_errors_that_a_broker_is_told_to_raise_are_public() -> None:
    for document in (ROOT / "docs").rglob("*.md"):
        raised = set(re.findall(r"\braise ([A-Z]\w+)", document.read_text()))
        assert raised - set(dir(builtins)) <= set(httptrading.__all__), document


def test_every_public_name_is_importable() -> None:
    for module in (httptrading, httptrading.model):
        assert all(hasattr(module, name) for name in module.__all__)
        assert len(module.__all__) == len(set(module.__all__))


def test_no_module_is_exported_by_a_star() -> None:
    exported = [getattr(httptrading, name) for name in httptrading.__all__]
    assert not [each for each in exported if isinstance(each, types.ModuleType)]
    assert not [name for name in httptrading.__all__ if name.startswith("_")]
