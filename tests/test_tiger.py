"""Tiger with the real tigeropen SDK, over sockets, against the simulated gateway and push."""

from __future__ import annotations

import itertools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acceptance.cases import BrokerAcceptance, FaultAcceptance, PushAcceptance
from acceptance.kit import Answer, Subject, Trader, wait_for
from httptrading import create_app
from httptrading.brokers import tiger, tiger_http, tiger_push
from httptrading.brokers import tiger_mapping as mapping
from httptrading.brokers.base import Window, combine
from httptrading.brokers.checked import checked
from httptrading.brokers.limits import Windows
from httptrading.brokers.settings import InstanceSettings
from httptrading.brokers.tiger import Tiger
from httptrading.errors import (
    BrokerUnavailable,
    Busy,
    HttpTradingError,
    InvalidRequest,
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
    UnifiedStatus,
)
from simulators.exchange import Exchange, ExchangePosition, FaultKind, OrderStatus
from simulators.tiger_gateway import (
    CLIENT_KEYS,
    STRANGER_KEYS,
    TOO_MANY,
    Refused,
    Spoil,
    TigerGateway,
    self_signed_certificate,
)

PRIME, GLOBAL, PAPER = "12345678", "U1234567", "20191106192858300"
SECRET = "institution-secret-7731"
HIGH = ("order_no", "place", "cancel", "order", "orders", "quote")
MEDIUM = ("ping", "cash", "positions", "fills")
LOW = ("market", "grab", "quote_permission")
SYSTEM_ERROR = "internal_error:A system error occurred, please try again later"
NUMBERS = itertools.count(1)


