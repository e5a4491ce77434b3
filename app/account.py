"""ping, cash, positions and the instance's own state."""

from __future__ import annotations

from typing import Any

from httptrading.app.ask import Ask
from httptrading.schemas.request import CashQuery, PositionQuery
from httptrading.schemas.response import CashNode, PositionNode, dump, dump_instance_state


def ping_state(ask: Ask) -> dict[str, Any]:
    return {"pong": ask.instance.ping(ask.deadline, fresh=ask.fresh)}


def cash_state(ask: Ask) -> dict[str, Any]:
    currency = ask.query(CashQuery, dict).get("currency")
    cash = ask.instance.cash(currency, ask.deadline, fresh=ask.fresh)
    return {"cash": dump(CashNode, cash)}


def position_state(ask: Ask) -> dict[str, Any]:
    wanted = ask.query(PositionQuery, dict)
    positions = ask.instance.positions(ask.deadline, fresh=ask.fresh, **wanted)
    return {"positions": [dump(PositionNode, position) for position in positions]}


def instance_state(ask: Ask) -> dict[str, Any]:
    return {"state": dump_instance_state(ask.instance.state())}
