"""Futu behind the HTTP API: the documented limits, several OpenDs at once, and their failures."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from Crypto.PublicKey import RSA
from flask import Flask

from acceptance.kit import Answer, Trader, wait_for
from httptrading import InstanceSettings, Window, create_app
from httptrading.brokers import futu_sdk
from httptrading.brokers.futu import Futu
from simulators.exchange import Exchange, FaultKind
from simulators.opend import OpenD

PIN_MD5 = hashlib.md5(b"123456").hexdigest()
TOKEN = "futuServiceToken{:02}"
ORDER = {
    "tradeType": "Securities",
    "ticker": "AAPL",
    "region": "US",
    "price": Decimal("12.34"),
    "qty": 12,
    "orderType": "Limit",
    "timeInForce": "DAY",
    "lifecycle": "RTH",
    "direction": "BUY",
}
LONG = 600.0
"""Seconds that no test lasts, however slow the machine."""


def instance(opend: OpenD, number: int = 1, **changes: Any) -> InstanceSettings:
    """What must succeed has the time that a slow machine takes, unless a request says otherwise."""
    arguments = {"host": "127.0.0.1", "port": opend.port, "trade_env": "REAL"}
    arguments |= changes.pop("arguments", {})
    broker = Futu(arguments, f"FutuService{number:05}", [TOKEN.format(number)])
    return InstanceSettings(broker=broker, **{"deadline": 30.0, "connect_timeout": 60.0, **changes})


@pytest.fixture(autouse=True)
def only_our_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK's own 12 s for an answer would end a call that nobody else ends, and our 20 s of
    silence would end its connection."""
    monkeypatch.setattr(futu_sdk, "SILENT_SECONDS", LONG)
    open_context = futu_sdk.open_context

    def patient(*arguments: Any, **named: Any) -> Any:
        context = open_context(*arguments, **named)
        context._query_timeout = LONG
        return context

    monkeypatch.setattr(futu_sdk, "open_context", patient)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., list[Callable[[], Trader]]]]:
    """Starts a service with these instances; for each a function that makes its clients."""
    apps: list[Flask] = []

    def serve(*instances: InstanceSettings) -> list[Callable[[], Trader]]:
        app = create_app(brokers=instances, data_dir=tmp_path / "data")
        apps.append(app)
        return [
            partial(Trader, app, one.broker.instance_id, one.broker.tokens[0]) for one in instances
        ]

    yield serve
    for app in apps:
        app.extensions["httptrading"].close()


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


@pytest.fixture
def opend(exchange: Exchange) -> Iterator[OpenD]:
    with OpenD(exchange, enforce_limits=True) as opend:
        yield opend


def connected(trader: Trader) -> Trader:
    wait_for(lambda: trader.cash().ok, "OpenD to be connected", patience=120)
    return trader


def at_once(count: int, call: Callable[[int], Answer]) -> list[Answer]:
    start = threading.Barrier(count)

    def begin(number: int) -> Answer:
        start.wait(60)
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