class Recorder:
    """The worker's side of a broker copy: remembers what it is told."""

    def __init__(self) -> None:
        self.reports: list[OrderReport] = []
        self.stales = self.restorations = 0
        self.windows = Windows(Tiger.windows)
        self.changed = threading.Condition()

    def _note(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def report(self, reports: Iterable[OrderReport]) -> None:
        self.reports.extend(reports)
        self._note()

    def fill(self, fills: Iterable[Fill]) -> None:
        raise AssertionError("Tiger pushes no fills")

    def stale(self) -> None:
        self.stales += 1
        self._note()

    def lost(self, reason: str) -> None:
        raise AssertionError("push alone never breaks a connection")

    def restored(self) -> None:
        self.restorations += 1
        self._note()

    def take(self, window: str) -> None:
        self.windows.take(window)

    def quote_of(self, instance_id: str, contract: Contract) -> Any:
        raise AssertionError("Tiger has quotes of its own")

    def wait_for(self, condition: Callable[[], Any]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 60)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting succeeds also on a machine that stands still for seconds."""
    monkeypatch.setattr(tiger, "CONNECT_TIMEOUT", 60.0)


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


def new_tiger_id() -> str:
    """Rate windows live as long as the process, per tiger_id: every test has its own."""
    return f"2015{next(NUMBERS):04}"


@pytest.fixture
def gateway(exchange: Exchange) -> Iterator[TigerGateway]:
    accounts = (PRIME, GLOBAL, PAPER)
    with TigerGateway(exchange, tiger_id=new_tiger_id(), accounts=accounts) as gateway:
        yield gateway


@pytest.fixture
def args(gateway: TigerGateway, tmp_path: Path) -> dict[str, Any]:
    return arguments(gateway, tmp_path)


def arguments(gateway: TigerGateway, directory: Path, account: str = PRIME) -> dict[str, Any]:
    return {
        "tiger_id": gateway.tiger_id,
        "account": account,
        "pk_path": str(gateway.write_key(directory)),
        "server_url": gateway.server_url,
        "push_host": "127.0.0.1",
        "push_port": gateway.push_port,
        "push_ssl": False,
        "tiger_public_key": gateway.public_key,
        "timeout": 30,
    }


@contextmanager
def connected(args: dict[str, Any], connection: str, **changes: Any) -> Iterator[Any]:
    """A connected copy of the broker with its `Recorder` as `link`."""
    broker: Any = Tiger(args | changes)
    broker.connection = connection
    broker.link = broker._link = Recorder()
    try:
        broker.connect()
        yield broker
    finally:
        broker.close()


@contextmanager
def impatient(broker: Any, *methods: str) -> Iterator[None]:
    """Requests with these methods are given up after half a second; any other has its time."""
    transport = broker._http

    def ask(request: Any, url: str, query: Any, headers: Any, params: dict[str, Any]) -> bytes:
        transport.open()
        if params["method"] in methods:
            transport._left = lambda: 0.5
        try:
            return bytes(transport(request, url, query, headers, params))
        finally:
            vars(transport).pop("_left", None)

    clients = (broker._trade, broker._quotes)
    for client in clients:
        client._TigerOpenClient__do_post = ask
    try:
        yield
    finally:
        for client in clients:
            client._TigerOpenClient__do_post = transport


def subscribed(exchange: Exchange) -> int:
    """For how many news of an account somebody has asked; asking twice is once."""
    asked = exchange.received("subscribe")
    return len({(one.fields["data_type"], one.fields["account"]) for one in asked})


@pytest.fixture
def trade(args: dict[str, Any]) -> Iterator[Any]:
    with connected(args, "trade", push_host="") as broker:
        yield broker


@pytest.fixture
def account(args: dict[str, Any]) -> Iterator[Any]:
    with connected(args, "account") as broker:
        yield broker


@pytest.fixture
def quotes(args: dict[str, Any]) -> Iterator[Any]:
    with connected(args, "quote") as broker:
        yield broker


def contract(ticker: str = "AAPL", region: str = "US") -> Contract:
    return Contract(TradeType.Securities, ticker, region)


def place(broker: Any, **changes: Any) -> str:
    order = {
        "contract": contract(),
        "order_type": OrderType.Limit,
        "time_in_force": TimeInForce.DAY,
        "lifecycle": Lifecycle.RTH,
        "direction": "BUY",
        "qty": 12,
        "price": 200.01,
        "mark": "mark-1",
        "client_order_id": "client-1",
    }
    return str(broker.place_order(**(order | changes)))


# --- the acceptance kit -----------------------------------------------------------------------
def subject_of(account: str, directory: Path) -> Iterator[Subject]:
    exchange = Exchange()
    with TigerGateway(exchange, tiger_id=new_tiger_id(), accounts=(account,)) as gateway:
        gateway.enforce_limits = False  # the kit loosens ours, too
        broker = Tiger(arguments(gateway, directory, account))
        with Subject(broker, directory / "data", exchange, gateway) as subject:
            yield subject


def test_booked_when_nobody_waits_any_more(tmp_path: Path) -> None:
    """Tiger goes on with a request whose client has hung up; its own SDK waits for 15 s."""
    exchange = Exchange()
    with TigerGateway(exchange, tiger_id=new_tiger_id(), accounts=(PRIME,)) as gateway:
        gateway.enforce_limits = False
        subject = Subject(
            Tiger(arguments(gateway, tmp_path, PRIME)), tmp_path / "data", exchange, gateway
        )
        vars(subject.broker)["booked_within"] = Tiger.booked_within
        with subject:
            trader = subject.trader()
            wait_for(lambda: trader.cash().ok, "the broker")
            exchange.fault("place", FaultKind.SLOW, seconds=6.0)

            def placed() -> Answer | None:
                answer = trader.place(subject.limit(), key="slow", timeout=1)
                return answer if answer.ok else None

            assert wait_for(placed, "the order to be found").replayed
    assert len(exchange.orders) == len(exchange.received("place")) == 1


class TestTiger(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        yield from subject_of(PRIME, tmp_path_factory.mktemp("tiger"))


class TestTigerPaper(BrokerAcceptance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        yield from subject_of(PAPER, tmp_path_factory.mktemp("tiger-paper"))


# --- what is on the wire ----------------------------------------------------------------------
US = {"symbol": "AAPL", "currency": "USD", "outside_rth": False, "trading_session_type": "RTH"}
HK = {"symbol": "00700", "currency": "HKD", "outside_rth": False}


@pytest.mark.parametrize(
    ("changes", "wire"),
    [
        ({}, US),
        ({"lifecycle": Lifecycle.ETH}, US | {"outside_rth": True, "session": "PRE_RTH_POST"}),
        ({"lifecycle": Lifecycle.OVERNIGHT}, US | {"outside_rth": True, "session": "OVERNIGHT"}),
        ({"time_in_force": TimeInForce.GTC}, US | {"time_in_force": "GTC"}),
        ({"contract": contract("BRK.B")}, US | {"symbol": "BRK.B"}),
        ({"direction": "SELL", "qty": 1}, US | {"action": "SELL", "total_quantity": 1}),
        ({"price": 0.0001}, US | {"limit_price": 0.0001}),
        ({"contract": contract("00700", "HK"), "price": 300.2}, HK | {"limit_price": 300.2}),
        (
            {"order_type": OrderType.Market, "price": None},
            US | {"session": None, "order_type": "MKT", "limit_price": None},
        ),
        (
            {
                "contract": contract("00005", "HK"),
                "order_type": OrderType.Market,
                "price": None,
                "mark": None,
            },
            HK | {"symbol": "00005", "order_type": "MKT", "limit_price": None, "user_mark": None},
        ),
    ],
    ids=lambda value: None,
)
def test_every_field_of_an_order(
    trade: Any,
    gateway: TigerGateway,
    exchange: Exchange,
    changes: dict[str, Any],
    wire: dict[str, Any],
) -> None:
    order_id = place(trade, **changes)
    expected = {
        "account": PRIME,
        "lang": "en_US",
        "sec_type": "STK",
        "action": "BUY",
        "order_type": "LMT",
        "order_id": gateway.last_number,  # the number reserved right before
        "total_quantity": 12,
        "limit_price": 200.01,
        "time_in_force": "DAY",
        "user_mark": "mark-1",
    } | wire
    session = expected.pop("session", expected.get("trading_session_type"))
    expected["trading_session_type"] = session
    expected = {name: value for name, value in expected.items() if value is not None}
    assert exchange.orders[order_id].wire == expected
    assert int(order_id) > 2**53
    assert [r.operation for r in exchange.requests] == ["order_no", "place"]


def test_two_orders_have_two_numbers(trade: Any, exchange: Exchange) -> None:
    ids = {place(trade), place(trade)}
    assert len(ids) == 2
    assert len({exchange.orders[one].wire["order_id"] for one in ids}) == 2


def test_a_number_given_twice_places_nothing(
    args: dict[str, Any], gateway: TigerGateway, exchange: Exchange
) -> None:
    gateway.rewrites["order_no"] = lambda data: {"orderId": 990001}
    with connected(args, "trade", push_host="") as broker:
        exchange.fault("place", FaultKind.REFUSE)
        with pytest.raises(Rejected):
            place(broker)
        exchange.fault("place", FaultKind.RATE_LIMIT)
        with pytest.raises(RateLimited):
            place(broker)
        place(broker)  # nothing bore the number until now
        with pytest.raises(Busy, match="used before; the order was not sent"):
            place(broker)
    with connected(args, "trade", push_host="") as broker:  # the next copy knows it, too
        with pytest.raises(Busy, match="used before; the order was not sent"):
            place(broker)
    assert len(exchange.received("place")) == 3 and len(exchange.orders) == 1
    with connected(args, "trade", push_host="", account=GLOBAL) as broker:
        place(broker)  # numbers are an account's own


def test_a_number_of_an_unknown_outcome_is_used(
    trade: Any, gateway: TigerGateway, exchange: Exchange
) -> None:
    gateway.rewrites["order_no"] = lambda data: {"orderId": 990001}
    exchange.fault("place", FaultKind.ACCEPT_THEN_CUT)
    with pytest.raises(OutcomeUnknown):
        place(trade)
    with pytest.raises(Busy, match="not sent"):
        place(trade)
    assert len(exchange.orders) == 1


def test_used_numbers_are_bounded() -> None:
    numbers = tiger.UsedNumbers(2)
    assert [numbers.claim(("1", PRIME, str(n))) for n in (1, 2, 2, 3, 3, 1)] == (
        [True, True, False, True, False, True]
    )


@pytest.mark.parametrize("price", [float("nan"), float("inf")])
def test_no_odd_price_leaves(trade: Any, exchange: Exchange, price: float) -> None:
    with pytest.raises(InvalidRequest):
        place(trade, price=price)
    assert not exchange.requests


def test_institutions_say_their_secret_key(args: dict[str, Any], tmp_path: Path) -> None:
    exchange = Exchange()
    with TigerGateway(exchange, secret_key=SECRET) as gateway:
        given = arguments(gateway, tmp_path) | {"secret_key": SECRET}
        with connected(given, "trade", push_host="") as broker:
            order_id = place(broker)
            assert exchange.orders[order_id].wire["secret_key"] == SECRET
        with connected(given, "account") as broker:
            assert broker.order(order_id).mark == "mark-1"


@pytest.mark.parametrize(
    "order_id",
    ["0", "1_000", "", "abc", "-1", " 7", "7 ", "+7", "7.0", "０７", "٣", "9" * 19, "1e5"],
)
def test_junk_ids_are_no_order(trade: Any, account: Any, exchange: Exchange, order_id: str) -> None:
    place(trade)  # the only order there is, which the SDK would return for id 0
    before = len(exchange.requests)
    for look in (account.order, account.fills, trade.cancel_order):
        with pytest.raises(OrderNotFound):
            look(order_id)
    assert len(exchange.requests) == before


def test_an_unknown_id_is_no_order(trade: Any, account: Any) -> None:
    place(trade)
    with pytest.raises(OrderNotFound):
        account.order("40139406481165313")
    with pytest.raises(OrderNotFound):
        trade.cancel_order("40139406481165313")


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (1200, "standard account response error(not_found:Order does not exist)"),
        (1200, "standard account response error(not_found:订单不存在)"),
        (1100, "global account response error(BAD_REQUEST:Order does not exist)"),
    ],
)
def test_an_unknown_order_in_tigers_words(
    trade: Any, account: Any, gateway: TigerGateway, code: int, said: str
) -> None:
    gateway.refusals |= dict.fromkeys(("order", "cancel"), (code, said))
    with pytest.raises(OrderNotFound):
        account.order("40139406481165313")
    with pytest.raises(OrderNotFound):
        trade.cancel_order("40139406481165313")
    gateway.refusals["order"] = 1200, "standard account response error(account does not exist)"
    with pytest.raises(Rejected, match="account does not exist"):
        account.order("40139406481165313")


# --- what becomes of an order -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("wire", "filled", "outcome"),
    [
        ("Initial", 0, ""),
        ("PendingSubmit", 0, ""),
        ("Submitted", 0, ""),
        ("Submitted", 5, ""),
        ("PartiallyFilled", 5, ""),
        (2, 5, ""),
        (8, 0, ""),
        ("Something new", 0, ""),
        ("PendingCancel", 5, "pending cancel"),
        (3, 0, "pending cancel"),
        ("Cancelled", 0, "canceled"),
        ("Cancelled", 5, "canceled"),
        ("Cancelled", 12, "filled"),
        ("Filled", 12, "filled"),
        ("Filled", 5, ""),  # a global account's partial fill
        ("Filled", 0, ""),
        ("PendingSubmit", 12, "filled"),
        ("Inactive", 0, "no money"),
        ("Inactive", 5, "no money"),
        ("Invalid", 0, "no money"),
        (-2, 5, "no money"),
    ],
)
def test_statuses(
    trade: Any,
    account: Any,
    gateway: TigerGateway,
    exchange: Exchange,
    wire: str | int,
    filled: int,
    outcome: str,
) -> None:
    order_id = place(trade)
    if filled:
        exchange.fill(order_id, filled, "199.5")
    exchange.settle(order_id, OrderStatus.WORKING, "no money")
    gateway.wire_status[order_id] = wire
    order = account.order(order_id).order
    assert (order.order_id, order.currency, order.qty) == (order_id, "USD", 12)
    assert (order.filled_qty, order.avg_price) == (filled, Decimal("199.5") if filled else 0)
    assert order.is_filled is (outcome == "filled")
    assert order.is_canceled is (outcome == "canceled")
    assert order.is_pending_cancel is (outcome == "pending cancel")
    assert order.error_reason == ("no money" if outcome == "no money" else "")
    assert order.is_completed is (outcome in {"filled", "canceled", "no money"})


def test_filled_without_a_quantity_is_filled(
    trade: Any, account: Any, gateway: TigerGateway
) -> None:
    order_id = place(trade)
    told: dict[str, Any] = {"status": "Filled", "filledQuantity": None, "filledQuantityScale": None}
    gateway.rewrites["order"] = lambda data: {"items": [one | told for one in data["items"]]}
    order = account.order(order_id).order
    assert order.is_filled and order.filled_qty == 12
    told["status"] = "Submitted"
    assert account.order(order_id).order.filled_qty == 0


def test_an_order_for_an_amount_of_money_ends(
    trade: Any, account: Any, gateway: TigerGateway, exchange: Exchange
) -> None:
    """As Tiger's app places it: without a quantity."""
    exchange.fill_market_orders = False
    order_id = place(trade, order_type=OrderType.Market, price=None)
    money: dict[str, Any] = {"totalQuantity": 0, "totalCashAmount": 180.0}
    gateway.rewrites["order"] = lambda data: {"items": [one | money for one in data["items"]]}
    order = account.order(order_id).order
    assert (order.qty, order.filled_qty, order.is_completed) == (0, 0, False)
    exchange.fill(order_id, Decimal("0.5"), "199.5")
    assert not account.order(order_id).order.is_completed
    gateway.wire_status[order_id] = "Filled"
    order = account.order(order_id).order
    assert order.is_filled and (order.qty, order.filled_qty) == (Decimal("0.5"), Decimal("0.5"))
    del money["totalCashAmount"]  # then nothing says that the quantity is left out on purpose
    assert not account.order(order_id).order.is_completed


def test_a_market_order_has_no_price(trade: Any, account: Any, gateway: TigerGateway) -> None:
    order_id = place(trade, order_type=OrderType.Market, price=None)
    zero = {"limitPrice": 0.0}
    gateway.rewrites["order"] = lambda data: {"items": [one | zero for one in data["items"]]}
    assert account.order(order_id).price is None


def test_a_failure_without_a_reason_is_named(trade: Any, account: Any, exchange: Exchange) -> None:
    rejected, expired = place(trade), place(trade)
    exchange.reject(rejected, "")
    exchange.expire(expired)
    assert account.order(rejected).order.error_reason == "Rejected"
    assert account.order(expired).order.error_reason == "Expired"


def test_an_order_comes_back_whole(trade: Any, account: Any, exchange: Exchange) -> None:
    order_id = place(trade, contract=contract("00700", "HK"), price=300.2)
    overnight = place(trade, lifecycle=Lifecycle.OVERNIGHT, direction="SELL", mark="mark-2")
    report = account.order(order_id)
    assert (report.mark, report.contract) == ("mark-1", contract("00700", "HK"))
    assert (report.direction, report.order_type) == ("BUY", OrderType.Limit)
    assert (report.price, report.time_in_force) == (Decimal("300.2"), TimeInForce.DAY)
    assert report.lifecycle is Lifecycle.RTH and report.order.currency == "HKD"
    assert abs(report.time.timestamp() - exchange.orders[order_id].epoch) < 1
    other = account.order(overnight)
    assert (other.lifecycle, other.direction, other.mark) == (Lifecycle.OVERNIGHT, "SELL", "mark-2")


def test_cancelling(trade: Any, account: Any, exchange: Exchange) -> None:
    order_id = place(trade)
    trade.cancel_order(order_id)
    assert exchange.received("cancel")[0].fields["id"] == int(order_id)
    assert account.order(order_id).order.is_canceled
    with pytest.raises(Rejected, match="finished .cancelled."):
        trade.cancel_order(order_id)
    filled = place(trade)
    exchange.fill(filled, 12, "200")
    with pytest.raises(Rejected, match="finished .filled.*"):
        trade.cancel_order(filled)


def test_an_order_that_is_not_told_yet_is_not_unknown_for_it(
    trade: Any, account: Any, gateway: TigerGateway
) -> None:
    """Tiger's lists and queries may lag behind a placement; a cancellation does not."""
    order_id = place(trade)
    words = "standard account response error(bad_request:This order has been completed)"
    gateway.refusals["cancel"] = 1200, words
    gateway.rewrites["order"] = lambda data: {"items": []}
    with pytest.raises(Rejected, match="has been completed"):
        trade.cancel_order(order_id)


def test_why_it_cannot_be_cancelled_is_not_waited_for_long(
    trade: Any, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other cancellations wait meanwhile, and the answer is known: it was refused."""
    monkeypatch.setattr(tiger, "EXPLAINED_WITHIN", 0.1, raising=False)
    order_id = place(trade)
    exchange.fill(order_id, 12, "200")
    exchange.fault("order", FaultKind.HANG)
    began = time.monotonic()
    with pytest.raises(Rejected, match="order cannot be cancelled"):
        trade.cancel_order(order_id)
    assert time.monotonic() < began + 15, "0.1 s on an idle machine; Tiger has 30 s"


def test_the_listing_has_every_page(
    trade: Any, account: Any, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiger, "PAGE", 2)
    ids = {place(trade, mark=f"mark-{n}") for n in range(5)}
    old = ids.pop()
    exchange.orders[old].epoch -= 60 * 86400  # still open after two months
    done = ids.pop()
    exchange.cancel(done)
    listed = {report.order.order_id: report for report in account.recent_orders()}
    assert set(listed) == ids | {old, done}
    assert listed[done].order.is_canceled
    assert {report.mark for report in listed.values()} == {f"mark-{n}" for n in range(5)}


def test_a_listing_is_whole_or_an_error(trade: Any, account: Any, gateway: TigerGateway) -> None:
    place(trade)
    for wrong in (Spoil.SERVER_ERROR, Spoil.WRONGLY_SIGNED, Spoil.UNSIGNED):
        gateway.spoil("orders", wrong)
        with pytest.raises(TimedOut, match="try again"):
            account.recent_orders()
    assert len(account.recent_orders()) == 1


def test_a_twap_order_of_the_app_spoils_nothing(
    trade: Any, account: Any, gateway: TigerGateway
) -> None:
    """The SDK reads its parameters by other names than it writes them, and fails on them."""
    order_id = place(trade)
    began = {"tag": "start_time", "value": "1754942400000"}
    twap = {"orderType": "TWAP", "algoParameters": [began]}

    def told(data: Any) -> Any:
        return {"items": [one | twap for one in data["items"]]}

    gateway.rewrites |= {"orders": told, "order": told}
    (listed,) = account.recent_orders()
    assert (listed.order.order_id, listed.order_type) == (order_id, None)
    assert account.order(order_id) == listed


def test_one_order_alone_and_numbers_for_words(
    trade: Any, account: Any, gateway: TigerGateway, exchange: Exchange
) -> None:
    """As Tiger answers for an id: the order itself, no list of it."""
    order_id = place(trade)
    gateway.rewrites["order"] = lambda data: data["items"][0] | {"status": 4, "id": order_id}
    assert account.order(order_id).order.is_canceled
    leg = {"id": 40139406481165313, "status": "Initial"}
    gateway.rewrites["order"] = lambda data: {"items": [leg, *data["items"]]}
    assert account.order(order_id).mark == "mark-1"
    exchange.fill(order_id, 5, "199.5")
    gateway.rewrites["order"] = lambda data: data["items"][0] | {"status": 6}
    assert not account.order(order_id).order.is_completed
    gateway.rewrites["order"] = lambda data: {"status": 6}
    with pytest.raises(TimedOut, match="makes no sense"):
        account.order(order_id)


@pytest.mark.parametrize("data", [None, {}, {"items": []}])
def test_an_account_without_orders(account: Any, gateway: TigerGateway, data: Any) -> None:
    gateway.rewrites["orders"] = lambda _: data
    assert account.recent_orders() == []


@pytest.mark.parametrize("data", [{"total": 1}, {"items": None}, [1], '"odd"'])
def test_what_is_no_list_of_orders(account: Any, gateway: TigerGateway, data: Any) -> None:
    gateway.rewrites["orders"] = lambda _: data
    with pytest.raises(TimedOut):
        account.recent_orders()


def test_a_listing_does_not_end_in_the_middle(
    trade: Any, account: Any, gateway: TigerGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiger, "PAGE", 2)
    ids = {place(trade) for _ in range(3)}
    gateway.rewrites["orders"] = lambda data: data if data["nextPageToken"] else None
    with pytest.raises(TimedOut, match="no order list"):
        account.recent_orders()
    del gateway.rewrites["orders"]
    assert {report.order.order_id for report in account.recent_orders()} == ids


def test_fills(trade: Any, account: Any, exchange: Exchange) -> None:
    order_id, other = place(trade), place(trade)
    exchange.fill(order_id, Decimal("1.25"), "199.5")
    exchange.fill(order_id, 3, "199.25")
    exchange.fill(other, 1, "7")
    fills = account.fills(order_id)
    assert [(fill.qty, fill.price) for fill in fills] == [
        (Decimal("1.25"), Decimal("199.5")),
        (3, Decimal("199.25")),
    ]
    assert len({fill.fill_id for fill in fills}) == 2
    assert all(fill.order_id == order_id and fill.time.tzinfo for fill in fills)


MOMENT = 1754942400.0


@pytest.mark.parametrize(
    ("number", "text", "told"),
    [
        (1754942400000, None, MOMENT),
        (1754942400000000, None, MOMENT),
        (1754942400000000000, "odd", MOMENT),
        (None, "2025-08-12 04:00:00", MOMENT),
        (0, "2025-08-12T04:00:00", MOMENT),
        (None, "2025-08-11T20:00:00Z", MOMENT),
        (None, "2025-08-11T16:00:00-04:00", MOMENT),
        (None, "2025-08-11 16:00:00 EDT", MOMENT),
        (None, "2025-08-12 04:00:00.000", MOMENT),
        (None, 1754942400000, MOMENT),
        (None, "2025-08-12 04:00:00 CST", 0),
        (None, "just now", 0),
        (None, None, 0),
    ],
)
def test_when_a_fill_was(
    trade: Any,
    account: Any,
    gateway: TigerGateway,
    exchange: Exchange,
    number: Any,
    text: Any,
    told: float,
) -> None:
    order_id = place(trade)
    exchange.fill(order_id, 12, "199.5")
    times = {"transactionTime": number, "transactedAt": text}
    gateway.rewrites["fills"] = lambda data: {"items": [one | times for one in data["items"]]}
    (fill,) = account.fills(order_id)
    assert (fill.time.timestamp(), fill.qty) == (told, 12)


def test_an_odd_time_does_not_spoil_a_list(trade: Any, account: Any, gateway: TigerGateway) -> None:
    ids = [place(trade) for _ in range(5)]
    odd = dict(zip(map(int, ids), [1754942400000000, "soon", -1, 1e300, 7], strict=True))
    gateway.rewrites["orders"] = lambda data: {
        "items": [one | {"openTime": odd[one["id"]]} for one in data["items"]]
    }
    times = {one.order.order_id: one.time for one in account.recent_orders()}
    assert [times[one] and times[one].timestamp() for one in ids] == [MOMENT, *[None] * 4]


@pytest.mark.parametrize(
    "odd",
    [
        {"id": None},
        {"filledQuantity": None},
        {"filledQuantity": "five"},
        {"filledPrice": float("nan")},
        {"filledPrice": None},
    ],
)
def test_a_fill_that_cannot_be_read_changes_nothing(
    trade: Any, account: Any, gateway: TigerGateway, exchange: Exchange, odd: dict[str, Any]
) -> None:
    """With a quantity of 0 it would take back a fill that is known, without an id count twice."""
    order_id = place(trade)
    exchange.fill(order_id, 5, "199.5")
    gateway.rewrites["fills"] = lambda data: {"items": [one | odd for one in data["items"]]}
    with pytest.raises(TimedOut, match="try again"):
        account.fills(order_id)
    del gateway.rewrites["fills"]
    assert [(one.qty, one.price) for one in account.fills(order_id)] == [(5, Decimal("199.5"))]


@pytest.mark.parametrize("number", ["1e400", 10**31, float("inf"), "--"])
def test_a_number_that_is_none_spoils_no_list(
    trade: Any, account: Any, gateway: TigerGateway, number: Any
) -> None:
    """A quantity of 0 is left as it is known."""
    ids = [place(trade), place(trade)]
    fields = ("totalQuantity", "filledQuantity", "avgFillPrice", "limitPrice")
    odd = {**dict.fromkeys(fields, number), "action": 7}
    gateway.rewrites["orders"] = lambda data: {
        "items": [one | (odd if str(one["id"]) == ids[0] else {}) for one in data["items"]]
    }
    listed = checked("recent_orders", account.recent_orders())
    assert {one.order.order_id: one.order.qty for one in listed} == {ids[0]: 0, ids[1]: 12}


@pytest.mark.parametrize("scale", ["five", -1, 1.5, 10**30, float("nan")])
def test_a_quantity_of_no_scale_is_not_told(scale: Any) -> None:
    """773 with a scale of 5 is no 773 shares."""
    assert mapping.scaled(773, scale) == 0
    assert mapping.scaled(773, None) == mapping.scaled(773, 0) == 773


@pytest.mark.parametrize("odd", [None, True, 0, "", 1.5, float("nan")])
def test_an_order_without_an_id_is_no_other_order(
    trade: Any, account: Any, gateway: TigerGateway, odd: Any
) -> None:
    """It would be listed beside itself from then on, as order "None"."""
    place(trade)
    gateway.rewrites["orders"] = lambda data: {
        "items": [one | {"id": odd} for one in data["items"]]
    }
    with pytest.raises(TimedOut, match="try again"):
        account.recent_orders()


def test_global_accounts_have_no_single_fills(args: dict[str, Any]) -> None:
    with connected(args, "account", account=GLOBAL) as broker, pytest.raises(Unsupported):
        broker.fills("40139406481165313")


# --- the account ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [PRIME, PAPER, GLOBAL], ids=["prime", "paper", "global"])
def test_cash_per_currency(args: dict[str, Any], exchange: Exchange, kind: str) -> None:
    with connected(args, "account", account=kind) as broker:
        assert broker.ping() is True
        assert broker.cash().amount == Decimal("30877.499")
        assert broker.cash("HKD").amount == Decimal("1000.5")
        assert broker.cash("CNH").amount == 0
        exchange.cash["USD"] = Decimal("-12.5")
        assert broker.cash("USD").amount == Decimal("-12.5")


def test_cash_of_the_segment_alone(account: Any, gateway: TigerGateway) -> None:
    gateway.currency_assets = False
    assert account.cash("HKD").amount == Decimal("1000.5")


@pytest.mark.parametrize("segments", [None, {}, [], [None], [{"category": "C"}]])
def test_no_segments_is_no_amount(account: Any, gateway: TigerGateway, segments: Any) -> None:
    gateway.rewrites["cash"] = lambda data: data | {"segments": segments}
    with pytest.raises(Rejected, match="no available amount"):
        account.cash()


@pytest.mark.parametrize("listed", [True, False], ids=["currencies", "segment"])
def test_yuan_are_offshore_yuan(
    account: Any, gateway: TigerGateway, exchange: Exchange, listed: bool
) -> None:
    exchange.cash["CNH"] = Decimal("700.5")
    gateway.currency_assets = listed
    for currency in ("CNY", "CNH"):
        cash = account.cash(currency)
        assert (cash.currency, cash.amount) == (currency, Decimal("700.5"))


def test_yuan_of_a_global_account(args: dict[str, Any], exchange: Exchange) -> None:
    exchange.cash["CNH"] = Decimal("700.5")
    with connected(args, "account", account=GLOBAL) as broker:
        assert broker.cash("CNY").amount == Decimal("700.5")


def test_no_amount_is_no_number() -> None:
    segment = {"category": "S", "currency": "USD", "cashAvailableForTrade": float("inf")}
    assert mapping.prime_cash({"segments": [segment]}, "USD") is None
    held = {"currency": "USD", "cashAvailableForTrade": None, "cashBalance": 7.5}
    segment["currencyAssets"] = [held]
    assert mapping.prime_cash({"segments": [segment]}, "USD") == Decimal("7.5")
    # What is held is more than what may be spent.
    segment["currencyAssets"] = [held | {"cashAvailableForTrade": "--"}]
    assert mapping.prime_cash({"segments": [segment]}, "USD") is None
    # It may be the currency asked for whose name is missing.
    segment["currencyAssets"] = [held | {"currency": None}, held | {"currency": "HKD"}]
    assert mapping.prime_cash({"segments": [segment]}, "USD") is None
    assert mapping.prime_cash({"segments": [segment]}, "HKD") == Decimal("7.5")


def test_positions_are_exact(account: Any, exchange: Exchange) -> None:
    exchange.positions = [
        ExchangePosition("US", "AAPL", "USD", Decimal("0.00773")),
        ExchangePosition("US", "BRK.B", "USD", Decimal(-3)),
        ExchangePosition("HK", "00700", "HKD", Decimal(200)),
        ExchangePosition("CN", "600519", "CNH", Decimal(100)),
        ExchangePosition("US", "GONE", "USD", Decimal(0)),
        ExchangePosition("SG", "D05", "SGD", Decimal(100)),
    ]
    shown = [(p.contract.region, p.contract.ticker, p.currency, p.qty) for p in account.positions()]
    assert shown == [
        ("US", "AAPL", "USD", Decimal("0.00773")),
        ("US", "BRK.B", "USD", -3),
        ("HK", "00700", "HKD", 200),
        ("CN", "600519", "CNH", 100),
    ]


@pytest.mark.parametrize(
    ("told", "qty"),
    [
        ({"position": 773, "positionScale": 5, "positionQty": 0.00773}, Decimal("0.00773")),
        ({"position": 0, "positionScale": 0, "positionQty": 0.5}, Decimal("0.5")),
        ({"position": None, "positionScale": None, "positionQty": 6.0}, 6),
        ({"position": 773, "positionScale": 5, "positionQty": None}, Decimal("0.00773")),
        ({"position": 773, "positionScale": None, "positionQty": None}, 773),
        ({"position": 773, "positionScale": 5, "positionQty": 0}, Decimal("0.00773")),
    ],
)
def test_how_much_is_held(
    account: Any, gateway: TigerGateway, exchange: Exchange, told: dict[str, Any], qty: Decimal
) -> None:
    exchange.positions = [ExchangePosition("US", "AAPL", "USD", Decimal(1))]
    gateway.rewrites["positions"] = lambda data: {"items": [one | told for one in data["items"]]}
    assert [one.qty for one in account.positions()] == [qty]


def test_no_position_disappears_silently(
    account: Any, gateway: TigerGateway, exchange: Exchange, caplog: pytest.LogCaptureFixture
) -> None:
    exchange.positions = [
        ExchangePosition("SG", "D05", "SGD", Decimal(100)),
        ExchangePosition("US", "ODD", "USD", Decimal(100)),
    ]
    assert len(account.positions()) == len(account.positions()) == 1
    told = [record.getMessage() for record in caplog.records if "not shown" in record.getMessage()]
    assert told == ["a position in D05 (SG, STK) is not shown"]
    nothing: dict[str, Any] = {"position": None, "positionScale": None, "positionQty": None}
    unknown: list[dict[str, Any]] = [
        nothing,
        nothing | {"positionQty": "1e400"},
        nothing | {"position": 773, "positionScale": "five"},
    ]
    for odd in unknown:
        gateway.rewrites["positions"] = lambda data, odd=odd: {
            "items": [one | (odd if one["symbol"] == "ODD" else {}) for one in data["items"]]
        }
        with pytest.raises(TimedOut, match="no quantity of ODD"):
            account.positions()


@pytest.mark.parametrize(
    ("market", "currency", "shown"),
    [
        ("SH", "CNH", contract("600519", "CN")),
        ("SZ", "CNY", contract("000001", "CN")),
        ("SEHK", "HKD", contract("00700", "HK")),
        ("", "HKD", contract("00700", "HK")),
        ("SI", "USD", None),
    ],
)
def test_markets_by_other_names(market: str, currency: str, shown: Contract | None) -> None:
    symbol = shown.ticker if shown else "D05"
    assert mapping.contract_of(symbol, market, currency) == shown


@pytest.mark.parametrize("items", [None, {}, {"items": None}, {"items": []}])
def test_no_positions(account: Any, gateway: TigerGateway, items: Any) -> None:
    gateway.rewrites["positions"] = lambda data: items
    assert account.positions() == []


@pytest.mark.parametrize("items", ['"odd"', [1], {"items": "odd"}, {"items": [None]}])
def test_odd_positions(account: Any, gateway: TigerGateway, items: Any) -> None:
    gateway.rewrites["positions"] = lambda data: items
    with pytest.raises(TimedOut):
        account.positions()


def test_what_each_kind_of_account_takes() -> None:
    def takes(account: str) -> frozenset[Any]:
        return Tiger({"tiger_id": "1", "account": account, "pk_path": "x"}).combinations

    limit, market, rth = OrderType.Limit, OrderType.Market, Lifecycle.RTH
    assert combine(["US"], [limit], TimeInForce, Lifecycle) <= takes(PRIME) == takes(GLOBAL)
    assert combine(["US", "HK"], [market], [TimeInForce.DAY], [rth]) <= takes(PAPER) < takes(PRIME)
    assert not [one for one in takes(PAPER) if one.time_in_force is TimeInForce.GTC]
    for one in takes(PRIME):
        assert one.region != "CN"
        assert one.lifecycle is rth or (one.region, one.order_type) == ("US", limit)
        assert one.order_type is limit or one.time_in_force is TimeInForce.DAY


# --- quotes -----------------------------------------------------------------------------------
def a_minute_later(broker: Any) -> None:
    broker.link.windows = Windows(Tiger.windows)


def test_the_quote_permission(quotes: Any, gateway: TigerGateway, exchange: Exchange) -> None:
    exchange.quote("US", "AAPL", latest=Decimal("227.18"), epoch=1754942400.5)
    exchange.quote("HK", "00700", latest=Decimal("300.2"), is_tradable=False)

    def operations() -> list[str]:
        return [request.operation for request in exchange.requests]

    quote = quotes.quote(contract())
    assert operations() == ["quote", "grab", "quote"]
    assert (quote.latest, quote.pre_close, quote.currency) == (Decimal("227.18"), 99, "USD")
    assert (quote.open_price, quote.high_price, quote.low_price) == (Decimal("99.5"), 101, 98)
    assert quote.is_tradable and quote.time.timestamp() == 1754942400.5
    halted = quotes.quote(contract("00700", "HK"))
    assert (halted.currency, halted.is_tradable) == ("HKD", False)
    assert operations()[3:] == ["quote"]  # grabbed once

    gateway.take_quotes_away()
    with pytest.raises(Rejected, match="Another device"):
        quotes.quote(contract())
    assert operations()[4:] == ["quote"]
    assert quotes.quote(contract()).latest == Decimal("227.18")
    assert operations()[5:] == ["quote", "grab", "quote"]

    with pytest.raises(Rejected, match="invalid symbols"):
        quotes.quote(contract("NOPE"))


@pytest.mark.parametrize("device", ["ours", "another"])
def test_a_market_without_a_subscription(
    quotes: Any, gateway: TigerGateway, exchange: Exchange, device: str
) -> None:
    exchange.quote("US", "AAPL")
    exchange.quote("HK", "00700")
    gateway.quote_markets = {"HK"}
    if device == "ours":
        assert quotes.quote(contract("00700", "HK"))
        a_minute_later(quotes)
    before = len(exchange.received("grab"))
    for _ in range(12):
        with pytest.raises(Rejected, match="do not have permissions in the US market"):
            quotes.quote(contract())
    assert quotes.quote(contract("00700", "HK"))  # was not taken by anybody
    assert len(exchange.received("grab")) == before + 1
    # One that is bought meanwhile is there at once.
    gateway.quote_markets = {"US", "HK"}
    assert quotes.quote(contract())


def test_a_market_without_a_subscription_is_grabbed_for_again(
    quotes: Any, gateway: TigerGateway, exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiger, "NOT_GRABBED_AGAIN", 0.0)
    gateway.quote_markets = {"HK"}
    for grabs in (1, 2):
        with pytest.raises(Rejected, match="do not have permissions in the US market"):
            quotes.quote(contract())
        assert len(exchange.received("grab")) == grabs
        a_minute_later(quotes)


def test_grabbing_keeps_its_limit(quotes: Any, gateway: TigerGateway, exchange: Exchange) -> None:
    exchange.quote("US", "AAPL")
    outcomes = []
    for _ in range(30):
        gateway.take_quotes_away()
        try:
            quotes.quote(contract())
            outcomes.append("quote")
        except Rejected:
            outcomes.append("told")
        except RateLimited:
            outcomes.append("limited")
    assert outcomes == [*["quote", "told"] * 4, *["limited"] * 22]
    assert len(exchange.received("grab")) == 4
    for _ in range(6):  # and leaves market states theirs
        assert quotes.market_status()
        quotes.take("market")
        quotes.take("low")


def test_a_quote_becomes_no_table(
    quotes: Any, exchange: Exchange, tables: Callable[[], list[object]]
) -> None:
    exchange.quote("US", "AAPL", latest=Decimal("227.18"))
    made = tables()
    assert quotes.quote(contract()).latest == Decimal("227.18")
    assert not made


def test_a_quote_is_in_the_currency_of_its_counter(quotes: Any, exchange: Exchange) -> None:
    """Tiger does not tell it; Hong Kong trades in three."""
    told = {"00700": "HKD", "80700": "CNY", "09839": "USD", "09988": "HKD"}
    for ticker, currency in told.items():
        exchange.quote("HK", ticker)
        assert quotes.quote(contract(ticker, "HK")).currency == currency


def test_a_quote_without_a_price(quotes: Any, exchange: Exchange) -> None:
    exchange.quote("US", "AAPL", latest=Decimal("NaN"))
    with pytest.raises((Rejected, BrokerUnavailable)):
        quotes.quote(contract())
    brief = {
        "latestPrice": 5.5,
        "latestTime": 1754942400000,
        "open": float("nan"),
        "status": None,
    }
    quote = mapping.parse_quote(contract(), brief)
    assert quote is not None and (quote.open_price, quote.is_tradable) == (0, True)
    assert mapping.parse_quote(contract(), brief | {"latestPrice": float("nan")}) is None


@pytest.mark.parametrize("word", ["NORMAL", "HALTED", "DELIST", "NEW", "ALTER", "", None])
def test_what_is_tradable(word: str | None) -> None:
    brief = {"latestPrice": 5.5, "latestTime": 1754942400000, "status": word}
    quote = mapping.parse_quote(contract(), brief)
    assert quote is not None and quote.is_tradable is (word not in {"HALTED", "DELIST"})


@pytest.mark.parametrize(
    ("word", "unified"),
    [*mapping.MARKET_STATES.items(), ("A_NEW_ONE", UnifiedStatus.UNKNOWN)],
    ids=lambda value: getattr(value, "name", value),
)
def test_market_states(
    quotes: Any, gateway: TigerGateway, word: str, unified: UnifiedStatus
) -> None:
    gateway.market_states = dict.fromkeys(("US", "HK", "CN", "SG"), word)
    states = quotes.market_status()["securities"]
    assert {region: (s.origin_status, s.unified_status) for region, s in states.items()} == (
        dict.fromkeys(("US", "HK", "CN"), (word, unified))
    )


@pytest.mark.parametrize("opens", ["", "soon", None, 1754942400000, "2026-11-30T14:30:00Z"])
def test_a_market_state_needs_no_opening_time(
    quotes: Any, gateway: TigerGateway, opens: Any
) -> None:
    gateway.rewrites["market"] = lambda data: [one | {"openTime": opens} for one in data]
    assert quotes.market_status()["securities"]["US"].origin_status == "TRADING"


# --- when things go wrong ---------------------------------------------------------------------
def spoil(what: Spoil) -> Callable[[TigerGateway, str], None]:
    return lambda gateway, operation: gateway.spoil(operation, what)


def fault(kind: FaultKind) -> Callable[[TigerGateway, str], None]:
    return lambda gateway, operation: gateway.exchange.fault(operation, kind)


NO_CLEAR_ANSWER = {
    "redirect": spoil(Spoil.REDIRECT),
    "502": spoil(Spoil.SERVER_ERROR),
    "unsigned": spoil(Spoil.UNSIGNED),
    "wrongly signed": spoil(Spoil.WRONGLY_SIGNED),
    "garbage": fault(FaultKind.GARBAGE),
    "cut": fault(FaultKind.CUT),
    "accepted, cut": fault(FaultKind.ACCEPT_THEN_CUT),
    "hang": fault(FaultKind.HANG),
}


@pytest.mark.parametrize("wrong", NO_CLEAR_ANSWER.values(), ids=NO_CLEAR_ANSWER)
def test_no_clear_answer(
    args: dict[str, Any],
    gateway: TigerGateway,
    exchange: Exchange,
    wrong: Callable[[TigerGateway, str], None],
) -> None:
    """An order is sent once and its fate is said to be open; a read says what is the matter."""

    def came(operation: str, times: int = 1) -> None:
        """So often, also when the gateway takes it in after the client has given up."""
        exchange.wait_for(lambda: len(exchange.received(operation)) >= times)
        assert len(exchange.received(operation)) == times

    with connected(args, "trade", push_host="") as broker:
        wrong(gateway, "place")
        with impatient(broker, "place_order"), pytest.raises(OutcomeUnknown):
            place(broker)
        came("place")
        assert len(exchange.orders) <= 1
        wrong(gateway, "order_no")
        with (
            impatient(broker, "order_no"),
            pytest.raises(Busy, match="not sent"),
        ):
            place(broker)
        came("order_no", 2)
        came("place")
        order_id = place(broker)  # and the next one is served again
        wrong(gateway, "cancel")
        with impatient(broker, "cancel_order"), pytest.raises(OutcomeUnknown):
            broker.cancel_order(order_id)
        came("cancel")
    with connected(args, "account") as broker:
        wrong(gateway, "positions")
        with impatient(broker, "positions"), pytest.raises(TimedOut):
            broker.positions()
        came("positions")
        assert broker.positions() == []
        came("positions", 2)


def test_the_timeout_given_ends_what_hangs(args: dict[str, Any], exchange: Exchange) -> None:
    assert Tiger(args | {"timeout": 1})._timeout == 1
    began = time.monotonic()
    with connected(args, "trade", push_host="") as broker:
        exchange.fault("place", FaultKind.HANG)
        broker._timeout = 1.0
        # A machine that stands still may not come to send it.
        with pytest.raises((OutcomeUnknown, Busy)):
            place(broker)
    with connected(args, "account") as broker:
        exchange.fault("positions", FaultKind.HANG)
        broker._timeout = 1.0
        with pytest.raises((TimedOut, Busy)):
            broker.positions()
    assert time.monotonic() - began < 25, "2 s on an idle machine; 30 s is the other's timeout"


def test_the_timeout_given_ends_what_drips(args: dict[str, Any], gateway: TigerGateway) -> None:
    """Each byte comes soon enough, and all of them take a minute and more."""
    began = time.monotonic()
    with connected(args, "trade", push_host="") as broker:
        broker._timeout = 1.0
        gateway.spoil("place", Spoil.DRIPPING)
        # A machine that stands still may not come to send it.
        with pytest.raises((OutcomeUnknown, Busy)):
            place(broker)
    with connected(args, "account") as broker:
        broker._timeout = 1.0
        gateway.spoil("positions", Spoil.DRIPPING)
        with pytest.raises((TimedOut, Busy)):
            broker.positions()
    assert time.monotonic() - began < 25, "2 s on an idle machine"


def test_an_answer_without_data(trade: Any, account: Any, gateway: TigerGateway) -> None:
    gateway.spoil("place", Spoil.NO_DATA)
    with pytest.raises(OutcomeUnknown, match="without telling its id"):
        place(trade)
    gateway.spoil("order_no", Spoil.NO_DATA)
    with pytest.raises(Busy, match="not sent"):
        place(trade)
    for operation, look in (("ping", account.ping), ("positions", account.positions)):
        gateway.spoil(operation, Spoil.NO_DATA)
        assert not look()
    gateway.spoil("cash", Spoil.NO_DATA)
    with pytest.raises(Rejected, match="no available amount"):
        account.cash()


@pytest.mark.parametrize("form", ["http", "code", "signed code", "account"])
def test_rate_limits_in_every_form(
    trade: Any, account: Any, gateway: TigerGateway, exchange: Exchange, form: str
) -> None:
    gateway.rate_limit_form = form.removeprefix("signed ")
    gateway.sign_refusals = form.startswith("signed")
    for operation, call in (
        ("order_no", lambda: place(trade)),
        ("place", lambda: place(trade)),
        ("cash", account.cash),
    ):
        exchange.fault(operation, FaultKind.RATE_LIMIT)
        with pytest.raises(RateLimited) as limited:
            call()
        assert limited.value.retry_after
    assert not exchange.orders


@pytest.mark.parametrize(
    ("code", "said", "meaning"),
    [
        (1, "server error", None),
        (2, "network read time out", None),
        (-1, "odd", None),
        (1100, "TRADE DUPLICATE ORDER ID", None),
        (1200, f"standard account response error({SYSTEM_ERROR})", None),
        (1300, f"paper account response error({SYSTEM_ERROR})", None),
        (4, "access forbidden(ip not in white list)", Rejected),
        (4, "4000:permission denied(Current device does not have permission)", Rejected),
        (4, "rate limit error(current limiting interface:orders, …)", RateLimited),
        (5, "rate limit error", RateLimited),
        (1200, f"standard account response error({TOO_MANY})", RateLimited),
        (1300, "paper account response error(Request rate exceeded)", RateLimited),
        (1000, "common param error(invalid symbols)", Rejected),
        (1010, "biz param error", Rejected),
        (1200, "Orders cannot be placed at this moment", Rejected),
        (1300, "paper account response error(no funds)", Rejected),
    ],
)
def test_what_refusals_mean(code: int, said: str, meaning: type[HttpTradingError] | None) -> None:
    found = mapping.refusal(code, said)
    assert type(found) is (meaning or type(None))
    if isinstance(found, Rejected):
        assert said in found.text


@pytest.mark.parametrize(
    "said",
    [
        "failed to verify signature, please make sure you use the correct rsa private key",
        "failed to get developer information",
        "sign check error",
        "public key error",
    ],
)
def test_what_a_bad_signature_means(said: str) -> None:
    found = mapping.refusal(1000, f"common param error({said})")
    assert isinstance(found, Rejected) and found.text == mapping.BAD_SIGNATURE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"code": 1200, "message": "no"}', ""),
        (b'{"code": 4, "message": "rate limit error", "sign": null}', ""),
        (b'{"code": 4, "message": "rate limit error", "sign": "AAAA"}', "wrongly signed"),
        (b'{"code": 4, "message": "rate limit error", "sign": ""}', "wrongly signed"),
        (b'{"code": 0, "data": {}}', "does not carry"),
        (b'{"code": false, "data": {}}', "does not carry"),
        (b'{"code": "1200"}', "does not carry"),
        (b'{"code": 1200.5}', "does not carry"),
        (b'{"message": "no"}', "does not carry"),
        (b'["code", 1200]', "does not carry"),
    ],
)
def test_what_is_believed_unsigned(gateway: TigerGateway, text: bytes, said: str) -> None:
    transport = tiger_http.Transport(gateway.server_url, gateway.public_key)
    try:
        transport._verify(text, "1754942400000")
        found = ""
    except tiger_http.Unbelieved as error:
        found = error.text
    assert said in found and bool(said) == bool(found)


def test_a_request_that_was_given_up_does_not_arrive_later() -> None:
    """As it would after an outage: here it waits for room at the server."""
    with socket.socket() as listening, ThreadPoolExecutor(1) as pool:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        transport = tiger_http.Transport(f"http://127.0.0.1:{listening.getsockname()[1]}", "")

        def ask() -> None:
            with transport.within(60):
                transport(None, "", None, {}, {"timestamp": "now", "remark": "x" * 8000})

        asking = pool.submit(ask)
        connection, _ = listening.accept()
        with connection:
            head = b""
            while not head.endswith(b"\r\n\r\n{"):  # the body was sent at once
                head += connection.recv(1)
            transport.abort()
            with pytest.raises(tiger_http.NoAnswer):
                asking.result()
            came = 0
            with suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    came += len(part)
    assert came < 8000


def test_tigers_own_failure_leaves_open_what_was_done(
    trade: Any, account: Any, gateway: TigerGateway, exchange: Exchange
) -> None:
    """Done, and answered with the failure of what lies behind the gateway."""

    def fail(data: Any) -> Any:
        raise Refused(1200, f"standard account response error({SYSTEM_ERROR})")

    gateway.rewrites |= dict.fromkeys(("place", "cancel", "positions", "order_no"), fail)
    with pytest.raises(Busy, match="not sent"):
        place(trade)
    del gateway.rewrites["order_no"]
    with pytest.raises(OutcomeUnknown, match="system error"):
        place(trade)
    (order_id,) = exchange.orders
    with pytest.raises(OutcomeUnknown, match="system error"):
        trade.cancel_order(order_id)
    assert account.order(order_id).order.is_canceled
    with pytest.raises(TimedOut, match="try again"):
        account.positions()


def test_an_unsigned_refusal_of_an_order(trade: Any, gateway: TigerGateway) -> None:
    gateway.refusals["place"] = 1200, "standard account response error(bad_request:No money)"
    with pytest.raises(Rejected, match="No money"):
        place(trade)


def test_the_brokers_words(trade: Any, exchange: Exchange) -> None:
    exchange.fault("place", FaultKind.REFUSE, text="Insufficient\n buying power")
    with pytest.raises(Rejected, match="Tiger: Insufficient buying power"):
        place(trade)


def test_a_connection_that_broke_while_idle_costs_no_order(
    trade: Any, gateway: TigerGateway, exchange: Exchange
) -> None:
    place(trade)
    gateway.stop()
    # The news of it is here.
    assert select.select([trade._http._connection.sock], [], [], 60)[0]
    with pytest.raises(BrokerUnavailable, match="cannot be reached"):
        place(trade)
    gateway.start()
    place(trade)
    assert len(exchange.received("place")) == 2


def test_one_connection_serves_many_requests(account: Any, gateway: TigerGateway) -> None:
    before = gateway.http_connections
    for _ in range(5):
        account.positions()
    assert gateway.http_connections == before


def test_a_stuck_call_ends_when_aborted(args: dict[str, Any], exchange: Exchange) -> None:
    with connected(args, "account", timeout=30) as broker:
        exchange.fault("cash", FaultKind.HANG)
        failures: list[BaseException] = []

        def look() -> None:
            try:
                broker.cash()
            except HttpTradingError as error:
                failures.append(error)

        thread = threading.Thread(target=look)
        thread.start()
        exchange.wait_for(lambda: exchange.received("cash"))
        broker.abort()
        thread.join(20)  # less than its own 30 s
        assert not thread.is_alive() and failures
        with pytest.raises(BrokerUnavailable):
            broker.cash()
        assert len(exchange.received("cash")) == 1


# --- connecting -------------------------------------------------------------------------------
def test_arguments_are_checked_and_nothing_is_called(tmp_path: Path) -> None:
    given = {"tiger_id": "1", "account": PRIME, "pk_path": str(tmp_path / "none")}
    for name in given:
        with pytest.raises(ValueError, match=name):
            Tiger({key: value for key, value in given.items() if key != name})
    for timeout in (0, 31, "5", True):
        with pytest.raises(ValueError, match="timeout"):
            Tiger(given | {"timeout": timeout})
    for wrong in ({"push_port": 0}, {"push_ssl": "no"}, {"server_url": "openapi.example"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Tiger(given | wrong)
    broker = Tiger(given | {"secret_key": SECRET})
    assert SECRET not in repr(broker) and PRIME not in repr(broker)
    with pytest.raises(BrokerUnavailable, match="pk_path"):
        broker.connect()
    (tmp_path / "none").write_text("no key")
    with pytest.raises(BrokerUnavailable, match="no RSA private key"):
        broker.connect()


def test_accounts_of_one_tiger_id_share_their_limits() -> None:
    given = {"tiger_id": 1, "account": PRIME, "pk_path": "x"}
    one, other = Tiger(given), Tiger(given | {"account": GLOBAL})
    assert one.account_key() == other.account_key()
    assert one.account_key() != Tiger(given | {"tiger_id": 2}).account_key()


def test_keys_in_every_form(args: dict[str, Any], gateway: TigerGateway, tmp_path: Path) -> None:
    bare = tmp_path / "bare.txt"
    bare.write_text(CLIENT_KEYS.private_base64)
    for path in (gateway.write_key(tmp_path, pkcs8=True), bare):
        with connected(args, "account", pk_path=str(path)) as broker:
            assert broker.ping()
    bare.write_text(STRANGER_KEYS.private_base64)
    with (
        pytest.raises(BrokerUnavailable, match="signature"),
        connected(args, "account", pk_path=str(bare)),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tiger_id": "20159999"}, "signature"),
        ({"account": "99999999"}, "no such account"),
        ({"account": "20191106192858399"}, "no such account"),
        ({"tiger_public_key": ""}, "wrongly signed"),  # the SDK's built-in key is Tiger's own
        ({"server_url": "http://127.0.0.1:1/gateway"}, "cannot be reached"),
    ],
    ids=["tiger_id", "account", "paper account", "public key", "gateway absent"],
)
def test_wrong_arguments(args: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with (
        pytest.raises((BrokerUnavailable, Rejected), match=said),
        connected(args, "account", **changes),
    ):
        pass


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "unknown"])
def test_the_gateways_certificate_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    certificate = self_signed_certificate(tmp_path)
    exchange = Exchange()
    with TigerGateway(exchange, http_certificate=certificate) as gateway:
        given = arguments(gateway, tmp_path)
        if trusted:
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
            with connected(given, "account") as broker:
                assert broker.positions() == broker.positions() == []
            assert gateway.http_connections == 1
        else:
            with (
                pytest.raises(BrokerUnavailable, match="not trusted"),
                connected(given, "account"),
            ):
                pass
            assert not exchange.requests


def test_a_bad_signature_is_not_sent_again_and_again(
    args: dict[str, Any], exchange: Exchange, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiger black-lists who goes on with errors (docs.itigerup.com/docs/error-code, 4)."""
    key = tmp_path / "key.txt"
    key.write_text(STRANGER_KEYS.private_base64)

    def refused() -> int:
        """How often Tiger is asked in three attempts."""
        before = len(exchange.received("ping"))
        for _ in range(3):
            with (
                pytest.raises(BrokerUnavailable, match="signature"),
                connected(args, "account", pk_path=str(key)),
            ):
                pass
        return len(exchange.received("ping")) - before

    assert refused() == 1
    monkeypatch.setattr(tiger, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 21))
    assert refused() == 1  # asked again, but no more often
    key.write_text(CLIENT_KEYS.private_base64)
    with connected(args, "account", pk_path=str(key)) as broker:  # at once
        assert broker.ping()


def test_a_paper_account_is_found_among_all(args: dict[str, Any], exchange: Exchange) -> None:
    """Tiger refuses to be asked for a paper account."""
    with connected(args, "account", account=PAPER) as broker:
        assert broker.ping() is True
    assert [one.fields.get("account") for one in exchange.received("ping")] == [None, None]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (4, "rate limit error(current limiting interface:accounts, up to 60 times per minute)"),
        (1, "server error"),
        (1000, "common param error(the current requested method does not support)"),
    ],
)
def test_an_account_that_cannot_be_checked_is_served(
    args: dict[str, Any], gateway: TigerGateway, code: int, said: str
) -> None:
    gateway.refusals["ping"] = code, said
    with connected(args, "account") as broker:
        assert broker.positions() == []


