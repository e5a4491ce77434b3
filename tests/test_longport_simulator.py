"""The LongPort simulator speaks what the real SDK speaks.

The SDK runs in a child process: it holds the GIL during every call, so a server in the same process
could never answer it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from simulators.exchange import Exchange, ExchangePosition, FaultKind, OrderStatus
from simulators.longport import LongPort

PRELUDE = """
import json, sys, time, threading
from decimal import Decimal
from longport.openapi import *
import longport
config = Config(app_key="app-key", app_secret="app-secret", access_token=sys.argv[4],
    http_url=sys.argv[1], quote_ws_url=sys.argv[2], trade_ws_url=sys.argv[3],
    enable_print_quote_packages=False)

def answer(value):
    print(json.dumps(value, default=str), flush=True)

def outcome(function, *arguments, **keywords):
    try:
        return str(function(*arguments, **keywords))
    except longport.OpenApiException as error:
        return f"{error.code}: {error.message}"

def submit(context, **changes):
    return context.submit_order(**{**dict(symbol="AAPL.US", order_type=OrderType.LO,
        side=OrderSide.Buy, submitted_quantity=Decimal(12), time_in_force=TimeInForceType.Day,
        submitted_price=Decimal("200.01"), outside_rth=OutsideRTH.AnyTime, remark="mark-1"),
        **changes}).order_id
"""


class Child:
    """The real SDK in its own process, running one script; `next()` is what it answered."""

    def __init__(self, server: LongPort, script: str, token: str = "token-1") -> None:
        addresses = [server.http_url, server.quote_ws_url, server.trade_ws_url, token]
        environment = {
            name: value for name, value in os.environ.items() if "proxy" not in name.lower()
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, *addresses],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def next(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the child ended without an answer"
        return json.loads(line)

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


@pytest.fixture
def server(exchange: Exchange) -> Iterator[LongPort]:
    with LongPort(exchange) as server:
        yield server


def test_an_order_lives_through_rest_and_pushes(exchange: Exchange, server: LongPort) -> None:
    script = """
context = TradeContext(config)
pushed = []
context.set_on_order_changed(lambda event: pushed.append(
    [event.order_id, str(event.status), event.submitted_quantity, event.executed_quantity,
     event.remark, event.msg]))
context.subscribe([TopicType.Private])
order_id = submit(context)
answer(order_id)
sys.stdin.readline()
while not pushed or pushed[-1][1] != "OrderStatus.PartialWithdrawal":
    time.sleep(0.01)
detail = context.order_detail(order_id)
answer([pushed, str(detail.status), detail.executed_price, detail.remark])
"""
    with Child(server, script) as child:
        order_id = child.next()
        exchange.fill(order_id, 5, "200.005")
        exchange.settle(order_id, OrderStatus.PENDING_CANCEL)
        exchange.cancel(order_id)
        child.go_on()
        pushed, status, executed_price, remark = child.next()
    wire = exchange.received("place")[0].fields
    assert wire["submitted_price"] == "200.01"
    assert (wire["symbol"], wire["outside_rth"], wire["remark"]) == (
        "AAPL.US",
        "ANY_TIME",
        "mark-1",
    )
    assert [row[1].removeprefix("OrderStatus.") for row in pushed] == [
        "New",
        "PartialFilled",
        "PendingCancel",
        "PartialWithdrawal",
    ]
    assert pushed[-1] == [order_id, "OrderStatus.PartialWithdrawal", "12", "5", "mark-1", ""]
    assert (status, executed_price, remark) == (
        "OrderStatus.PartialWithdrawal",
        "200.005",
        "mark-1",
    )


def test_account_lists_and_cancel(exchange: Exchange, server: LongPort) -> None:
    exchange.positions = [
        ExchangePosition("US", "QQQ", "USD", Decimal("2400.5")),
        ExchangePosition("HK", "00700", "HKD", Decimal(-100)),
    ]
    script = """
context = TradeContext(config)
order_id = submit(context, symbol="700.HK", outside_rth=None)
today = [[o.order_id, o.symbol, o.remark] for o in context.today_orders()]
context.cancel_order(order_id)
cash = {i.currency: i.available_cash for i in context.account_balance()[0].cash_infos}
held = [[c.account_channel, [[p.symbol, p.quantity] for p in c.positions]]
        for c in context.stock_positions().channels]
again = outcome(context.cancel_order, order_id)
answer([order_id, today, cash, held, again, outcome(context.order_detail, "1"),
        [e.trade_id for e in context.today_executions()]])
"""
    with Child(server, script) as child:
        order_id, today, cash, held, again, unknown, trades = child.next()
    assert today == [[order_id, "700.HK", "mark-1"]]
    assert int(order_id) > 2**53
    assert cash == {"USD": "30877.499", "HKD": "1000.5"}
    assert held == [["lb", [["QQQ.US", "2400.5"]]], ["lb_papertrading", [["700.HK", "-100"]]]]
    assert again.startswith("603015: ")
    assert unknown.startswith("602001: ")
    assert trades == []
    assert exchange.orders[order_id].status is OrderStatus.CANCELED


def test_quotes_calendar_and_a_cut_connection(exchange: Exchange, server: LongPort) -> None:
    exchange.quote("CN", "000001", latest=Decimal("11.53"))
    exchange.quote("US", "AAPL", latest=Decimal("200.123"), is_tradable=False)
    script = """