# --- limits ---------------------------------------------------------------------------------
def test_fifteen_orders_in_30_s_and_the_next_is_told_when(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    documented = Futu.windows["place"]
    assert documented == Window(15, 30, gap=0.02)
    # Longer than 30 s, so that no slot comes free while a slow machine is still placing.
    (client,) = serve(instance(opend, windows={"place": replace(documented, seconds=LONG)}))
    connected(client())
    first = at_once(10, lambda _: client().place(ORDER))
    assert all(answer.ok for answer in first), first
    rest = at_once(8, lambda _: client().place(ORDER))
    assert sorted(answer.code for answer in rest) == [""] * 5 + ["RATE_LIMITED"] * 3
    for answer in rest:
        if not answer.ok:
            assert answer.status == 429
            assert answer.seconds < 25, "told at once, not parked until the deadline"
            assert LONG - 300 <= int(answer.headers["Retry-After"]) <= LONG + 1
    assert len(exchange.received("place")) == len(exchange.orders) == 15
    assert exchange.least_gap(["place"]) >= 0.02
    assert opend.violations == []
    assert len(exchange.received("orders")) < 10, "one after a connection, none for an order"


def test_an_order_that_can_wait_for_its_slot_is_served(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    opend.limits["place"] = (15, 3.0, 0.02, "频率太高")
    (client,) = serve(instance(opend, windows={"place": Window(15, 3.0, gap=0.02)}))
    connected(client())
    answers = at_once(20, lambda _: client().place(ORDER))
    assert all(answer.ok for answer in answers), answers
    assert exchange.most_in(3.0, ["place"]) <= 15
    assert opend.violations == []


def test_cancels_keep_their_own_window_and_gap(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    (client,) = serve(instance(opend, windows={"place": Window(15, LONG, gap=0.02)}))
    connected(client())
    placed = [answer["orderId"] for answer in at_once(15, lambda _: client().place(ORDER))]
    assert client().place(ORDER).status == 429
    cancelled = at_once(15, lambda number: client().cancel(placed[number]))
    assert all(answer.ok for answer in cancelled), cancelled
    assert exchange.least_gap(["cancel"]) >= 0.04
    assert all(order.status.is_final for order in exchange.orders.values())
    assert opend.violations == []


def test_a_list_asked_for_too_often_does_not_hold_up_cancel_all(
    serve: Callable[..., list[Callable[[], Trader]]], opend: OpenD, exchange: Exchange
) -> None:
    (client,) = serve(instance(opend))
    trader = connected(client())
    order_ids = {trader.placed(ORDER) for _ in range(2)}
    assert [trader.orders() for _ in range(11)][-1].code == "RATE_LIMITED"
    *nodes, rest = trader.post("order/cancel-all", {})["orders"]
    assert {node["orderId"] for node in nodes if node["requested"]} == order_ids
    assert (rest["orderId"], rest["requested"]) == ("", False)
    assert "others may be open" in rest["ex"]
    assert all(order.status.is_final for order in exchange.orders.values())
    assert opend.violations == []


def test_used_up_windows_do_not_keep_an_order_unknown(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    """Whoever asks for an order that nobody knows uses up what the listings need as well."""
    (client,) = serve(instance(opend, windows={"history US": Window(3, LONG)}))
    trader = connected(client())
    asked = [trader.state("987654321") for _ in range(4)]
    assert [answer.code for answer in asked][-1] == "RATE_LIMITED"
    exchange.fault("place", FaultKind.ACCEPT_THEN_CUT)
    exchange.on_change.remove(opend.push)  # it is cut before it tells
    assert trader.place(ORDER, key="cut").code == "OUTCOME_UNKNOWN"
    exchange.on_change.append(opend.push)
    wait_for(lambda: trader.get("order/state", clientOrderId="cut").ok, "the order to be found")
    assert len(exchange.orders) == 1
    assert opend.violations == []


def test_the_order_repeated_after_unlocking_is_counted(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    opend.locked = True
    windows = {"place": Window(15, LONG, gap=0.02)}
    (client,) = serve(instance(opend, arguments={"unlock_pin": PIN_MD5}, windows=windows))
    connected(client())
    answers = [client().place(ORDER) for _ in range(15)]
    assert [answer.code for answer in answers] == [""] * 14 + ["RATE_LIMITED"]
    assert len(exchange.received("place")) == 15
    assert len(exchange.orders) == 14
    assert len(exchange.received("unlock")) == 1
    assert opend.violations == []


def test_polling_is_never_held_back(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    """Only refreshed lists count at OpenD (10 in 30 s); its memory answers the rest."""
    (client,) = serve(instance(opend))
    trader = connected(client())
    order_id = trader.placed(ORDER)
    for _ in range(30):
        assert trader.cash().ok and trader.positions().ok and trader.state(order_id).ok
    assert opend.violations == []
    assert len(exchange.received("cash")) >= 30, "none of it came from the gateway's memory"


# --- several instances ------------------------------------------------------------------------
def test_one_login_has_one_limit_for_quotes_and_each_account_one_for_orders(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    exchange.quote("HK", "00700", latest=Decimal(300))
    names = ("quote", "place")
    slow = {name: replace(Futu.windows[name], seconds=LONG) for name in names}
    clients = serve(
        instance(opend, windows=slow, ages={"quote": 0}),
        instance(opend, 2, windows=slow, ages={"quote": 0}, arguments={"trade_env": "SIMULATE"}),
    )
    real, paper = (connected(client()) for client in clients)
    for _ in range(30):
        assert real.quote("HK", "00700").ok and paper.quote("HK", "00700").ok
    assert [each.quote("HK", "00700").status for each in (real, paper)] == [429, 429]
    for trader in (real, paper):
        assert all(trader.place(ORDER).ok for _ in range(15))
        assert trader.place(ORDER).status == 429
    assert opend.violations == []


def test_encrypted_and_plain_in_one_service(
    tmp_path: Path, opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    keys = [tmp_path / "one.pem", tmp_path / "two.pem"]
    for key in keys:
        key.write_bytes(RSA.generate(1024).export_key())
    others = [Exchange(), Exchange()]
    with (
        OpenD(others[0], rsa_key=keys[0]) as first,
        OpenD(others[1], rsa_key=keys[1]) as second,
    ):
        clients = serve(
            instance(opend),
            instance(first, 2, arguments={"pk_path": str(keys[0])}),
            instance(second, 3, arguments={"pk_path": str(keys[1])}),
        )
        for _ in range(2):
            for client, there in zip(clients, (exchange, *others), strict=True):
                connected(client())
                assert client().placed(ORDER) in there.orders
        assert [len(there.orders) for there in (exchange, *others)] == [2, 2, 2]


def test_a_key_for_an_opend_without_one_is_explained(
    tmp_path: Path, opend: OpenD, serve: Callable[..., Any]
) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(RSA.generate(1024).export_key())
    (client,) = serve(instance(opend, arguments={"pk_path": str(key)}))
    answer = wait_for(
        lambda: (lambda a: a if "pk_path" in str(a["ex"]) else None)(client().cash(timeout=5)),
        "the reason to be shown",
        patience=120,
    )
    assert answer.status == 503


def test_a_deaf_opend_is_nobody_elses_business(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    with OpenD(Exchange()) as deaf:
        stuck, well = serve(instance(deaf), instance(opend, 2))
        connected(well())

        def ask(pool: ThreadPoolExecutor, timeout: float) -> dict[str, Future[Answer]]:
            """Everything at once, of a broker that has just become deaf."""
            order_id = connected(stuck()).placed(ORDER)
            asked = len(deaf.exchange.requests)
            deaf.deaf = True
            requests = {
                "cash": lambda: stuck().cash(timeout=timeout),
                "positions": lambda: stuck().positions(timeout=timeout),
                "quote": lambda: stuck().quote("US", "AAPL", timeout=timeout),
                "order": lambda: stuck().state(order_id, timeout=timeout),
                "place": lambda: stuck().place(ORDER, timeout=timeout),
                "cancel": lambda: stuck().cancel(order_id, timeout=timeout),
            }
            waiting = {name: pool.submit(request) for name, request in requests.items()}
            deaf.exchange.wait_for(lambda: len(deaf.exchange.requests) > asked)
            return waiting

        with ThreadPoolExecutor(8) as pool:
            waiting = ask(pool, timeout=30)
            for _ in range(10):
                assert well().place(ORDER).ok
            assert not any(future.done() for future in waiting.values()), "served beside them"
            deaf.deaf = False
            deaf.cut()
            for future in waiting.values():
                future.result(60)
            waiting = ask(pool, timeout=2)
            for name, future in waiting.items():
                answer = future.result(60)
                assert answer.status in (503, 504), (name, answer)
                assert answer.seconds < 20, (name, answer)
        deaf.deaf = False
        connected(stuck())
        assert len(exchange.orders) == 10


def test_a_stuck_quote_does_not_delay_a_cancel(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    (client,) = serve(instance(opend))
    order_id = connected(client()).placed(ORDER)
    exchange.quote("US", "AAPL")
    wait_for(lambda: client().quote("US", "AAPL").ok, "quotes")
    before = len(exchange.received("quote"))
    exchange.fault("quote", FaultKind.HANG)
    with ThreadPoolExecutor(1) as pool:
        quote = pool.submit(lambda: client().quote("US", "AAPL", timeout=30))
        exchange.wait_for(lambda: len(exchange.received("quote")) > before)
        assert client().cancel(order_id).ok
        assert not quote.done()
        opend.cut()
        assert quote.result(60).code == "TIMEOUT"


# --- life -------------------------------------------------------------------------------------
def test_opend_restarts_and_trading_is_locked_again(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    (client,) = serve(instance(opend, arguments={"unlock_pin": PIN_MD5}))
    order_id = connected(client()).placed(ORDER)
    with opend.stopped():
        wait_for(lambda: client().cash(timeout=1).status == 503, "the loss to be noticed")
        exchange.fill(order_id, 12, "12.30")
    opend.locked = True
    # The promise is 5 s, the bound that of a machine that stands still now and then.
    wait_for(lambda: client().place(ORDER).ok, "trading to work again", patience=30)
    client().wait_order(order_id, isFilled=True)
    assert len(exchange.received("unlock")) == 1


def test_logged_out_and_in_again(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    (client,) = serve(instance(opend))
    trader = connected(client())
    assert trader.ping()["pong"] is True
    opend.log_out()
    answer = wait_for(
        lambda: (lambda a: a if "not logged in" in str(a["ex"]) else None)(trader.cash(timeout=2)),
        "the reason to be shown",
    )
    assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE")
    key = "while-logged-out"
    assert trader.place(ORDER, key=key).code == "BROKER_UNAVAILABLE"
    ping = trader.ping()
    assert ping.code == "BROKER_UNAVAILABLE" or ping["pong"] is False, ping
    opend.log_in()
    wait_for(lambda: trader.place(ORDER, key=key).ok, "trading to work again", patience=30)
    assert len(exchange.orders) == 1


def test_an_order_taken_before_the_cut_settles_by_itself(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    (client,) = serve(instance(opend))
    connected(client())
    exchange.fault("place", FaultKind.ACCEPT_THEN_CUT)
    answer = client().place(ORDER, key="cut-short")
    assert (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN")
    assert answer.error["clientOrderId"] == "cut-short"
    (order_id,) = exchange.orders
    exchange.fill(order_id, 12, "12.30")
    node = wait_for(
        lambda: (lambda a: a["order"] if a.ok else None)(client().state(key="cut-short")),
        "the outcome",
    )
    assert (node["orderId"], node["isFilled"]) == (order_id, True)
    assert len(exchange.received("place")) == 1


def test_a_fill_that_was_cancelled_is_not_told_any_more(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    (client,) = serve(instance(opend))
    connected(client())
    order_id = client().place(ORDER)["orderId"]

    def told() -> list[int]:
        answer = client().fills(order_id)
        return [fill["qty"] for fill in answer["fills"]] if answer.ok else []

    exchange.fill(order_id, 5, "12.30")
    exchange.fill(order_id, 4, "12.30")
    wait_for(lambda: told() == [5, 4], "both fills")
    opend.busted.add(exchange.orders[order_id].fills[0].fill_id)
    wait_for(lambda: told() == [4], "the cancelled one to go")


def test_threads_do_not_pile_up(
    opend: OpenD, exchange: Exchange, serve: Callable[..., Any]
) -> None:
    (client,) = serve(instance(opend))
    connected(client())
    wait_for(lambda: client().market().ok, "the quote connection")
    before = threading.active_count()
    for _ in range(3):
        opend.cut()
        connected(client())
        wait_for(lambda: client().market().ok, "the quote connection")
    wait_for(lambda: threading.active_count() <= before, "threads of old connections to end")


@contextmanager
def gateway(opend: OpenD, data_dir: Path) -> Iterator[Trader]:
    app = create_app(brokers=[instance(opend)], data_dir=data_dir)
    try:
        yield Trader(app, "FutuService00001", TOKEN.format(1))
    finally:
        app.extensions["httptrading"].close()


def test_an_order_filled_while_the_gateway_was_down_for_days_is_found(
    opend: OpenD, exchange: Exchange, tmp_path: Path
) -> None:
    """A crash on Friday and a start on Monday: today's list knows nothing of it."""
    exchange.pushes = False
    with gateway(opend, tmp_path) as trader, ThreadPoolExecutor(1) as pool:
        connected(trader)
        exchange.fault("place", FaultKind.ACCEPT_THEN_HANG)
        answer = pool.submit(trader.place, ORDER, key="friday")
        exchange.wait_for(lambda: exchange.orders)
        opend.logged_in = False  # nor is the order found before the end
        opend.cut()
        assert answer.result().code == "OUTCOME_UNKNOWN"
    (order,) = exchange.orders.values()
    order.epoch -= 3 * 86400
    exchange.fill(order.order_id, 12, "12.34")
    order.updated -= 3 * 86400
    opend.logged_in = True
    with gateway(opend, tmp_path) as trader:
        connected(trader)
        again = trader.place(ORDER, key="friday")
        assert again.ok and again.replayed and again["orderId"] == order.order_id, again
        assert trader.order(key="friday")["isFilled"] is True
    assert len(exchange.orders) == 1