def test_a_gateway_that_hangs_does_not_hold_connecting(
    args: dict[str, Any], exchange: Exchange
) -> None:
    began = time.monotonic()
    exchange.fault("ping", FaultKind.HANG)
    with connected(args, "account", timeout=1):
        assert time.monotonic() - began < 25, "1 s on an idle machine"


def test_nothing_leaks_in(
    args: dict[str, Any],
    exchange: Exchange,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strange = {
        "TIGER_ID": "666",
        "ACCOUNT": "666",
        "PRIVATE_KEY": "x",
        "SECRET_KEY": "leaked",
        "LICENSE": "TBHK",
        "TOKEN": "leaked",
        "SERVER_URL": "http://127.0.0.1:1",
        "TIMEZONE": "No/Where",
        "LANGUAGE": "zh_CN",
        "PROPS_PATH": str(tmp_path),
    }
    for name, value in strange.items():
        monkeypatch.setenv(f"TIGEROPEN_{name}", value)
    lines = "".join(f"{name.lower()}={value}\n" for name, value in strange.items())
    (tmp_path / "tiger_openapi_config.properties").write_text(lines)
    (tmp_path / "tiger_openapi_token.properties").write_text("token=leaked\n")
    monkeypatch.chdir(tmp_path)
    with connected(args, "trade", push_host="") as broker:
        place(broker)
    fields = exchange.received("place")[0].fields
    assert "secret_key" not in fields
    assert (fields["account"], fields["lang"]) == (PRIME, "en_US")
    assert fields["device_id"] == tiger_http.device_id(args["tiger_id"])


def test_no_secret_in_a_log_or_an_error(
    args: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    exchange = Exchange()
    said: list[str] = []
    with TigerGateway(exchange, secret_key=SECRET) as gateway:
        given = arguments(gateway, tmp_path) | {"secret_key": SECRET}
        with connected(given, "trade") as broker, impatient(broker, "place_order"):
            exchange.wait_for(lambda: exchange.received("subscribe"))
            exchange.fault("place", FaultKind.REFUSE, text=f"wrong secret_key {SECRET}")
            for wrong in (None, *NO_CLEAR_ANSWER.values()):
                if wrong is not None:
                    wrong(gateway, "place")
                with pytest.raises(HttpTradingError) as error:
                    place(broker)
                said.append(error.value.text)
                assert error.value.__cause__ is None
            gateway.cut()
    out = capfd.readouterr()
    told = "\n".join([*said, caplog.text, out.out, out.err])
    assert "Tiger" in told
    for secret in (
        SECRET,
        gateway.tiger_id,
        CLIENT_KEYS.private_base64[:40],
        given["account"],
        "biz_content",
    ):
        assert secret not in told
    assert CLIENT_KEYS.sign(gateway.tiger_id) not in told  # the push connection's login


# --- push -------------------------------------------------------------------------------------
def test_orders_are_pushed(args: dict[str, Any], gateway: TigerGateway, exchange: Exchange) -> None:
    with connected(args, "trade") as broker:
        exchange.wait_for(lambda: subscribed(exchange) == 3)
        order_id = place(broker, lifecycle=Lifecycle.ETH)
        exchange.fill(order_id, Decimal("1.5"), "199.5")
        exchange.reject(order_id, "no money")
        link = broker.link
        link.wait_for(lambda: len(link.reports) == 3)
        working, filled, rejected = link.reports
        assert working.order.order_id == order_id and not working.order.is_completed
        assert (working.mark, working.contract) == ("mark-1", contract())
        assert (working.price, working.order.qty) == (Decimal("200.01"), 12)
        assert working.lifecycle is None  # a push does not tell ETH from OVERNIGHT
        assert (filled.order.filled_qty, filled.order.avg_price) == (Decimal("1.5"), 199.5)
        assert rejected.order.error_reason == "no money"
        gateway.push_asset(PRIME)
        link.wait_for(lambda: link.stales)


def test_orders_for_what_is_no_stock_are_left_alone(
    args: dict[str, Any], gateway: TigerGateway, exchange: Exchange
) -> None:
    """Tiger pushes the account's options and futures, too, which its lists of stocks never tell."""
    with connected(args, "trade") as broker:
        exchange.wait_for(lambda: subscribed(exchange) == 3)
        gateway.sec_type = "OPT"
        place(broker)
        gateway.sec_type = "STK"
        order_id = place(broker)
        broker.link.wait_for(lambda: broker.link.reports)
        assert [report.order.order_id for report in broker.link.reports] == [order_id]


def test_a_price_that_moves_is_no_news_of_an_account(
    args: dict[str, Any], gateway: TigerGateway, exchange: Exchange
) -> None:
    """Tiger pushes what an account is worth as often as prices move."""
    with connected(args, "trade") as broker:
        exchange.wait_for(lambda: subscribed(exchange) == 3)
        link = broker.link
        exchange.cash["USD"] = Decimal(1000)
        for worth in range(20):
            gateway.push_asset(PRIME, worth=worth)
            gateway.push_position(PRIME, "AAPL", "12", price=200 + worth)
        place(broker)
        link.wait_for(lambda: link.reports)
        assert link.stales == 2  # the first of each
        exchange.cash["USD"] -= 1
        gateway.push_asset(PRIME)
        link.wait_for(lambda: link.stales == 3)
        gateway.push_position(PRIME, "AAPL", "12.5", price=200)
        link.wait_for(lambda: link.stales == 4)
        gateway.push_position(PRIME, "MSFT", "12.5", price=200)
        link.wait_for(lambda: link.stales == 5)


def test_two_accounts_share_one_push_connection(
    args: dict[str, Any], gateway: TigerGateway, exchange: Exchange
) -> None:
    with connected(args, "trade") as one, connected(args, "trade", account=PAPER) as other:
        exchange.wait_for(lambda: subscribed(exchange) == 6)
        mine, theirs = place(one), place(other)
        for broker, order_id in ((one, mine), (other, theirs)):
            link = broker.link
            link.wait_for(lambda link=link: link.reports)
            assert {report.order.order_id for report in link.reports} == {order_id}
            # What happened before it was heard is looked up.
            link.wait_for(lambda link=link: link.restorations)
        assert len(exchange.received("connect")) == len(gateway.push_sessions) == 1
    exchange.wait_for(lambda: not gateway.push_sessions)
    assert not tiger_push._shared


def test_subscriptions_are_renewed_after_a_cut(
    args: dict[str, Any], gateway: TigerGateway, exchange: Exchange
) -> None:
    with connected(args, "trade") as broker:
        exchange.wait_for(lambda: subscribed(exchange) == 3)
        [first] = gateway.push_sessions
        gateway.cut_push()
        broker.link.wait_for(lambda: broker.link.restorations == 2)

        def renewed() -> bool:
            sessions = list(gateway.push_sessions)
            return first not in sessions and [len(one.topics) for one in sessions] == [3]

        exchange.wait_for(renewed)
        place(broker)
        broker.link.wait_for(lambda: broker.link.reports)


def test_what_push_has_missed_is_looked_up(
    gateway: TigerGateway, exchange: Exchange, tmp_path: Path
) -> None:
    """Without anybody asking: the order may be forgotten by Tiger before somebody does."""
    with service(gateway, tmp_path, PRIME) as (trader,):
        exchange.wait_for(lambda: subscribed(exchange) == 3)
        trader.placed(LIMIT_ORDER)
        lists = len(exchange.received("orders"))
        gateway.cut_push()
        exchange.wait_for(lambda: len(exchange.received("orders")) > lists)


def test_a_push_connection_that_does_not_hold_is_tried_more_seldom(
    args: dict[str, Any], exchange: Exchange, gateway: TigerGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiger_push, "BACK_OFF", (0.0, 0.0, 0.0, 1000.0))
    monkeypatch.setattr(tiger_push, "STEADY", 1000.0)
    with connected(args, "trade") as broker:
        for cuts in range(3):
            broker.link.wait_for(lambda cuts=cuts: broker.link.restorations == cuts + 1)
            exchange.wait_for(lambda: len(gateway.push_sessions) == 1)
            gateway.cut_push()
            exchange.wait_for(lambda: not gateway.push_sessions)
        for _ in range(10):  # which is time enough for the next attempt, if there were one
            place(broker)
        assert len(exchange.received("connect")) == 3


def test_a_kick_out_is_told_and_not_fought(
    args: dict[str, Any],
    gateway: TigerGateway,
    exchange: Exchange,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with connected(args, "trade") as broker:
        exchange.wait_for(lambda: subscribed(exchange) == 3)
        # Another process: the same login on a connection that is not the shared one.
        address, subscription = broker._push
        intruder = tiger_push.SharedPush(address, CLIENT_KEYS.private_base64)
        intruder.add(subscription)
        intruder.start()
        try:
            exchange.wait_for(lambda: len(exchange.received("connect")) == 2)
            wait_for(lambda: "taken over the push connection" in caplog.text, "the warning")
            place(broker)  # and orders go on

            def keepers() -> list[threading.Thread]:
                return [t for t in threading.enumerate() if t.name == "httptrading-tiger-push"]

            wait_for(lambda: len(keepers()) == 1, "the kicked one to leave it to the other")
            assert len(exchange.received("connect")) == 2
        finally:
            intruder.stop()


def test_push_that_is_down_or_deaf_holds_nothing(
    args: dict[str, Any],
    gateway: TigerGateway,
    exchange: Exchange,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiger_push, "WELCOME_TIMEOUT", 90.0)
    exchange.fault("connect", FaultKind.HANG, times=100)
    began = time.monotonic()
    with connected(args, "trade") as broker:
        place(broker)
    with connected(args, "trade", push_port=1) as broker:
        place(broker)
    assert time.monotonic() - began < 60, "nothing waited for a welcome"


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted", "unknown"])
def test_the_push_certificate_is_checked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trusted: bool,
) -> None:
    certificate = self_signed_certificate(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    exchange = Exchange()
    with TigerGateway(exchange, push_certificate=certificate) as gateway:
        with connected(arguments(gateway, tmp_path), "trade", push_ssl=True) as broker:
            if trusted:
                exchange.wait_for(lambda: subscribed(exchange) == 3)
                place(broker)
                broker.link.wait_for(lambda: broker.link.reports)
            else:
                place(broker)
                wait_for(lambda: "push connection to Tiger is down" in caplog.text, "the warning")
                assert not exchange.received("connect")


def test_a_gateway_of_ones_own_has_no_push_at_tiger(args: dict[str, Any]) -> None:
    without = {key: value for key, value in args.items() if not key.startswith("push")}
    with connected(without, "trade") as broker:
        assert broker._push is None


# --- in the service ---------------------------------------------------------------------------
LOGINS = [
    ("TigerInstance0001", ["tigerServiceToken01"]),
    ("TigerInstance0002", ["tigerServiceToken02"]),
]
LIMIT_ORDER = {
    "tradeType": "Securities",
    "ticker": "AAPL",
    "region": "US",
    "price": 200.01,
    "qty": 12,
    "orderType": "Limit",
    "timeInForce": "DAY",
    "lifecycle": "RTH",
    "direction": "BUY",
}


def settings_of(broker: Tiger, **changes: Any) -> InstanceSettings:
    """What must succeed has room on a machine that stands still for seconds."""
    return InstanceSettings(broker, **{"deadline": 30.0, "connect_timeout": 60.0} | changes)


@contextmanager
def service(
    gateway: TigerGateway, directory: Path, *accounts: str, **settings: Any
) -> Iterator[list[Trader]]:
    """A running service with one instance per account, with Tiger's real limits; its clients."""
    brokers = [
        Tiger(arguments(gateway, directory, account), *login)
        for account, login in zip(accounts, LOGINS, strict=False)
    ]
    app = create_app(
        brokers=[settings_of(broker, **settings) for broker in brokers], data_dir=directory / "data"
    )
    traders = [Trader(app, broker.instance_id, broker.tokens[0]) for broker in brokers]
    try:
        for trader in traders:
            assert trader.ping()["pong"]
            wait_for(lambda trader=trader: Subject.is_connected(trader), "every connection")
        yield traders
    finally:
        app.extensions["httptrading"].close()


def at_once(count: int, ask: Callable[[int], Answer]) -> list[Answer]:
    """What `count` clients are answered who all ask at the same moment."""
    answers: list[Answer] = []
    start = threading.Barrier(count)

    def client(number: int) -> None:
        start.wait(60)
        answers.append(ask(number))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == count
    return answers


def again(trader: Trader) -> Trader:
    """The same client for another thread."""
    return Trader(trader.client.application, trader.instance_id, trader.token)


def test_ten_orders_at_once(gateway: TigerGateway, exchange: Exchange, tmp_path: Path) -> None:
    with service(gateway, tmp_path, PRIME) as (trader,):
        answers = at_once(10, lambda n: again(trader).place(LIMIT_ORDER, key=f"order-{n}"))
        assert all(answer.ok for answer in answers), answers
        assert len({answer["orderId"] for answer in answers}) == len(exchange.orders) == 10
        # Half a second on an idle machine.
        assert max(answer.seconds for answer in answers) < 25


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux delays acknowledgements")
def test_an_answer_in_two_pieces_is_not_held_up(account: Any, gateway: TigerGateway) -> None:
    """Its body waits for the head's acknowledgement, which Linux delays by 40 ms; but not always on
    a new connection."""
    gateway.enforce_limits = False

    def seconds(apart: bool) -> float:
        gateway.writes_apart = apart
        began = time.monotonic()
        assert account.ping()
        return time.monotonic() - began

    apart = min([seconds(True) for _ in range(40)][20:])
    assert apart < 0.03 + min(seconds(False) for _ in range(20)), "also on a busy machine"


def test_tiger_is_away_when_the_service_starts(tmp_path: Path) -> None:
    exchange = Exchange()
    gateway = TigerGateway(exchange, tiger_id=new_tiger_id(), accounts=(PRIME,))
    with gateway:
        broker = Tiger(arguments(gateway, tmp_path), *next(iter(LOGINS)))
    app = create_app(brokers=[settings_of(broker)], data_dir=tmp_path / "data")
    trader = Trader(app, broker.instance_id, broker.tokens[0])
    try:
        answer = wait_for(
            lambda: (lambda a: a if "gateway cannot be reached" in str(a["ex"]) else None)(
                trader.cash()
            ),
            "a clear answer",
        )
        assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE")
        assert "Tiger's gateway cannot be reached" in answer["ex"]
        with gateway:
            wait_for(lambda: trader.place(LIMIT_ORDER).ok, "orders to be served, within 5 s")
            exchange.wait_for(lambda: exchange.received("subscribe"))
    finally:
        app.extensions["httptrading"].close()


def test_the_limits_are_tigers() -> None:
    high = Window(120, 61.0, kept=10, kept_for_orders=20)
    limits = {"high": high, "medium": Window(60, 61.0)}
    # Tiger's 10 are for market states and grabs together.
    limits |= {"low": Window(10, 61.0), "market": Window(9, 61.0), "grab": Window(4, 61.0)}
    assert Tiger.windows == limits
    assert Tiger.costs["market_status"] == ("low", "market")


def test_never_more_calls_than_tiger_allows(
    gateway: TigerGateway, exchange: Exchange, tmp_path: Path
) -> None:
    # The windows are so long that none of them passes while the test runs, however slowly.
    windows = {name: replace(window, seconds=1000) for name, window in Tiger.windows.items()}
    with service(gateway, tmp_path, PRIME, GLOBAL, windows=windows) as (prime, other):
        order_id = prime.placed(LIMIT_ORDER)
        letters = "ABCDEFGHIJ"

        def busy(asks: Iterable[Callable[[Trader], Answer]]) -> list[int]:
            """Both accounts in turn; what they are answered."""
            answers = [ask((prime, other)[n % 2]) for n, ask in enumerate(asks)]
            limited = [answer for answer in answers if answer.status == 429]
            assert all(int(answer.headers["Retry-After"]) >= 1 for answer in limited)
            return [answer.status for answer in answers]

        markets = busy([lambda trader: trader.market()] * 14)
        assert markets == [200] * 9 + [429] * 5
        currencies = [f"{a}{b}X" for a in letters for b in letters[:7]]
        reads = busy(lambda trader, c=c: trader.cash(c) for c in currencies)
        # Tiger refuses such currencies, and counts that.
        assert set(reads) == {200, 422, 429}
        assert set(reads[reads.index(429) :]) == {429}
        orders = busy([lambda trader: trader.place(LIMIT_ORDER)] * 70)
        assert set(orders) == {200, 429} and orders == sorted(orders)
        for limit, operations in ((120, HIGH), (60, MEDIUM), (9, LOW)):
            assert 0.85 * limit <= exchange.most_in(1000, operations) <= limit, operations
        assert prime.cancel(order_id).ok  # slots are kept for it
        assert exchange.most_in(1000, HIGH) <= 120


def test_an_order_takes_both_its_slots_or_none(gateway: TigerGateway, tmp_path: Path) -> None:
    windows = {**Tiger.windows, "high": Window(11, 1000)}
    with service(gateway, tmp_path, PRIME, windows=windows) as (trader,):
        order_id = trader.placed(LIMIT_ORDER)
        wait_for(lambda: trader.place(LIMIT_ORDER).code == "RATE_LIMITED", "all pairs to be used")
        assert trader.place(LIMIT_ORDER).code == "RATE_LIMITED"
        assert trader.state(order_id).ok, "the odd slot is left"


def test_an_unreadable_answer_keeps_the_connection(
    gateway: TigerGateway, exchange: Exchange, tmp_path: Path
) -> None:
    exchange.quote("US", "AAPL")
    with service(gateway, tmp_path, PRIME) as (trader,):
        order_id = trader.placed(LIMIT_ORDER)

        def place() -> Answer:
            return trader.place(LIMIT_ORDER)

        neighbours = {
            "market": (trader.market, lambda: trader.quote("US", "AAPL")),
            "positions": (trader.positions, lambda: trader.state(order_id)),
            "order_no": (place, place),
        }
        for operation, (spoilt, neighbour) in neighbours.items():
            gateway.refusals[operation] = 1, "server error"
            answer = spoilt()
            assert answer.code == ("BUSY" if operation == "order_no" else "TIMEOUT"), answer
            del gateway.refusals[operation]
            assert neighbour().ok
        assert Subject.is_connected(trader)
        assert gateway.http_connections == 4, "one for each kind of operation"


def test_a_hanging_read_is_asked_once_and_keeps_no_order(
    gateway: TigerGateway, exchange: Exchange, tmp_path: Path
) -> None:
    with service(gateway, tmp_path, PRIME) as (trader,):
        for operation, read in (
            ("positions", trader.positions),
            ("quote", lambda timeout: trader.quote("US", "AAPL", timeout=timeout)),
        ):
            exchange.fault(operation, FaultKind.HANG)

            def reached(
                operation: str = operation, read: Callable[[float], Answer] = read
            ) -> list[Any]:
                answer = read(1)
                assert (answer.status, answer.code) == (504, "TIMEOUT")
                assert answer.seconds < 15, "1 s on an idle machine; 30 s if Tiger were waited for"
                return exchange.received(operation)

            # Once, unless the machine stands still before Tiger is asked.
            wait_for(reached, "the read to reach Tiger")
            order_id = trader.placed(LIMIT_ORDER)
            assert trader.cancel(order_id).ok
            assert len(exchange.received(operation)) == 1


def test_a_hanging_order_keeps_no_cancellation(
    gateway: TigerGateway, exchange: Exchange, tmp_path: Path
) -> None:
    with service(gateway, tmp_path, PRIME) as (trader,), ThreadPoolExecutor(1) as pool:
        order_id = trader.placed(LIMIT_ORDER)
        exchange.fault("place", FaultKind.HANG)
        placing = pool.submit(again(trader).place, LIMIT_ORDER)
        exchange.wait_for(lambda: len(exchange.received("place")) == 2)
        assert trader.cancel(order_id).ok
        assert not placing.done()
        gateway.cut()
        hanging = placing.result()
        assert (hanging.status, hanging.code) == (504, "OUTCOME_UNKNOWN")


def test_two_accounts_of_one_tiger_id_in_one_service(
    gateway: TigerGateway, exchange: Exchange, tmp_path: Path
) -> None:
    with service(gateway, tmp_path, PRIME, PAPER) as traders:
        exchange.wait_for(lambda: subscribed(exchange) == 6)
        assert len(exchange.received("connect")) == len(gateway.push_sessions) == 1
        for trader in traders:
            order_id = trader.placed(LIMIT_ORDER)
            exchange.fill(order_id, 12, "200")
            exchange.forget(order_id)  # only the push can tell
            trader.wait_order(order_id, isFilled=True, filledQty=12)


# --- pure functions ---------------------------------------------------------------------------
@given(
    st.decimals(
        allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9
    )
)
def test_scaled_quantities_are_exact(amount: Decimal) -> None:
    assert mapping.scaled(int(amount.scaleb(6)), 6) == amount


@given(st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.decimals()))
def test_numbers_are_finite_or_none(value: Any) -> None:
    found = mapping.number(value)
    assert found is None or Decimal(found).is_finite()
    assert not isinstance(found, float)


@given(st.one_of(st.floats(), st.integers(), st.text(), st.none(), st.decimals()))
def test_moments_are_aware_or_none(value: Any) -> None:
    found = mapping.moment(value)
    assert found is None or found.tzinfo


@given(st.text())
def test_only_whole_numbers_are_order_ids(text: str) -> None:
    try:
        assert str(mapping.order_number(text)) == text
    except OrderNotFound:
        pass


@given(
    status=st.one_of(st.text(), st.sampled_from(["Filled", "Cancelled", "Inactive", "Invalid"])),
    qty=st.integers(0, 100),
    filled=st.integers(0, 100),
    reason=st.one_of(st.none(), st.text()),
)
def test_an_order_has_at_most_one_end(status: str, qty: int, filled: int, reason: Any) -> None:
    order = mapping.order_of(1, status, "USD", qty, filled, 1.5, reason)
    assert order.is_filled + order.is_canceled + bool(order.error_reason) <= 1
    assert order.is_filled is (filled >= qty > 0)


@given(st.sampled_from(["US", "HK"]), st.from_regex(r"[A-Z]{1,5}|[1-9][0-9]{0,4}", fullmatch=True))
def test_contracts_make_the_round_trip(region: str, text: str) -> None:
    if region == "HK" and not text.isdigit():
        text = "700"
    wanted = contract(text.zfill(5) if region == "HK" else text, region)
    currency = {"US": "USD", "HK": "HKD"}[region]
    assert mapping.contract_of(wanted.ticker, region, currency) == wanted
    assert mapping.contract_of(wanted.ticker, None, currency) == wanted
    assert mapping.contract_of(wanted.ticker, region, currency, "OPT") is None