import datetime
context = QuoteContext(config)
def quotes():
    return [[q.symbol, q.last_done, str(q.trade_status), q.timestamp.timestamp()]
            for q in context.quote(["000001.SZ", "AAPL.US"])]
sessions = [[str(m.market), [[s.begin_time, s.end_time, str(s.trade_session)]
            for s in m.trade_sessions]] for m in context.trading_session()]
days = context.trading_days(Market.US, datetime.date(2026, 11, 20), datetime.date(2026, 11, 23))
answer([quotes(), sessions, days.trading_days, days.half_trading_days,
        [s.currency for s in context.static_info(["AAPL.US"])],
        outcome(context.quote, ["NONE.US"])])
sys.stdin.readline()
answer(quotes())
"""
    with Child(server, script) as child:
        quotes, sessions, days, half_days, currencies, unknown = child.next()
        server.cut("quote")
        # The SDK has seen it: a question asked on the broken connection would be lost.
        exchange.wait_for(lambda: len(exchange.received("connect")) == 2)
        child.go_on()
        again = child.next()
    moment = int(exchange.quote("CN", "000001").epoch)
    assert quotes[0] == ["000001.SZ", "11.53", "TradeStatus.Normal", moment]
    assert quotes[1][:3] == ["AAPL.US", "200.123", "TradeStatus.Halted"]
    assert [market for market, _ in sessions] == ["Market.US", "Market.HK", "Market.CN"]
    assert ["04:00:00", "09:30:00", "TradeSession.Pre"] in sessions[0][1]
    assert (days, half_days) == (["2026-11-20", "2026-11-23"], [])
    assert currencies == ["USD"]
    assert "301600" in unknown
    assert again[0][:2] == ["000001.SZ", "11.53"]
    how = [request.fields["how"] for request in exchange.received("connect")]
    assert how == ["auth", "reconnect"]


def test_refusals_of_token_signature_and_connections(exchange: Exchange, server: LongPort) -> None:
    script = "answer(outcome(TradeContext, config))"
    with Child(server, script, token="another") as child:
        assert child.next() == "401004: token invalid"
    server.expire_token()
    with Child(server, script) as child:
        assert child.next() == "401003: token expired"
    server.tokens["token-1"] = time.time() + 1000
    server.connection_limit = 0
    with Child(server, script) as child:
        assert "connections limitation is hit" in child.next()
    server.app_secret = "changed"
    with Child(server, script) as child:
        assert child.next() == "403201: signature invalid"


def test_a_refreshed_token_replaces_the_old_one(exchange: Exchange, server: LongPort) -> None:
    script = "answer([config.refresh_access_token(), outcome(TradeContext, config)])"
    with Child(server, script) as child:
        token, old = child.next()
    assert list(server.tokens) == [token]
    assert old == "401004: token invalid"


@pytest.mark.parametrize("call", ["submit(TradeContext(config))", "raw()"])
def test_the_sdk_posts_an_order_again_after_a_bare_429(
    exchange: Exchange, server: LongPort, call: str
) -> None:
    """Why the adapter does not place orders through the SDK, not even its raw HttpClient."""
    exchange.fault("place", FaultKind.RATE_LIMIT, text="bare", times=2)
    exchange.fault("place", FaultKind.RATE_LIMIT)
    script = """
def raw():
    client = HttpClient(sys.argv[1], "app-key", "app-secret", sys.argv[4])
    return client.request("post", "/v1/trade/order", None, dict(symbol="AAPL.US", order_type="LO",
        side="Buy", submitted_quantity="1", time_in_force="Day", submitted_price="1.5"))
"""
    with Child(server, f"{script}\nanswer(outcome(lambda: {call}))") as child:
        assert child.next().startswith("429002: ")
    assert len(exchange.received("place")) == 3


@pytest.mark.parametrize(
    ("kind", "placed"),
    [
        (FaultKind.CUT, 0),
        (FaultKind.ACCEPT_THEN_CUT, 1),
        (FaultKind.GARBAGE, 0),
        (FaultKind.REFUSE, 0),
        (FaultKind.LATE, 1),
    ],
)
def test_faults_of_an_order(
    exchange: Exchange, server: LongPort, kind: FaultKind, placed: int
) -> None:
    exchange.fault("place", kind, text="502" if kind is FaultKind.GARBAGE else "no", seconds=0.2)
    script = "context = TradeContext(config)\nanswer(outcome(submit, context))"
    with Child(server, script) as child:
        outcome = child.next()
    assert len(exchange.received("place")) == 1
    assert len(exchange.by_mark("mark-1")) == placed
    assert outcome.isdigit() == (kind is FaultKind.LATE)


def test_it_stops_quickly_and_starts_again_on_its_port(exchange: Exchange) -> None:
    server = LongPort(exchange).start()
    port = server.port
    server.deaf = True
    with Child(server, "answer(1)\nanswer(outcome(TradeContext, config))") as child:
        child.next()
        exchange.wait_for(lambda: server.connected())
        server.stop()
        assert "error" in child.next().lower()
    server.deaf = False
    with server:
        assert server.port == port
        with Child(server, "TradeContext(config)\nanswer(1)") as child:
            assert child.next() == 1
