"""Quotes and market states."""

from __future__ import annotations

from typing import Any

from httptrading.app.ask import Ask
from httptrading.model import Contract
from httptrading.schemas.request import ContractQuery
from httptrading.schemas.response import QuoteNode, dump, dump_market_status


def market_quote(ask: Ask) -> dict[str, Any]:
    contract = ask.query(ContractQuery, Contract)
    quote = ask.instance.quote(contract, ask.deadline, fresh=ask.fresh)
    return {"quote": dump(QuoteNode, quote)}


def market_state(ask: Ask) -> dict[str, Any]:
    states = ask.instance.market_status(ask.deadline, fresh=ask.fresh)
    return {"marketStatus": dump_market_status(states)}
