"""Futu and Moomoo with the real SDKs against OpenD on the wire: the adapter by itself."""

import hashlib
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from acceptance.kit import wait_for
from httptrading.brokers import futu, futu_sdk
from httptrading.brokers.futu import Futu, Moomoo
from httptrading.errors import (
    BrokerUnavailable,
    HttpTradingError,
    OrderNotFound,
    OutcomeUnknown,
    RateLimited,
    Rejected,
    TimedOut,
    Unsupported,
)
from httptrading.model import (
    Contract,
    Fill,
    Lifecycle,
    OrderReport,
    OrderType,
    TimeInForce,
    TradeType,
)
from simulators.exchange import Exchange, ExchangePosition, FaultKind, OrderStatus
from simulators.opend import ACCOUNTS, REAL, SIMULATE, Account, OpenD

AAPL = Contract(TradeType.Securities, "AAPL", "US")
PIN = "123456"
PIN_MD5 = hashlib.md5(PIN.encode()).hexdigest()
REAL_ACCOUNT = ACCOUNTS[1].acc_id


class Told:
    """What a broker told its worker (the `Link` of brokers/base.py), and the slots it took."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.reports: list[OrderReport] = []
        self.fills: list[Fill] = []
        self.losses: list[str] = []
        self.taken: list[str] = []

    def _tell(self, add: Callable[[], Any]) -> None:
        with self.changed:
            add()
            self.changed.notify_all()

    def report(self, reports: Any) -> None:
        self._tell(lambda: self.reports.extend(reports))

    def fill(self, fills: Any) -> None:
        self._tell(lambda: self.fills.extend(fills))

    def lost(self, reason: str) -> None:
        self._tell(lambda: self.losses.append(reason))

    def take(self, window: str) -> None:
        self._tell(lambda: self.taken.append(window))

    def stale(self) -> None: ...

    def restored(self) -> None: ...

    def wait_for(self, condition: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 60), (self.reports, self.losses)


@pytest.fixture(autouse=True)
def no_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker tries again here: a machine that stands still for seconds is not a deaf OpenD."""
    monkeypatch.setattr(futu_sdk, "CONNECT_SECONDS", 60.0)
    monkeypatch.setattr(futu_sdk, "SILENT_SECONDS", 60.0)


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


@pytest.fixture
def opend(exchange: Exchange) -> Iterator[OpenD]:
    with OpenD(exchange) as opend:
        yield opend


@pytest.fixture
def connect(opend: OpenD, tmp_path: Path) -> Iterator[Callable[..., Futu]]:
    """Makes connected copies, as a worker does; `broker._link` is their `Told`."""
    made: list[Futu] = []

    def connect(
        broker_class: type[Futu] = Futu,
        connection: str = "trade",
        **arguments: Any,
    ) -> Futu:
        given = {"host": "127.0.0.1", "port": opend.port, "trade_env": "REAL"} | arguments
        broker = broker_class(given, "FutuInstance0001", ["futuToken0000001"])
        broker.connection, broker.data_dir, broker._link = connection, tmp_path, Told()  # type: ignore[assignment]
        made.append(broker)
        broker.connect()
        return broker

    yield connect
    for broker in made:
        broker.close()


def told(broker: Futu) -> Told:
    assert isinstance(broker._link, Told)
    return broker._link


def place(broker: Futu, contract: Contract = AAPL, **changes: Any) -> str:
    order = {
        "order_type": OrderType.Limit,
        "time_in_force": TimeInForce.DAY,
        "lifecycle": Lifecycle.RTH,
        "direction": "BUY",
        "qty": 12,
        "price": 200.01,
        "mark": "ht-1",
    } | changes
    return broker.place_order(contract, **order)


# --- what reaches OpenD -------------------------------------------------------------------------
HK = Contract(TradeType.Securities, "00700", "HK")
SHANGHAI = Contract(TradeType.Securities, "600519", "CN")
SHENZHEN = Contract(TradeType.Securities, "000001", "CN")
BERKSHIRE = Contract(TradeType.Securities, "BRK.B", "US")
US_MARKET, HK_MARKET, CN_MARKET, HKCC_MARKET = 2, 1, 3, 4


@pytest.mark.parametrize("broker_class", [Futu, Moomoo])
@pytest.mark.parametrize(
    ("env", "contract", "changes", "expected"),
    [
        ("REAL", AAPL, {}, {"session": 1}),
        ("REAL", BERKSHIRE, {"price": 480.005}, {"code": "BRK.B", "price": 480.005}),
        ("REAL", AAPL, {"lifecycle": Lifecycle.ETH}, {"session": 2, "fillOutsideRTH": True}),
        ("REAL", AAPL, {"lifecycle": Lifecycle.OVERNIGHT}, {"session": 4}),
        ("REAL", AAPL, {"time_in_force": TimeInForce.GTC}, {"timeInForce": 1}),
        ("REAL", AAPL, {"direction": "SELL"}, {"trdSide": 2}),
        ("REAL", AAPL, {"order_type": OrderType.Market, "price": None}, {"orderType": 2}),
        ("REAL", HK, {}, {"code": "00700", "secMarket": 1, "session": 0}),
        ("REAL", SHANGHAI, {}, {"code": "600519", "secMarket": 31, "session": 0}),
        ("REAL", SHENZHEN, {}, {"code": "000001", "secMarket": 32}),
        ("SIMULATE", AAPL, {}, {"session": 1}),
        ("SIMULATE", HK, {}, {"secMarket": 1}),
        ("SIMULATE", SHANGHAI, {}, {"secMarket": 31}),
    ],
)
def test_every_field_of_an_order(
    connect: Callable[..., Futu],
    exchange: Exchange,
    broker_class: type[Futu],
    env: str,
    contract: Contract,
    changes: dict[str, Any],
    expected: dict[str, Any],
) -> None:
    order_id = place(connect(broker_class, trade_env=env), contract, **changes)
    wire = exchange.orders[order_id].wire
    market = {"US": US_MARKET, "HK": HK_MARKET}.get(
        contract.region, HKCC_MARKET if env == "REAL" else CN_MARKET
    )
    account = next(
        account.acc_id
        for account in ACCOUNTS
        if account.active
        and account.env == (1 if env == "REAL" else SIMULATE)
        and account.sim_type != 2
        and (env == "REAL" or contract.region in account.markets)
    )
    usual = {
        "trdSide": 1,
        "orderType": 1,
        "code": contract.ticker,
        "qty": 12.0,
        "price": 200.01 if changes.get("price", 0) is not None else 0.0,
        "adjustPrice": False,
        "secMarket": 2,
        "remark": "ht-1",
        "timeInForce": 0,
        "fillOutsideRTH": False,
    }
    for name, value in (usual | expected).items():
        assert wire[name] == value, name
    header = {"trdEnv": 1 if env == "REAL" else 0, "accID": account, "trdMarket": market}
    assert header.items() <= wire["header"].items()


def test_placing_sends_nothing_but_the_order(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    broker = connect()
    before = len(exchange.requests)
    place(broker)
    sent = [request.operation for request in exchange.requests[before:]]
    assert [operation for operation in sent if operation != "keepalive"] == ["place"]
    assert told(broker).taken == []


def test_the_accounts_are_asked_for_before_the_first_order_only(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    broker = connect()
    before = len(exchange.received("accounts"))
    order_id = place(broker)
    broker.order(order_id)
    broker.cancel_order(order_id)
    broker.cash()
    broker.positions()
    broker.recent_orders()
    assert len(exchange.received("accounts")) == before


@pytest.mark.parametrize(
    ("arguments", "account"),
    [({"acc_id": 42}, 42), ({}, 41), ({"security_firm": "FUTUINC"}, 43)],
)
def test_the_account_asked_for_is_used(
    connect: Callable[..., Futu],
    opend: OpenD,
    exchange: Exchange,
    arguments: dict[str, Any],
    account: int,
) -> None:
    opend.accounts = (
        Account(41, 1, ("HK", "US", "HKCC")),
        Account(42, 1, ("US",)),
        Account(43, 1, ("US",), firm=2),
    )
    order_id = place(connect(**arguments))
    assert exchange.orders[order_id].account == str(account)


def test_a_japanese_account_for_derivatives_is_not_one_for_stocks(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    """It trades options on US stocks, so it has the market (intro.html of moomoo in Japan)."""
    opend.accounts = (
        Account(51, REAL, ("US",), firm=7, acc_type=6),
        Account(52, REAL, ("US",), firm=7, acc_type=1),
    )
    broker = connect()
    order_id = place(broker)
    broker.positions()
    assert exchange.orders[order_id].account == "52"
    asked = [request.fields["header"]["accID"] for request in exchange.received("positions")]
    assert asked == [52]


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux delays acknowledgements")
def test_an_answer_behind_a_push_is_not_held_up(connect: Callable[..., Futu], opend: OpenD) -> None:
    """By 40 ms, until the push is acknowledged."""

    def seconds(broker: Futu) -> float:
        began = time.monotonic()
        place(broker)
        return time.monotonic() - began

    def quickest(*, behind: bool) -> float:
        opend.holds_back = behind  # counts for new connections
        broker = connect()
        return min(seconds(broker) for _ in range(20))

    assert quickest(behind=True) < 0.03 + quickest(behind=False), "also on a busy machine"


def test_what_is_unsent_does_not_outlive_its_connection(
    connect: Callable[..., Futu], opend: OpenD
) -> None:
    """An order given up in an outage would reach OpenD after it, when its lists had proved that
    there is none (test_longbridge_rest.py shows it): so the end is a reset."""
    connect().close()
    wait_for(lambda: opend.resets, "the end of the connection")


def test_the_master_of_other_accounts_gets_no_orders(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    opend.accounts = (
        Account(61, REAL, ("HK", "US", "HKCC"), role=2),
        Account(62, REAL, ("HK", "US", "HKCC")),
    )
    assert exchange.orders[place(connect())].account == "62"


def test_orders_stay_with_their_account_when_the_list_changes(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    """'acc_index will change when adding/closing an account' (get-funds.html)."""
    first, second = Account(71, REAL, ("HK", "US")), Account(72, REAL, ("HK", "US"))
    opend.accounts = (second,)
    order_id = place(connect())
    opend.accounts = (first, second)
    broker = connect()
    assert exchange.orders[place(broker)].account == "72"
    broker.cancel_order(order_id)
    assert exchange.orders[order_id].status is OrderStatus.CANCELED
    opend.accounts = (first, replace(second, active=False))
    assert exchange.orders[place(connect())].account == "71"
    opend.accounts = (first, second)
    assert exchange.orders[place(connect(acc_id=71))].account == "71"
    assert exchange.orders[place(connect())].account == "72"


def test_orders_stay_with_their_security_firm_when_the_list_changes(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    """Without one the SDK takes that of the first real account (open_trade_context.py:198)."""
    first, second = Account(71, REAL, ("HK", "US")), Account(72, REAL, ("HK", "US"), firm=2)
    opend.accounts = (second,)
    order_id = place(connect())
    opend.accounts = (first, second)
    broker = connect()
    assert exchange.orders[place(broker)].account == "72"
    broker.cancel_order(order_id)
    assert exchange.orders[order_id].status is OrderStatus.CANCELED
    opend.accounts = (first,)
    with pytest.raises(BrokerUnavailable, match="no REAL account .security_firm FUTUINC"):
        connect()
    assert exchange.orders[place(connect(security_firm="FUTUSECURITIES"))].account == "71"


def test_a_missing_account_is_named(connect: Callable[..., Futu], opend: OpenD) -> None:
    with pytest.raises(BrokerUnavailable, match="no REAL account with this acc_id"):
        connect(acc_id=1)
    opend.accounts = (Account(42, 1, ("HK",)),)
    with pytest.raises(Unsupported, match="no REAL account for region US"):
        place(connect())


# --- refused before sending -----------------------------------------------------------------
def test_accounts_refused_once_are_asked_for_on_a_new_connection(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    """The SDK goes on without them: with no pushes, and with the accounts of every firm."""
    opend.accounts = (
        Account(1, REAL, ("HK", "HKCC"), firm=1),
        Account(2, REAL, ("US",), firm=2),
    )
    exchange.fault("accounts", FaultKind.REFUSE, text="服务器繁忙")
    with pytest.raises(BrokerUnavailable, match="accounts"):
        connect()
    assert exchange.received("subscribe") == []
    broker = connect()
    with pytest.raises(Unsupported, match="no REAL account for region US"):
        place(broker)
    order_id = place(broker, HK)
    told(broker).wait_for(
        lambda: order_id in [report.order.order_id for report in told(broker).reports]
    )


@pytest.mark.parametrize(
    ("env", "contract", "changes", "words"),
    [
        ("REAL", AAPL, {"lifecycle": Lifecycle.ETH, "order_type": OrderType.Market}, "US Market"),
        ("REAL", HK, {"lifecycle": Lifecycle.ETH}, "HK Limit GTC RTH"),
        ("REAL", HK, {"order_type": OrderType.Market, "time_in_force": TimeInForce.GTC}, "DAY"),
        ("REAL", SHANGHAI, {"order_type": OrderType.Market}, "CN Limit"),
        ("SIMULATE", AAPL, {"lifecycle": Lifecycle.ETH}, "US Limit DAY RTH"),
        ("SIMULATE", AAPL, {"time_in_force": TimeInForce.GTC}, "US Limit DAY RTH"),
        ("REAL", AAPL, {"price": 200.0101}, "at most 3 decimals"),
        ("REAL", AAPL, {"price": 0.12345}, "at most 4 decimals"),
        ("REAL", HK, {"price": 0.1234}, "at most 3 decimals"),
        ("REAL", Contract(TradeType.Securities, "430047", "CN"), {}, "Beijing"),
    ],
)
def test_what_futu_cannot_do_is_said_before_sending(
    env: str, contract: Contract, changes: dict[str, Any], words: str
) -> None:
    order = {
        "order_type": OrderType.Limit,
        "time_in_force": TimeInForce.DAY,
        "lifecycle": Lifecycle.RTH,
        "direction": "BUY",
        "qty": 100,
        "price": 0.5,
    } | changes
    with pytest.raises(Unsupported, match=words):
        Futu({"trade_env": env}).check_order(contract, **order)


@pytest.mark.parametrize("price", [0.1234, 0.5, 1.001, 200.01, 100.0, None])
def test_prices_futu_takes(price: float | None) -> None:
    kind = OrderType.Limit if price else OrderType.Market
    Futu({"trade_env": "REAL"}).check_order(
        AAPL, kind, TimeInForce.DAY, Lifecycle.RTH, "BUY", 1, price
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "trade_env"),
        ({"trade_env": "PAPER"}, "REAL or SIMULATE"),
        ({"trade_env": "REAL", "unlock_pin": PIN}, "MD5"),
        ({"trade_env": "REAL", "pin": PIN}, "no argument 'pin'"),
        ({"trade_env": "REAL", "security_firm": "FUTU"}, "security_firm"),
        ({"trade_env": "REAL", "port": "x"}, "port"),
        ({"trade_env": "REAL", "acc_id": "U1"}, "acc_id"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        Futu(arguments)
    assert PIN not in str(raised.value)


# --- the life of an order -----------------------------------------------------------------------
def test_pushes_come_before_the_answer(connect: Callable[..., Futu], exchange: Exchange) -> None:
    broker = connect()
    exchange.fault("place", FaultKind.LATE, seconds=0.3)
    order_id = place(broker)
    told(broker).wait_for(lambda: told(broker).reports)
    first = told(broker).reports[0]
    assert (first.mark, first.order.order_id) == ("ht-1", order_id)
    exchange.fill(order_id, 5, "200")
    exchange.fill(order_id, 7, "200.01")
    told(broker).wait_for(lambda: len(told(broker).fills) == 2)
    assert [(fill.qty, fill.price) for fill in told(broker).fills] == [(5, 200), (7, 200.01)]
    told(broker).wait_for(lambda: told(broker).reports[-1].order.is_filled)
    assert sorted((fill.qty, fill.price) for fill in broker.fills(order_id)) == [
        (5, 200),
        (7, 200.01),
    ]


@pytest.mark.parametrize(
    "status", [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 21, 22, 23, 24, -1, 99]
)
def test_every_status_number_arrives(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange, status: int
) -> None:
    broker = connect()
    order_id = place(broker)
    exchange.orders[order_id].reason = "购买力不足"
    opend.raw_status[order_id] = status
    order = broker.order(order_id).order
    assert bool(order.error_reason) is (status in (3, 21, 22, 23, 24))
    assert "购买力不足" in order.error_reason or not order.error_reason
    assert order.is_canceled is (status in (14, 15))
    assert order.is_pending_cancel is (status in (12, 13))
    opend.push(exchange.orders[order_id])
    told(broker).wait_for(lambda: order in [report.order for report in told(broker).reports])


def test_orders_are_found_long_after_their_day(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    order_id = place(connect(trade_env="SIMULATE"), HK)
    exchange.fill(order_id, 12, "200")
    exchange.orders[order_id].epoch -= 80 * 86400
    broker = connect(trade_env="SIMULATE")
    assert broker.order(order_id).order.is_filled
    assert told(broker).taken[0].startswith("history")
    with pytest.raises(OrderNotFound):
        broker.order("987654321")


def test_a_listing_reaches_back_over_a_long_weekend(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    broker = connect()
    still_open, done, last_week, old = (place(broker) for _ in range(4))
    now = datetime.now(UTC)
    reach = (now - broker.listed_since(now)).days
    for order_id, days in ((still_open, 30), (done, 1), (last_week, reach), (old, 30)):
        exchange.orders[order_id].epoch -= days * 86400
    exchange.fill(done, 12, "200")
    exchange.fill(last_week, 12, "200")
    exchange.cancel(old)
    listed = {report.order.order_id: report for report in broker.recent_orders()}
    assert set(listed) == {still_open, done, last_week}
    assert told(broker).taken == ["orders US", "history US"]
    assert exchange.received("orders")[-1].fields["refreshCache"] is True
    assert listed[done].time is not None
    age = datetime.now(UTC) - listed[done].time
    assert timedelta(hours=23) < age < timedelta(hours=25)


def test_a_listing_reaches_as_far_back_as_it_says_in_every_time_zone(
    connect: Callable[..., Futu], exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dates are days of the market: early in the day of a gateway east of it, they begin late."""
    broker = connect()
    order_id = place(broker)
    since = broker.listed_since(datetime.now(UTC)) + timedelta(minutes=5)
    exchange.orders[order_id].epoch = since.timestamp()
    exchange.fill(order_id, 12, "200")
    try:
        with monkeypatch.context() as early:
            early.setenv("TZ", f"GATEWAY-{min(14, (24 - datetime.now(UTC).hour) % 24)}")
            time.tzset()
            assert [report.order.order_id for report in broker.recent_orders()] == [order_id]
    finally:
        time.tzset()


def test_fills_are_found_long_after_their_day(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    broker = connect()
    order_id, unfilled = place(broker), place(broker)
    assert broker.fills(unfilled) == []
    exchange.fill(order_id, 12, "200")
    order = exchange.orders[order_id]
    order.epoch -= 80 * 86400
    order.fills[0] = replace(order.fills[0], epoch=order.epoch)
    (fill,) = broker.fills(order_id)
    assert (fill.qty, fill.price, int(fill.time.timestamp())) == (12, 200, int(order.epoch))
    assert told(broker).taken == ["history US", "fills US"]
    with pytest.raises(Unsupported):
        connect(trade_env="SIMULATE").fills(order_id)


def test_fills_of_several_days(connect: Callable[..., Futu], exchange: Exchange) -> None:
    broker = connect()
    order_id = place(broker, time_in_force=TimeInForce.GTC)
    exchange.fill(order_id, 5, "200")
    order = exchange.orders[order_id]
    order.fills[0] = replace(order.fills[0], epoch=order.epoch - 86400)
    exchange.fill(order_id, 4, "201")
    assert sorted(fill.qty for fill in broker.fills(order_id)) == [4, 5]


def test_a_cancelled_fill_counts_nothing(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    broker = connect()
    order_id = place(broker)
    exchange.fill(order_id, 5, "200")
    exchange.fill(order_id, 4, "201")
    opend.busted.add(exchange.orders[order_id].fills[0].fill_id)
    assert [fill.qty for fill in broker.fills(order_id)] == [0, 4]


def test_optional_fields_may_be_missing(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    """Trd_Common.proto: secMarket of orders, fills and positions, fillQty of orders."""
    opend.left_out = {"secMarket", "fillQty"}
    exchange.positions = [ExchangePosition("HK", "00700", "HKD", Decimal(100))]
    broker = connect()
    order_id = place(broker, mark="ht-optional")
    exchange.fill(order_id, 12, "200")
    (report,) = broker.recent_orders()
    assert (report.mark, report.contract, report.order.is_filled) == ("ht-optional", AAPL, True)
    assert broker.order(order_id).order.filled_qty == 12
    assert [fill.qty for fill in broker.fills(order_id)] == [12]
    assert [position.contract for position in broker.positions()] == [HK]


def test_an_answer_without_a_required_field_is_no_answer(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    """The SDK takes it for a quantity of 0: the position would be missing in the list."""
    exchange.positions = [ExchangePosition("HK", "00700", "HKD", Decimal(100))]
    broker = connect()
    opend.left_out = {"qty"}
    with pytest.raises(TimedOut):
        broker.positions()


@pytest.mark.parametrize(
    ("proto", "ask", "error"),
    [
        (2101, lambda broker: broker.cash("HKD"), TimedOut),
        (2102, lambda broker: broker.positions(), TimedOut),
        (2201, lambda broker: broker.recent_orders(), TimedOut),
        (2202, lambda broker: place(broker), OutcomeUnknown),
    ],
    ids=["cash", "positions", "orders", "place"],
)
def test_another_accounts_answer_is_not_believed(
    connect: Callable[..., Futu], opend: OpenD, proto: int, ask: Callable[[Futu], Any], error: type
) -> None:
    """Its header says whose it is; the SDK does not look."""
    broker = connect()
    answer = opend._answer[proto]

    def of_another(connection: Any, request: Any) -> dict[str, Any]:
        found: dict[str, Any] = answer(connection, request)
        return {**found, "header": {**found["header"], "accID": 4711}}

    opend._answer[proto] = of_another
    with pytest.raises(error):
        ask(broker)


def test_a_position_told_twice_is_one(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    exchange.positions = [
        ExchangePosition("HK", code, "HKD", Decimal(100)) for code in ("00700", "00005")
    ]
    broker = connect()
    answer = opend._answer[2102]

    def doubled(connection: Any, request: Any) -> dict[str, Any]:
        found: dict[str, Any] = answer(connection, request)
        return {**found, "positionList": found["positionList"] * 2}

    opend._answer[2102] = doubled
    held = [(position.contract.ticker, position.qty) for position in broker.positions()]
    assert held == [("00700", 100), ("00005", 100)]


def test_an_order_of_ours_is_listed_whatever_its_row_lacks(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    """Trd_Common.proto: secMarket, trdMarket and currency of orders are optional."""
    opend.left_out = {"secMarket", "trdMarket", "currency"}
    broker = connect()
    order_id = place(broker, mark="ht-bare")
    exchange.fill(order_id, 5, "200")
    (report,) = broker.recent_orders()
    assert (report.mark, report.contract, report.order.order_id) == ("ht-bare", None, order_id)
    assert broker.order(order_id).order.filled_qty == 5


@pytest.mark.parametrize("env", ["REAL", "SIMULATE"])
def test_cancelling(connect: Callable[..., Futu], exchange: Exchange, env: str) -> None:
    broker = connect(trade_env=env)
    order_id = place(broker)
    broker.cancel_order(order_id)
    assert exchange.orders[order_id].status is OrderStatus.CANCELED
    wire = exchange.received("cancel")[0].fields
    assert (wire["orderIDEx"], wire["modifyOrderOp"]) == (order_id, 2)
    with pytest.raises(Rejected, match="finished already"):
        broker.cancel_order(order_id)
    with pytest.raises(OrderNotFound):
        broker.cancel_order("987654321")


@pytest.mark.parametrize(
    ("kind", "text"),
    [(FaultKind.RATE_LIMIT, ""), (FaultKind.CUT, ""), (FaultKind.REFUSE, "系统错误")],
)
def test_a_refused_cancel_stays_one_whatever_looking_meets(
    connect: Callable[..., Futu], exchange: Exchange, kind: FaultKind, text: str
) -> None:
    broker = connect()
    order_id = place(broker)
    exchange.fault("cancel", FaultKind.REFUSE, text="现在不能撤单")
    exchange.fault("order", kind, text=text)
    with pytest.raises(Rejected, match="现在不能撤单"):
        broker.cancel_order(order_id)


@pytest.mark.parametrize(("change", "question"), [("cancel", "order"), ("place", "ping")])
def test_why_something_was_refused_is_not_waited_for_long(
    connect: Callable[..., Futu],
    exchange: Exchange,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    question: str,
) -> None:
    """Cancellations wait meanwhile, and the answer is known: it was refused."""
    monkeypatch.setattr(futu, "EXPLAINED_WITHIN", 0.1, raising=False)
    broker = connect()
    order_id = place(broker)
    exchange.fault(change, FaultKind.REFUSE, text="现在不行")
    exchange.fault(question, FaultKind.HANG)
    began = time.monotonic()
    with pytest.raises(Rejected, match="现在不行"):
        broker.cancel_order(order_id) if change == "cancel" else place(broker)
    assert time.monotonic() < began + 11, "0.1 s on an idle machine; the SDK waits for 12 s"
    broker.cancel_order(order_id)
    assert exchange.orders[order_id].status is OrderStatus.CANCELED
    assert told(broker).losses == []


def test_an_order_placed_here_is_known_though_no_list_has_it_yet(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    """The SDK asks up to three times for one just placed (trade/open_trade_context.py:626)."""
    broker = connect()
    order_id = place(broker)
    exchange.forget(order_id)
    with pytest.raises(Rejected, match="订单不存在"):
        broker.cancel_order(order_id)


def test_an_order_of_another_account_is_not_cancelled(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    foreign = place(connect(trade_env="SIMULATE"))
    with pytest.raises(OrderNotFound):
        connect().cancel_order(foreign)
    assert not exchange.orders[foreign].status.is_final


def test_a_copy_that_never_saw_the_order_cancels_it_at_its_account(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    order_id = place(connect(trade_env="SIMULATE"), SHANGHAI)
    connect(trade_env="SIMULATE").cancel_order(order_id)
    assert exchange.orders[order_id].status is OrderStatus.CANCELED


def test_a_cancel_is_not_sent_when_nobody_tells_the_orders_account(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    order_id = place(connect(trade_env="SIMULATE"), SHANGHAI)
    broker = connect(trade_env="SIMULATE")
    exchange.fault("order", FaultKind.CUT)
    with pytest.raises(BrokerUnavailable, match="nothing was sent"):
        broker.cancel_order(order_id)
    assert exchange.received("cancel") == []


# --- unlocking ------------------------------------------------------------------------------
def test_trading_is_unlocked_when_opend_asks_for_it(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    opend.locked = True
    broker = connect(unlock_pin=PIN_MD5.upper())
    assert exchange.received("unlock") == []
    place(broker)
    assert exchange.least_gap(["place"]) >= 0.02
    assert told(broker).taken == ["unlock", "place"]
    place(broker)
    assert len(exchange.received("unlock")) == 1
    assert len(exchange.orders) == 2


def test_a_wrong_pin_is_tried_once(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    opend.locked = True
    wrong = hashlib.md5(b"wrong").hexdigest()
    broker = connect(unlock_pin=wrong)
    texts = []
    for _ in range(3):
        with pytest.raises(Rejected) as raised:
            place(broker)
        texts.append(str(raised.value))
    assert all("交易密码错误" in text and "unlock_pin is not tried" in text for text in texts)
    assert wrong not in " ".join(texts) + repr(broker)
    broker.close()
    broker._context = broker._link = None
    other = pickle.loads(pickle.dumps(broker))  # as a child process has it after a reconnect
    other._link = Told()
    other.connect()
    assert failing(lambda: place(other)).text == texts[0]
    other.close()
    assert len(exchange.received("unlock")) == 1
    with pytest.raises(Rejected):
        place(connect(unlock_pin=wrong))  # the service was restarted: tried once more
    assert len(exchange.received("unlock")) == 2
    assert exchange.orders == {}


@pytest.mark.parametrize(
    "words",
    ["交易密碼錯誤", "Unlock failed: incorrect PIN", "pwdMD5 is wrong", "解锁失败，输入不正确"],
)
def test_a_wrong_pin_is_known_by_its_words(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange, words: str
) -> None:
    opend.locked = True
    broker = connect(unlock_pin=PIN_MD5)
    exchange.fault("unlock", FaultKind.REFUSE, text=words)
    for _ in range(2):
        with pytest.raises(Rejected, match=words):
            place(broker)
    assert len(exchange.received("unlock")) == 1


def test_without_a_pin_the_lock_is_explained(connect: Callable[..., Futu], opend: OpenD) -> None:
    opend.locked = True
    with pytest.raises(Rejected, match="unlock it there, or configure unlock_pin"):
        place(connect())


# --- money and holdings -------------------------------------------------------------------------
@pytest.mark.parametrize("env", ["REAL", "SIMULATE"])
def test_cash_is_what_is_held_in_that_currency(
    connect: Callable[..., Futu], exchange: Exchange, env: str
) -> None:
    exchange.cash["CNY"] = Decimal("88.5")
    broker = connect(trade_env=env)
    held = {name: broker.cash(name).amount for name in ("USD", "HKD", "CNH", "CNY")}
    assert held == {"USD": 30877.499, "HKD": 1000.5, "CNH": 88.5, "CNY": 88.5}
    with pytest.raises(Unsupported, match="USD"):
        broker.cash("EUR")
    if env == "REAL":
        assert broker.cash("JPY").amount == 0
    else:
        with pytest.raises(Unsupported, match="No SIMULATE account"):
            broker.cash("JPY")


@pytest.mark.parametrize("env", ["REAL", "SIMULATE"])
def test_positions_of_every_market(
    connect: Callable[..., Futu], exchange: Exchange, env: str
) -> None:
    held = [
        ("US", "BRK.B", "USD", Decimal(-3)),
        ("HK", "00700", "HKD", Decimal(200)),
        ("CN", "600519", "CNH", Decimal("100")),
    ]
    exchange.positions = [ExchangePosition(*one) for one in held]
    broker = connect(trade_env=env)
    shown = {
        (found.contract.region, found.contract.ticker, found.currency, found.qty)
        for found in (*broker.positions(), *broker.positions())
    }
    assert shown == set(held)


def test_only_the_first_reads_of_a_connection_cost_a_slot(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    broker = connect()
    for _ in range(3):
        broker.cash()
        broker.positions()
    assert told(broker).taken == ["cash US", "positions US"]
    broker.close()
    broker.connect()
    broker.cash()
    assert told(broker).taken == ["cash US", "positions US", "cash US"]
    for operation, expected in {
        "cash": [True, None, None, True],
        "positions": [True, None, None],
    }.items():
        refreshed = [request.fields.get("refreshCache") for request in exchange.received(operation)]
        assert refreshed == expected


@pytest.mark.parametrize("name", ["positions", "cash"])
def test_a_refresh_that_was_refused_is_asked_for_again(
    connect: Callable[..., Futu], exchange: Exchange, name: str
) -> None:
    broker = connect()
    exchange.fault(name, FaultKind.RATE_LIMIT)
    with pytest.raises(RateLimited):
        getattr(broker, name)()
    for _ in range(2):
        getattr(broker, name)()
    asked = [request.fields.get("refreshCache") for request in exchange.received(name)]
    assert asked == [True, True, None]


def test_every_account_is_refreshed(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    opend.accounts = (Account(1, REAL, ("US",)), Account(2, REAL, ("HK", "US")))
    broker = connect()
    broker.positions()
    asked = [
        (request.fields["header"]["accID"], request.fields.get("refreshCache"))
        for request in exchange.received("positions")
    ]
    assert asked == [(1, True), (2, True)]


# --- quotes and markets ---------------------------------------------------------------------
def test_quotes_of_three_markets(connect: Callable[..., Futu], exchange: Exchange) -> None:
    broker = connect(connection="quote")
    for contract in (BERKSHIRE, HK, SHENZHEN):
        exchange.quote(contract.region, contract.ticker, latest=Decimal("11.53"), epoch=1748409918)
        quote = broker.quote(contract)
        assert (quote.latest, quote.time.timestamp()) == (11.53, 1748409918)
    exchange.quote("HK", "00700", is_tradable=False)
    assert broker.quote(HK).is_tradable is False
    with pytest.raises(Rejected, match="未知股票"):
        broker.quote(AAPL)
    assert broker.market_status()["securities"]["HK"].origin_status == "MORNING"


@pytest.mark.parametrize("latest", [0, "NaN", "-1"])
def test_no_price_is_not_zero(
    connect: Callable[..., Futu], exchange: Exchange, latest: int | str
) -> None:
    """curPrice is a required field (Qot_GetSecuritySnapshot.proto): 0 before the first trade."""
    exchange.quote("US", "AAPL", latest=Decimal(latest))
    with pytest.raises(Rejected, match="no price for US.AAPL"):
        connect(connection="quote").quote(AAPL)


@pytest.mark.parametrize(
    "odd", [{"security": {"market": 11, "code": "QQQ"}}, {"updateTime": "N/A"}, {"updateTime": ""}]
)
def test_a_quote_of_another_security_or_of_no_time_is_none(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange, odd: dict[str, Any]
) -> None:
    exchange.quote("US", "AAPL")
    opend.odd_quote = odd
    with pytest.raises(Rejected, match="no quote for US.AAPL"):
        connect(connection="quote").quote(AAPL)


def test_no_answer_becomes_a_table(
    connect: Callable[..., Futu], exchange: Exchange, tables: Callable[[], list[object]]
) -> None:
    broker, quotes = connect(), connect(connection="quote")
    exchange.quote("US", "AAPL", latest=Decimal("227.18"))
    place(broker)  # the account is looked up in the SDK's own table once
    made = tables()
    order_id = place(broker)
    broker.order(order_id)
    broker.cash("USD")
    broker.positions()
    quotes.quote(AAPL)
    broker.cancel_order(order_id)
    told(broker).wait_for(
        lambda: any(
            report.order.order_id == order_id and report.order.is_canceled
            for report in told(broker).reports
        )
    )
    assert not made


def test_an_sdk_made_differently_is_not_trusted_with_orders() -> None:
    with pytest.raises(BrokerUnavailable, match="only once"):
        futu_sdk.open_context(object, lambda reason: None, lambda context: None)


def test_a_quote_connection_has_no_trading_connection(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    connect(connection="quote")
    assert exchange.received("accounts") == []
    assert len(exchange.received("connect")) == 1


# --- when things go wrong -----------------------------------------------------------------------
def failing(call: Callable[[], Any]) -> HttpTradingError:
    with pytest.raises(HttpTradingError) as raised:
        call()
    return raised.value


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (FaultKind.REFUSE, "购买力不足", Rejected),
        (FaultKind.REFUSE, "", Rejected),
        (FaultKind.REFUSE, "请求超时", OutcomeUnknown),
        (FaultKind.RATE_LIMIT, "", RateLimited),
        (FaultKind.CUT, "", OutcomeUnknown),
        (FaultKind.ACCEPT_THEN_CUT, "", OutcomeUnknown),
        (FaultKind.GARBAGE, "", OutcomeUnknown),
        (FaultKind.GARBAGE, "sha", OutcomeUnknown),
        (FaultKind.GARBAGE, "frame", OutcomeUnknown),
    ],
)
@pytest.mark.parametrize("operation", ["place", "cancel"])
def test_what_a_failure_means_for_an_order(
    connect: Callable[..., Futu],
    exchange: Exchange,
    capfd: pytest.CaptureFixture[str],
    kind: FaultKind,
    text: str,
    expected: type[HttpTradingError],
    operation: str,
) -> None:
    broker = connect()
    order_id = place(broker)
    exchange.fault(operation, kind, text=text)
    calls = {"place": lambda: place(broker), "cancel": lambda: broker.cancel_order(order_id)}
    error = failing(calls[operation])
    assert type(error) is expected
    if expected is OutcomeUnknown and kind is not FaultKind.REFUSE:
        told(broker).wait_for(lambda: told(broker).losses)
    else:
        assert told(broker).losses == []
    if kind is FaultKind.REFUSE:
        assert text in error.text
    if expected is RateLimited:
        assert error.retry_after == 30
    assert len(exchange.received(operation)) == 1 + (operation == "place")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "text"),
    [(FaultKind.CUT, ""), (FaultKind.REFUSE, "系统错误"), (FaultKind.RATE_LIMIT, "")],
)
def test_a_refusal_stands_whatever_the_look_at_the_login_meets(
    connect: Callable[..., Futu], exchange: Exchange, kind: FaultKind, text: str
) -> None:
    broker = connect()
    exchange.fault("place", FaultKind.REFUSE, text="购买力不足")
    exchange.fault("ping", kind, text=text)
    with pytest.raises(Rejected, match="购买力不足"):
        place(broker)


def test_an_order_is_not_sent_when_unlocking_gets_no_answer(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    opend.locked = True
    broker = connect(unlock_pin=PIN_MD5)
    exchange.fault("unlock", FaultKind.CUT)
    with pytest.raises(BrokerUnavailable, match="nothing was sent"):
        place(broker)
    told(broker).wait_for(lambda: told(broker).losses)


def test_an_unlocking_that_timed_out_may_be_tried_again(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    """It is not the broker's refusal of the order, which would use its key up."""
    opend.locked = True
    broker = connect(unlock_pin=PIN_MD5)
    exchange.fault("unlock", FaultKind.REFUSE, text="验证密码超时")
    with pytest.raises(BrokerUnavailable, match="nothing was sent.*超时"):
        place(broker)
    place(broker)
    assert len(exchange.orders) == 1


@pytest.mark.parametrize(
    ("ret_type", "words"),
    [
        (-100, ""),
        (-200, ""),
        (-400, ""),
        (-500, ""),
        (-200, "Connection closed"),  # the SDK's own words for "not sent"
        (-1, "NN_ProtoRet_TimeOut"),
        (-1, "NN_ProtoRet_ByDisConnOrCacnel"),
        (-1, "NN_ProtoRet_SvrFailed"),
    ],
)
def test_opends_own_doubts_leave_an_order_open(
    connect: Callable[..., Futu], exchange: Exchange, opend: OpenD, ret_type: int, words: str
) -> None:
    opend.ret_type, opend.ret_msg = ret_type, words
    broker = connect()
    assert type(failing(lambda: place(broker))) is OutcomeUnknown
    assert len(exchange.orders) == 1
    assert told(broker).losses == []  # it did answer


@pytest.mark.parametrize(
    ("ret_type", "words"),
    [*((number, "后台") for number in (-100, -200, -400, -500)), (-1, "NN_ProtoRet_TimeOut")],
)
def test_a_read_that_opend_cannot_answer_costs_no_connection(
    connect: Callable[..., Futu], opend: OpenD, ret_type: int, words: str
) -> None:
    broker = connect()
    opend.failing, opend.ret_type, opend.ret_msg = "cash", ret_type, words
    with pytest.raises(TimedOut, match=words):
        broker.cash()
    opend.ret_type = 0
    assert broker.cash().amount and told(broker).losses == []


@pytest.mark.parametrize("kind", [FaultKind.CUT, FaultKind.GARBAGE])
def test_a_read_without_an_answer(
    connect: Callable[..., Futu], exchange: Exchange, kind: FaultKind
) -> None:
    broker = connect()
    exchange.fault("cash", kind)
    assert type(failing(broker.cash)) is TimedOut
    told(broker).wait_for(lambda: told(broker).losses)


def test_a_cut_while_idle_is_told_and_then_nothing_is_sent(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    broker = connect()
    opend.cut()
    told(broker).wait_for(lambda: told(broker).losses == ["The connection to OpenD ended"])
    assert type(failing(lambda: place(broker))) is BrokerUnavailable
    assert exchange.received("place") == []


def test_opend_may_ask_for_rare_signs_of_life(
    connect: Callable[..., Futu], opend: OpenD, monkeypatch: pytest.MonkeyPatch
) -> None:
    """InitConnect's keepAliveInterval may be longer than we bear silence."""
    monkeypatch.undo()
    opend.keep_alive = 60
    context = connect()._context
    assert context._keep_alive_interval * 2 < context._conn_alive_timeout


def test_an_opend_that_goes_deaf_while_idle_is_noticed(
    connect: Callable[..., Futu],
    opend: OpenD,
    exchange: Exchange,
) -> None:
    opend.keep_alive = 1
    broker = connect()
    exchange.wait_for(lambda: len(exchange.received("keepalive")) >= 2)
    assert told(broker).losses == []
    opend.deaf = True
    assert broker._context._conn_alive_timeout == futu_sdk.SILENT_SECONDS
    broker._context._conn_alive_timeout = 1.0  # now that the answers are over
    told(broker).wait_for(lambda: told(broker).losses == ["The connection to OpenD ended"])


def test_closing_is_no_loss(connect: Callable[..., Futu], opend: OpenD) -> None:
    broker = connect()
    threads = threading.active_count()
    broker.close()
    wait_for(lambda: opend.connected == 0, "OpenD to see the end")
    wait_for(lambda: threading.active_count() < threads, "the SDK's thread to end")
    assert told(broker).losses == []


def test_opend_absent(connect: Callable[..., Futu], opend: OpenD) -> None:
    with opend.stopped():
        with pytest.raises(BrokerUnavailable, match=f"does not listen at 127.0.0.1:{opend.port}"):
            connect()
    assert connect().ping() is True


def test_a_host_that_is_none(connect: Callable[..., Futu]) -> None:
    with pytest.raises(BrokerUnavailable, match=r"does not listen at no\.\.host"):
        connect(host="no..host")


def test_a_deaf_opend_ends_the_attempt_to_connect(
    connect: Callable[..., Futu], opend: OpenD, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK by itself would wait for ever."""
    monkeypatch.setattr(futu_sdk, "CONNECT_SECONDS", 0.5)
    opend.deaf = True
    errors: list[HttpTradingError] = []
    attempt = threading.Thread(target=lambda: errors.append(failing(connect)), daemon=True)
    attempt.start()
    attempt.join(60)
    assert not attempt.is_alive()
    assert type(errors[0]) is BrokerUnavailable
    assert "accepts connections but does not answer" in errors[0].text


def test_a_connection_that_opend_refuses_has_its_reason(
    connect: Callable[..., Futu], exchange: Exchange
) -> None:
    """Such as the 129th (qa/opend.html), or that of an SDK it does not know."""
    exchange.fault("connect", FaultKind.REFUSE, text="连接数已达上限")
    with pytest.raises(BrokerUnavailable, match="refuses the connection: 连接数已达上限"):
        connect()
    assert connect().ping()


def test_abort_ends_a_call_and_an_attempt(
    connect: Callable[..., Futu], opend: OpenD, exchange: Exchange
) -> None:
    broker = connect()
    broker._context._query_timeout = 600  # the SDK's own, 12 s, has no part in this
    exchange.fault("place", FaultKind.HANG)
    errors: list[HttpTradingError] = []
    stuck = threading.Thread(
        target=lambda: errors.append(failing(lambda: place(broker))), daemon=True
    )
    stuck.start()
    exchange.wait_for(lambda: exchange.received("place"))
    broker.abort()
    stuck.join(60)
    assert not stuck.is_alive()
    assert type(errors[0]) is OutcomeUnknown


def test_logged_out(connect: Callable[..., Futu], opend: OpenD, exchange: Exchange) -> None:
    broker = connect()
    opend.logged_in = False
    assert "not logged in (it says FORCE_LOGOUT)" in failing(broker.ping).text
    assert type(failing(lambda: place(broker))) is BrokerUnavailable
    assert exchange.orders == {}
    opend.notify_login()
    told(broker).wait_for(lambda: "OpenD is no longer logged in" in told(broker).losses)
    with pytest.raises(BrokerUnavailable, match="log in there"):
        connect()
    with pytest.raises(BrokerUnavailable, match="log in there"):
        connect(connection="quote")
    opend.log_in()
    assert connect().ping() is True


@pytest.mark.parametrize("connection", ["trade", "quote"])
@pytest.mark.parametrize("status", [4, 11])  # NeedPhoneVerifyCode, ForceLogout
def test_a_program_that_is_not_ready_is_not_logged_in(
    connect: Callable[..., Futu], opend: OpenD, connection: str, status: int
) -> None:
    """Else OpenD would go on telling what it remembers of the account."""
    broker = connect(connection=connection)
    opend.notify_program(10)  # Ready
    opend.notify_program(status)
    told(broker).wait_for(lambda: told(broker).losses)
    assert told(broker).losses == ["OpenD is no longer logged in"]


def test_a_key_that_is_none(opend: OpenD, tmp_path: Path) -> None:
    """In a process of its own: the SDK holds one key per process."""
    path = tmp_path / "not-a-key"
    path.write_text("secret-looking text")
    ran = run_alone(
        tmp_path,
        f"""
        broker = Futu({{"port": {opend.port}, "trade_env": "REAL", "pk_path": {str(path)!r}}})
        broker.data_dir = home / "data"
        try:
            broker.connect()
        except Exception as error:
            assert "not the RSA private key" in str(error), error
        plain = Futu({{"port": {opend.port}, "trade_env": "REAL"}})
        plain.data_dir = home / "data"
        try:
            plain.connect()
        except Exception as error:
            assert "cannot share a process" in str(error), error
        else:
            raise AssertionError
        """,
    )
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    assert "secret-looking" not in ran.stderr


def run_alone(home: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code with `Futu` in a fresh interpreter whose HOME is `home`."""
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    script = "\n".join(line[indent:] for line in lines)
    head = (
        "import faulthandler, os, pathlib, signal, time\n"
        "faulthandler.dump_traceback_later(120, exit=True)\n"
        "from httptrading.brokers import futu_sdk\n"
        "from httptrading.brokers.futu import Futu\n"
        "futu_sdk.CONNECT_SECONDS = 60.0\n"
        "home = pathlib.Path(os.environ['HOME'])\n"
        "(home / 'data').mkdir()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", head + script],
        env={**os.environ, "HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_twins_of_different_versions_do_not_share_a_process(opend: OpenD, tmp_path: Path) -> None:
    ran = run_alone(
        tmp_path,
        f"""
        from google.protobuf import descriptor_pb2, descriptor_pool
        other = descriptor_pb2.FileDescriptorProto(name="Common.proto", package="Other")
        descriptor_pool.Default().AddSerializedFile(other.SerializeToString())
        broker = Futu({{"port": {opend.port}, "trade_env": "REAL"}})
        broker.data_dir = home / "data"
        try:
            broker.connect()
        except Exception as error:
            print(error)
        """,
    )
    assert ran.stdout.startswith("futu-api and moomoo-api of different versions"), ran.stderr


def test_the_sdk_leaves_the_process_alone(opend: OpenD, tmp_path: Path) -> None:
    """Nothing on stdout, nothing in $HOME, SIGINT as before, no thread that holds the process."""
    ran = run_alone(
        tmp_path,
        f"""
        handler = signal.getsignal(signal.SIGINT)
        broker = Futu({{"port": {opend.port}, "trade_env": "REAL"}})
        broker.data_dir = home / "data"
        broker.connect()
        assert broker.cash().amount == 30877.499
        assert signal.getsignal(signal.SIGINT) is handler
        assert os.environ["HOME"] == str(home)
        assert os.listdir(home) == ["data"], os.listdir(home)
        assert sorted(os.listdir(home / "data")) == [".com.futunn.FutuOpenD", "accounts"]
        """,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


def test_sigint_still_interrupts(opend: OpenD, tmp_path: Path) -> None:
    ran = run_alone(
        tmp_path,
        f"""
        # Whoever started the tests in a shell's background made them ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        broker = Futu({{"port": {opend.port}, "trade_env": "REAL"}})
        broker.data_dir = home / "data"
        broker.connect()
        try:
            os.kill(os.getpid(), signal.SIGINT)
            while True:  # not pause(): another thread may have taken the signal just before
                time.sleep(0.01)
        except KeyboardInterrupt:
            print("interrupted")
        """,
    )
    assert ran.stdout == "interrupted\n", ran.stderr


def test_two_opends_with_the_same_connection_ids(tmp_path: Path, exchange: Exchange) -> None:
    """The SDK files connections under OpenD's numbers, which two OpenDs give twice."""
    other = Exchange()
    other.cash["USD"] = Decimal("1.5")
    brokers = []
    with OpenD(exchange) as first, OpenD(other) as second:
        for opend in (first, second):
            broker = Futu({"port": opend.port, "trade_env": "REAL"})
            broker.data_dir = tmp_path
            broker.connect()
            brokers.append(broker)
        assert [broker.cash().amount for broker in brokers] == [30877.499, 1.5]
        assert [
            place(broker) in known.orders
            for broker, known in zip(brokers, (exchange, other), strict=True)
        ] == [True, True]
        for broker in brokers:
            broker.close()
