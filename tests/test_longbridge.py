"""LongBridge over the wire: the real SDK and our REST against a simulated LongPort."""

import asyncio
import base64
import itertools
import json
import os
import signal
import stat
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import psutil
import pytest

from acceptance.cases import BrokerAcceptance, FaultAcceptance, PushAcceptance
from acceptance.kit import Answer, Subject, Trader, wait_for
from httptrading import create_app
from httptrading.brokers.base import BaseBroker, Combination, Window
from httptrading.brokers.longbridge import LongBridge
from httptrading.brokers.longbridge_renewal import Account, Renewer
from httptrading.brokers.longbridge_token import TokenFile, read_token
from httptrading.brokers.paper import Paper
from httptrading.brokers.settings import InstanceSettings
from httptrading.model import OrderType
from simulators.exchange import Exchange, FaultKind
from simulators.longport import LongPort, Refusal, http_answer
from simulators.longport_wire import message as wire_message


@pytest.fixture(scope="module", autouse=True)
def no_proxies() -> Iterator[None]:
    """The SDK would go through one even to the loopback."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        yield


def token_file(folder: Path, token: str = "token-1", seconds: float = 60 * 86400) -> Path:
    """Writes it in one step: half a file is a bad one after two seconds."""
    path = folder / "token.toml"
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
    written = folder / "token.toml.being-written"
    written.write_text(f'token = "{token}"\nexpiry = {end}\nnote = "kept"\n')
    written.chmod(0o600)
    written.replace(path)
    return path


def broker(
    server: LongPort, folder: Path, *, read_seconds: float = 30.0, **changes: object
) -> LongBridge:
    """Reads have time, also on a machine that stands still for seconds."""
    arguments = {
        "app_key": "app-key",
        "app_secret": "app-secret",
        "token_file": str(folder / "token.toml"),
        "http_url": server.http_url,
        "quote_ws_url": server.quote_ws_url,
        "trade_ws_url": server.trade_ws_url,
    }
    made = LongBridge(arguments | changes)
    vars(made)["read_seconds"] = read_seconds  # the copies in the children carry it along
    return made


def jwt(**claims: object) -> str:
    """A token as LongPort makes them, unsigned."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in ({}, claims)]
    return f"m_{parts[0].decode().rstrip('=')}.{parts[1].decode().rstrip('=')}.sign"


class TestAcceptance(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    """The kit's cases."""

    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        folder = tmp_path_factory.mktemp("longbridge")
        token_file(folder)
        exchange = Exchange()
        with (
            LongPort(exchange) as server,
            Subject(broker(server, folder), folder / "data", exchange, server) as subject,
        ):
            yield subject


# --- life ---------------------------------------------------------------------------------------
ORDER = {
    "tradeType": "Securities",
    "ticker": "AAPL",
    "region": "US",
    "price": Decimal("12.34"),
    "qty": 12,
    "orderType": "Limit",
    "timeInForce": "DAY",
    "lifecycle": "ETH",
    "direction": "BUY",
}


STATUSES = {
    # LongPort's words → (cancelled, failed)
    **dict.fromkeys(("NotReported", "ReplacedNotReported", "ProtectedNotReported"), (False, False)),
    **dict.fromkeys(("VarietiesNotReported", "WaitToNew", "NewStatus"), (False, False)),
    **dict.fromkeys(("WaitToReplace", "PendingReplaceStatus", "ReplacedStatus"), (False, False)),
    **dict.fromkeys(("PartialFilledStatus", "FilledStatus"), (False, False)),
    **dict.fromkeys(("WaitToCancel", "PendingCancelStatus"), (False, False)),
    **dict.fromkeys(("CanceledStatus", "PartialWithdrawal"), (True, False)),
    **dict.fromkeys(("RejectedStatus", "ExpiredStatus"), (False, True)),
}


class Desk:
    """A running app with LongBridge instances and, at the end, one paper instance.

    Unless `windows` says otherwise, the rate windows are wide, so that looking again and again
    costs nothing. What must succeed has room on a machine that stands still for seconds.
    """

    def __init__(
        self,
        data_dir: Path,
        *brokers: BaseBroker,
        windows: Mapping[str, Window] | None = None,
        listing_delay: float = 0.2,
    ) -> None:
        self.brokers = [*brokers, Paper({})]
        for number, each in enumerate(self.brokers):
            if windows is None:
                vars(each)["windows"] = {name: Window(10_000, 1.0) for name in each.windows}
            elif each.windows:
                vars(each)["windows"] = dict(windows)
            each.instance_id = f"LongBridgeDesk{number:04d}"
            each.tokens = [f"longBridgeToken{number:04d}"]
            vars(each).setdefault("listing_delay", listing_delay)
            vars(each).setdefault("booked_within", 0.0)
        self._killed: set[int] = set()
        self.app = create_app(
            brokers=[
                InstanceSettings(each, deadline=30.0, connect_timeout=60.0) for each in self.brokers
            ],
            data_dir=data_dir,
        )

    def trader(self, number: int = 0) -> Trader:
        each = self.brokers[number]
        return Trader(self.app, each.instance_id, each.tokens[0])

    def served(self, number: int = 0, *, quotes: bool = False) -> Trader:
        """A trader whose instance serves reads."""
        trader = self.trader(number)
        wait_for(lambda: trader.cash().ok, "cash/state to be served")
        if quotes:
            wait_for(lambda: trader.quote("US", "AAPL").ok, "market/quote to be served")
        return trader

    def child(self, connection: str, number: int = 0) -> int | None:
        """The process id of an instance's child."""
        gateway = self.app.extensions["httptrading"]
        instance = gateway.instance(self.brokers[number].instance_id)
        lane = instance.workers[connection]._lane
        pid = lane._backend.pid if lane is not None else None
        assert pid is None or isinstance(pid, int)
        return pid

    def kill(self, connection: str, number: int = 0) -> int:
        """Kills an instance's child, one that was not killed before; its process id."""

        def found() -> int | None:
            pid = self.child(connection, number)
            return None if pid in self._killed else pid

        pid = wait_for(found, "a child to kill")
        self._killed.add(pid)
        os.kill(pid, signal.SIGKILL)
        return pid

    def replaced(self, connection: str, number: int = 0) -> None:
        """Waits until a killed child has a successor."""
        wait_for(
            lambda: self.child(connection, number) not in (None, *self._killed), "another child"
        )

    def __enter__(self) -> "Desk":
        return self

    def __exit__(self, *exception: object) -> None:
        self.app.extensions["httptrading"].close()


@pytest.fixture
def exchange() -> Exchange:
    found = Exchange()
    found.quote("US", "AAPL")
    return found


@pytest.fixture
def server(exchange: Exchange) -> Iterator[LongPort]:
    with LongPort(exchange) as server:
        yield server


PROMPT = 25.0
"""Seconds within which a request with a deadline of 1 s is answered on a machine that stands still
for seconds; what hangs for ever, or for the SDK's 30 s, takes longer."""


def at_once(works: list[Callable[[], Answer]]) -> list[Answer]:
    """Runs all of them at the same time."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result() for future in [pool.submit(work) for work in works]]


class TestWire:
    """What the simulator's record shows."""

    @pytest.mark.parametrize(
        "combination", sorted(LongBridge.combinations, key=str), ids=lambda one: str(one)
    )
    def test_every_field_of_every_kind_of_order(
        self, wire: tuple[Desk, Exchange], combination: Combination
    ) -> None:
        desk, exchange = wire
        order = ORDER | {
            "region": combination.region,
            "ticker": {"US": "BRK.B", "HK": "00700"}[combination.region],
            "orderType": combination.order_type.name,
            "timeInForce": combination.time_in_force.name,
            "lifecycle": combination.lifecycle.name,
            "direction": "SELL",
            "price": Decimal("200.005"),
        }
        if combination.order_type is OrderType.Market:
            del order["price"]
        before = len(exchange.received("place"))
        answer = desk.trader().place(order)
        assert answer.ok, answer
        [request] = exchange.received("place")[before:]
        expected = {
            "symbol": {"US": "BRK.B.US", "HK": "700.HK"}[combination.region],
            "order_type": {"Limit": "LO", "Market": "MO"}[combination.order_type.name],
            "side": "Sell",
            "submitted_quantity": "12",
            "time_in_force": {"DAY": "Day", "GTC": "GTC"}[combination.time_in_force.name],
            "path": "/v1/trade/order",
            "authorization": "token-1",
        }
        if combination.order_type is OrderType.Limit:
            expected["submitted_price"] = "200.005"
        if combination.region == "US":
            sessions = {"RTH": "RTH_ONLY", "ETH": "ANY_TIME", "OVERNIGHT": "OVERNIGHT"}
            expected["outside_rth"] = sessions[combination.lifecycle.name]
        mark = request.fields["remark"]
        assert request.fields == expected | {"remark": mark}
        assert mark and len(mark) <= 24
        assert exchange.by_mark(mark)[0].order_id == answer["orderId"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"region": "CN", "ticker": "600519"},
            {"region": "HK", "ticker": "00700", "lifecycle": "ETH"},
            {"orderType": "Market", "price": None, "lifecycle": "OVERNIGHT"},
            {"orderType": "Market", "price": None, "timeInForce": "GTC", "lifecycle": "RTH"},
        ],
    )
    def test_impossible_orders_are_not_sent(
        self, wire: tuple[Desk, Exchange], changes: dict[str, Any]
    ) -> None:
        desk, exchange = wire
        before = len(exchange.received("place"))
        order = {name: value for name, value in (ORDER | changes).items() if value is not None}
        answer = desk.trader().place(order)
        assert (answer.status, answer.code) == (422, "UNSUPPORTED")
        assert "It takes: " in answer["ex"]
        assert len(exchange.received("place")) == before

    @pytest.mark.parametrize("status", STATUSES)
    def test_pushes_and_queries_agree(
        self, wire: tuple[Desk, Exchange], wire_server: LongPort, status: str
    ) -> None:
        desk, exchange = wire
        trader = desk.served()
        wait_for(lambda: [c for c in wire_server.connected("trade") if c.topics], "the pushes")
        nodes = []
        for asked in (True, False):
            order_id = trader.placed(ORDER)
            wire_server.status_words[order_id] = status
            exchange.orders[order_id].reason = "its words"
            exchange.fill(order_id, 5, "12.30")
            if not asked and status != "ExpiredStatus":  # a push does not tell that it is the end
                exchange.forget(order_id)  # from now on only the push can have told
            node = trader.wait_order(order_id, filledQty=5)
            nodes.append({name: value for name, value in node.items() if name != "orderId"})
        queried, pushed = nodes
        assert queried == pushed
        canceled, failed = STATUSES[status]
        assert queried["isCanceled"] is canceled
        assert queried["errorReason"] == ("its words" if failed else "")
        assert queried["isCompleted"] is (canceled or failed)

    def test_an_order_until_cancelled_outlives_the_word_expired(
        self, wire: tuple[Desk, Exchange], wire_server: LongPort
    ) -> None:
        """LongBridge says it between two sessions (TraderAlice/OpenAlice#1126)."""
        desk, exchange = wire
        trader = desk.served()
        wait_for(lambda: [c for c in wire_server.connected("trade") if c.topics], "the pushes")
        order_ids = [trader.placed(ORDER | {"timeInForce": "GTC"}) for _ in range(2)]
        for order_id in order_ids:
            wire_server.status_words[order_id] = "ExpiredStatus"
            exchange.fill(order_id, 5, "12.30")  # pushes the word
            node = trader.wait_order(order_id, filledQty=5)
            assert (node["errorReason"], node["isCompleted"]) == ("", False)
        filled, cancelled = order_ids
        assert trader.cancel(cancelled).ok
        trader.wait_order(cancelled, isCanceled=False, isCompleted=False)  # still called Expired
        del wire_server.status_words[cancelled], wire_server.status_words[filled]
        trader.wait_order(cancelled, isCanceled=True)
        exchange.fill(filled, 7, "12.30")
        trader.wait_order(filled, isFilled=True)

    def test_quotes(self, wire: tuple[Desk, Exchange], wire_server: LongPort) -> None:
        desk, exchange = wire
        trader = desk.served(quotes=True)
        for region, ticker, symbol, currency in (
            ("CN", "000001", "000001.SZ", "CNY"),
            ("CN", "900901", "900901.SH", "USD"),
            ("HK", "80700", "80700.HK", "CNY"),
            ("HK", "00700", "700.HK", "HKD"),
            ("US", "BRK.B", "BRK.B.US", "USD"),
        ):
            exchange.quote(region, ticker, latest=Decimal("11.53"), epoch=1748409918.0)
            if currency == "CNY":
                wire_server.static_currencies[symbol] = "CNY"
            node = trader.quote(region, ticker)["quote"]
            assert (node["currency"], node["latest"]) == (currency, Decimal("11.53"))
            assert node["timestamp"] == 1748409918000
            assert exchange.received("quote")[-1].fields == {"symbols": [symbol]}
        for status in range(1, 11):
            wire_server.trade_statuses["000001.SZ"] = status
            assert trader.quote("CN", "000001")["quote"]["isTradable"] is False
        for ticker in ("920819", "700001"):
            assert trader.quote("CN", ticker).code in ("INVALID_REQUEST", "UNSUPPORTED")
        for region, ticker in (("US", "NONE"), ("HK", "09999")):
            answer = trader.quote(region, ticker)
            assert (answer.status, answer.code) == (422, "BROKER_REJECTED")

    def test_market_state_by_codes_or_sessions(
        self, wire: tuple[Desk, Exchange], wire_server: LongPort
    ) -> None:
        desk, _ = wire
        trader = desk.served(quotes=True)
        nodes = trader.market()["marketStatus"]["securities"]
        assert set(nodes) == {"US", "HK", "CN"}
        today = datetime.now(ZoneInfo("Asia/Shanghai")).weekday()
        if today >= 5:
            assert nodes["CN"]["unifiedStatus"] == "CLOSED"
        wire_server.market_codes = {"US": 207, "HK": 106, "CN": 105}
        desk.kill("quote")  # it had seen that there are no codes
        desk.replaced("quote")

        def look() -> dict[str, Any] | None:
            answer = trader.market()
            return answer["marketStatus"]["securities"] if answer.ok else None

        nodes = wait_for(look, "market/state to be served again")
        found = {region: (n["originStatus"], n["unifiedStatus"]) for region, n in nodes.items()}
        assert found == {
            "US": ("US_NIGHT", "OVERNIGHT"),
            "HK": ("NOON_CLOSING", "REST"),
            "CN": ("TRADING", "RTH"),
        }
        wire_server.market_codes = None

    def test_wait_to_cancel_and_partial_withdrawal(
        self, wire: tuple[Desk, Exchange], wire_server: LongPort
    ) -> None:
        desk, exchange = wire
        trader = desk.served()
        order_id = trader.placed(ORDER)
        exchange.fill(order_id, 5, "12.30")
        wire_server.hold_cancels = True
        assert trader.cancel(order_id).ok
        node = trader.order(order_id)
        assert (node["isCanceled"], node["isCompleted"], node["filledQty"]) == (False, False, 5)
        assert trader.cancel(order_id).ok or trader.cancel(order_id).status == 422
        exchange.cancel(order_id)
        node = trader.wait_order(order_id, isCanceled=True)
        assert (node["filledQty"], node["isFilled"], node["errorReason"]) == (5, False, "")
        wire_server.hold_cancels = False
        again = trader.cancel(order_id)
        assert (again.status, again.code) == (422, "BROKER_REJECTED")
        expired = trader.placed(ORDER)
        exchange.expire(expired, "the day is over")
        node = trader.wait_order(expired, isCompleted=True)
        assert node["errorReason"] == "the day is over"

    @pytest.fixture(scope="class")
    def wire_server(self) -> Iterator[LongPort]:
        exchange = Exchange()
        exchange.quote("US", "AAPL")
        with LongPort(exchange) as server:
            yield server

    @pytest.fixture(scope="class")
    def wire(
        self, tmp_path_factory: pytest.TempPathFactory, wire_server: LongPort
    ) -> Iterator[tuple[Desk, Exchange]]:
        folder = tmp_path_factory.mktemp("wire")
        token_file(folder)
        with Desk(folder / "data", broker(wire_server, folder)) as desk:
            desk.served()
            yield desk, wire_server.exchange


class TestNonsense:
    """Answers of LongPort that are not as documented."""

    def test_reads_of_another_shape_are_no_answer(
        self, server: LongPort, desk: Desk, exchange: Exchange
    ) -> None:
        trader = desk.served()
        order_id = trader.placed(ORDER)
        reads = {
            "cash": trader.cash,
            "positions": trader.positions,
            "order": partial(trader.state, order_id),
            "orders": trader.orders,
        }
        nonsense: list[Any] = [None, [], "no", {"list": [5], "orders": [5], "order_id": []}]
        for operation, ask in reads.items():
            for shape in nonsense:
                server.answers[operation] = lambda _, shape=shape: shape
                answer = ask()
                assert (answer.status, answer.code) == (504, "TIMEOUT"), (operation, shape, answer)
            del server.answers[operation]
            assert ask().ok

    def test_a_lost_order_is_found_in_a_row_that_cannot_be_read(
        self, server: LongPort, desk: Desk, exchange: Exchange
    ) -> None:
        """The settlement goes on, and the order does not count as not placed."""
        trader = desk.served()

        def spoilt(data: dict[str, Any]) -> dict[str, Any]:
            return data | {"orders": [row | {"quantity": "--"} for row in data["orders"]]}

        server.answers["orders"] = spoilt
        server.deaf_kinds.add("trade")  # no push tells of it
        exchange.fault("place", FaultKind.ACCEPT_THEN_CUT)
        assert trader.place(ORDER, key="lost").code == "OUTCOME_UNKNOWN"
        wait_for(lambda: trader.place(ORDER, key="lost").replayed, "the order to be found")
        assert len(exchange.orders) == 1
        assert trader.order(key="lost")["qty"] == 12

    def test_an_odd_id_of_a_new_order_is_not_told(
        self, server: LongPort, desk: Desk, exchange: Exchange
    ) -> None:
        """Under an id that no order has, a cancellation would be denied: the true one is found."""
        trader = desk.served()
        odd_ids: list[Any] = [float("nan"), True, "706388312699592704 中"]
        server.deaf_kinds.add("trade")  # no push tells of it
        for number, odd in enumerate(odd_ids):
            server.answers["place"] = lambda _, odd=odd: {"order_id": odd}
            answer = trader.place(ORDER, key=f"odd-{number}")
            assert (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN"), (odd, answer)
        true_ids = list(exchange.orders)
        for number, true_id in enumerate(true_ids):
            key = f"odd-{number}"
            wait_for(lambda key=key: trader.place(ORDER, key=key).replayed, "it to be found")
            assert trader.order(key=key)["orderId"] == true_id
        assert len(true_ids) == len(odd_ids) == len(exchange.orders)

    @pytest.mark.parametrize("requests", [2, 3])
    def test_a_new_order_that_longport_does_not_know_as_yet_is_not_denied(
        self, server: LongPort, desk: Desk, exchange: Exchange, requests: int
    ) -> None:
        """Neither at the second look nor later."""
        trader = desk.served()
        order_id = trader.placed(ORDER)
        server.unfamiliar = requests
        answer = trader.cancel(order_id)
        assert (answer.status, answer.code) == (422, "BROKER_REJECTED"), answer
        assert "602001" in answer["ex"]
        assert len(exchange.received("order")) == 2 and not server.unfamiliar
        assert trader.cancel(order_id).ok
        for unknown in ("1", "no-such-order"):
            assert trader.cancel(unknown).code == "ORDER_NOT_FOUND"

    def test_renminbi_is_asked_for_as_longport_names_it(
        self, server: LongPort, desk: Desk, exchange: Exchange
    ) -> None:
        exchange.cash["CNH"] = Decimal("500.5")
        trader = desk.served()
        for currency in ("CNY", "CNH"):
            node = trader.cash(currency)["cash"]
            assert (node["currency"], node["amount"]) == (currency, Decimal("500.5"))
            assert exchange.received("cash")[-1].fields["currency"] == "CNH"
        server.answers["cash"] = lambda data: {
            "list": [row | {"cash_infos": None} for row in data["list"]]
        }
        assert trader.cash("CNY").code == "TIMEOUT"

    def test_the_order_that_was_asked_for(
        self, server: LongPort, desk: Desk, exchange: Exchange
    ) -> None:
        trader = desk.served()
        first, second = trader.placed(ORDER), trader.placed(ORDER)
        other = server._order(exchange.orders[second])
        server.answers["order"] = lambda _: other
        assert trader.state(first).code == "TIMEOUT"
        assert trader.order(second)["orderId"] == second

    def test_the_quote_that_was_asked_for(
        self, server: LongPort, desk: Desk, exchange: Exchange
    ) -> None:
        trader = desk.served(quotes=True)
        exchange.quote("US", "MSFT", latest=Decimal("7.5"))

        def of(*symbols: str) -> bytes:
            return server._quotes(wire_message([(1, symbol) for symbol in symbols]))

        both = of("MSFT.US", "AAPL.US")
        latest = trader.quote("US", "AAPL")["quote"]["latest"]
        server.answers["quote"] = lambda _: both
        assert trader.quote("US", "AAPL")["quote"]["latest"] == latest
        for answer in (of("MSFT.US"), b""):
            server.answers["quote"] = lambda _, answer=answer: answer
            found = trader.quote("US", "AAPL")
            assert (found.status, found.code) == (422, "BROKER_REJECTED")
        for price in ("", "-", "0"):  # the SDK makes 0 of all of them
            row = wire_message([(1, "AAPL.US"), (2, price), (7, 1748409918)])
            server.answers["quote"] = lambda _, row=row: wire_message([(1, row)])
            found = trader.quote("US", "AAPL")
            assert (found.status, found.code) == (422, "BROKER_REJECTED")
            assert "no price" in found["ex"]

    def test_a_server_error_of_the_quotes_is_no_refusal(self, server: LongPort, desk: Desk) -> None:
        trader = desk.served(quotes=True)

        def fails(_: bytes) -> bytes:
            raise Refusal(301602, "server error")

        server.answers["quote"] = fails
        found = trader.quote("US", "AAPL")
        assert (found.status, found.code) == (504, "TIMEOUT")
        del server.answers["quote"]
        assert trader.quote("US", "AAPL").ok

    @pytest.mark.parametrize(
        ("status", "text", "remembered"),
        [
            (404, "404 page not found", True),
            (404, '{"message":"no Route matched with those values"}', True),
            (404, '{"code":404001,"message":"no such api"}', True),
            (400, '{"code":602001,"message":"param check failed"}', True),
            (403, "<html>", False),
            (500, '{"code":500000,"message":"internal"}', False),
            (200, '{"code":0,"data":null}', False),
            (200, '{"code":0,"data":{"market_time":[{}]}}', False),
            (401, '{"code":401003,"message":"token expired"}', False),
            (429, '{"code":429002,"message":"limited"}', False),
        ],
    )
    def test_market_state_without_the_request_for_it(
        self,
        server: LongPort,
        desk: Desk,
        exchange: Exchange,
        status: int,
        text: str,
        remembered: bool,
    ) -> None:
        """The sessions tell, the connection stays, and what may be there later is asked again."""
        server.market_codes = {"US": 207, "HK": 106, "CN": 105}
        server.answers["status"] = lambda _: http_answer(status, text)
        trader = desk.served(quotes=True)
        child = desk.child("quote")
        for _ in range(2):
            answer = trader.market()
            assert answer.ok, answer
        assert len(exchange.received("status")) == (1 if remembered else 2)
        assert desk.child("quote") == child
        del server.answers["status"]
        node = trader.market()["marketStatus"]["securities"]["US"]
        assert (node["originStatus"] == "US_NIGHT") is not remembered

    def test_market_state_while_rest_cannot_be_reached(
        self, server: LongPort, tmp_path: Path, exchange: Exchange
    ) -> None:
        """The sessions tell, and quotes go on."""
        token_file(tmp_path)
        with LongPort(exchange) as sockets:
            sockets._passwords = server._passwords
            server.market_codes = {"US": 202}
            urls = {"quote_ws_url": sockets.quote_ws_url, "trade_ws_url": sockets.trade_ws_url}
            with Desk(tmp_path / "data", broker(server, tmp_path, **urls)) as desk:
                trader = desk.served(quotes=True)
                assert trader.market().ok
                child = desk.child("quote")
                server.stop()
                answer = trader.market()
                assert answer.ok, answer
                assert trader.quote("US", "AAPL").ok
                assert desk.child("quote") == child

    def test_every_order_of_a_history_is_read(
        self, server: LongPort, tmp_path: Path, exchange: Exchange
    ) -> None:
        """An answer that is full has any of the orders, in any order (longbridge/openapi#143)."""
        order = {"symbol": "AAPL.US", "order_type": "LO", "side": "Buy", "submitted_price": "1"}
        order |= {"submitted_quantity": "1", "time_in_force": "GTC"}
        ids = [server._place(order)["order_id"] for _ in range(7)]
        for number, order_id in enumerate(ids):
            exchange.orders[order_id].epoch -= (10 + number % 5) * 86400

        def page(data: dict[str, Any]) -> dict[str, Any]:
            if "has_more" not in data:
                return data
            rows = data["orders"]
            if len(rows) > 3:
                return {"has_more": True, "orders": [rows[1], rows[3], rows[0]]}
            return {"has_more": False, "orders": rows}

        server.answers["orders"] = page
        token_file(tmp_path)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            answer = desk.served().orders()
        assert {node["orderId"] for node in answer["orders"]} == set(ids)

    def test_order_ids_need_not_be_digits(
        self, server: LongPort, desk: Desk, exchange: Exchange
    ) -> None:
        server._ids = map("LB-{}_x".format, itertools.count())  # type: ignore[assignment]
        trader = desk.served()
        order_id = trader.placed(ORDER)
        assert trader.cancel(order_id).ok
        assert trader.order(order_id)["isCanceled"]

    def test_pushes_come_although_a_row_of_today_cannot_be_read(
        self, server: LongPort, desk: Desk, exchange: Exchange
    ) -> None:
        trader = desk.served()
        first, second = trader.placed(ORDER), trader.placed(ORDER)
        pushing = wait_for(lambda: [c for c in server.connected("trade") if c.topics], "the pushes")

        def spoilt(data: dict[str, Any]) -> dict[str, Any]:
            return {
                "orders": [row | {"status": 5, "quantity": "-"} for row in data["orders"][:1]]
                + data["orders"][1:]
            }

        server.answers["orders"] = spoilt
        desk.kill("push")
        wait_for(
            lambda: [c for c in server.connected("trade") if c.topics and c not in pushing],
            "the pushes again",
        )
        exchange.fault("order", FaultKind.REFUSE, times=100_000)
        for order_id in (first, second):
            exchange.fill(order_id, 12, "12.30")
            wait_for(
                lambda order_id=order_id: (
                    (a := trader.state(order_id)).ok and a["order"]["isFilled"]
                ),
                "the fill to be pushed",
            )

    @pytest.fixture
    def desk(self, server: LongPort, tmp_path: Path) -> Iterator[Desk]:
        token_file(tmp_path)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            yield desk


class TestLimits:
    """What LongPort allows goes through at once, what it forbids never reaches it."""

    TRADE = ("place", "cancel", "order", "orders", "fills", "cash", "positions")

    def test_what_longport_documents(self) -> None:
        assert LongBridge.windows == {
            "trade": Window(30, 30.0, gap=0.02, kept=2, kept_for_orders=4),
            "quote": Window(10, 1.0),
        }

    def test_ten_orders_at_once(self, exchange: Exchange, server: LongPort, tmp_path: Path) -> None:
        token_file(tmp_path)
        limits = LongBridge.windows
        with Desk(tmp_path / "data", broker(server, tmp_path), windows=limits) as desk:
            desk.served()
            began = time.monotonic()
            answers = at_once([partial(desk.trader().place, ORDER) for _ in range(10)])
            seconds = time.monotonic() - began
        assert all(answer.ok for answer in answers), answers
        assert len(exchange.received("place")) == 10
        assert exchange.least_gap(["place"]) >= 0.0199
        print(f"10 orders at once: {seconds:.3f} s")
        assert seconds < 25, "0.5 s on an idle machine; 30 s if one had waited for the window"

    def test_thirty_trade_calls_in_thirty_seconds(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        token_file(tmp_path)
        # The window is so long that none of it passes while the test runs, however slowly.
        limits = {**LongBridge.windows, "trade": replace(LongBridge.windows["trade"], seconds=600)}
        with Desk(tmp_path / "data", broker(server, tmp_path), windows=limits) as desk:
            trader = desk.served()
            # The pushes' list of today's orders, and the three of a listing after the connect.
            exchange.wait_for(lambda: len(exchange.received("orders")) >= 4)
            order_id = trader.placed(ORDER)
            answers = at_once([partial(desk.trader().place, ORDER) for _ in range(40)])
            refused = [answer for answer in answers if not answer.ok]
            # A foreseen slot may go to a listing after another connect: then it is a TIMEOUT.
            codes = [(answer.status, answer.code) for answer in refused]
            assert set(codes) <= {(429, "RATE_LIMITED"), (504, "TIMEOUT")}
            assert codes.count((429, "RATE_LIMITED")) >= len(codes) - 5
            assert all(int(a.headers["Retry-After"]) >= 1 for a in refused if a.status == 429)
            assert len(refused) >= 12
            assert trader.cancel(order_id).ok, "slots are kept for cancels"
        assert 25 <= exchange.most_in(600, self.TRADE) <= 30

    def test_the_pushes_list_keeps_the_gap_to_other_calls(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        token_file(tmp_path)
        gap = 0.5
        limits = {"trade": Window(10_000, 1.0, gap=gap), "quote": Window(10_000, 1.0)}

        def lists() -> list[float]:
            asked = exchange.received("orders")
            return [each.time for each in asked if each.fields["path"].endswith("/today")]

        with Desk(tmp_path / "data", broker(server, tmp_path), windows=limits) as desk:
            trader = desk.served()
            for _ in range(3):
                before = len(lists())
                desk.kill("push")
                while len(lists()) == before:
                    assert trader.cash().ok
                    with exchange.changed:  # so that now and then there is room for the list
                        exchange.changed.wait_for(lambda known=before: len(lists()) > known, gap)
        times = sorted(each.time for each in exchange.requests if each.operation in self.TRADE)
        least = min(time - times[times.index(time) - 1] for time in lists()[1:])
        # When it arrives: a busy machine moves the one and the other.
        assert least > 0.7 * gap

    def test_ten_quotes_a_second(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        token_file(tmp_path)
        server.quote_rate = (100, 100)  # the SDK's own limiter stays out of the way
        tickers = [f"AA{letter}" for letter in "ABCDEFGHIJKLMNOPQRST"]
        for ticker in tickers:
            exchange.quote("US", ticker)
        limits = LongBridge.windows
        with Desk(tmp_path / "data", broker(server, tmp_path), windows=limits) as desk:
            desk.served(quotes=True)
            works = [partial(desk.trader().quote, "US", ticker) for ticker in tickers]
            answers = at_once(works)
        assert all(answer.ok for answer in answers), answers
        assert exchange.most_in(1, ["quote", "static", "days", "market"]) <= 10

    @pytest.mark.parametrize("text", ["bare", "json"])
    def test_both_forms_of_429(
        self, exchange: Exchange, server: LongPort, tmp_path: Path, text: str
    ) -> None:
        token_file(tmp_path)
        limits = LongBridge.windows
        with Desk(tmp_path / "data", broker(server, tmp_path), windows=limits) as desk:
            trader = desk.served()
            for operation, ask in (
                ("place", partial(trader.place, ORDER, key="limited")),
                ("positions", trader.positions),
            ):
                before = len(exchange.received(operation))
                exchange.fault(operation, FaultKind.RATE_LIMIT, text=text)
                answer = ask()
                assert (answer.status, answer.code) == (429, "RATE_LIMITED"), answer
                assert len(exchange.received(operation)) == before + 1
            assert trader.place(ORDER, key="limited").ok
        assert len(exchange.orders) == 1


class TestToken:
    """The token file's life."""

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (None, "does not exist"),
            ("token =", "is not TOML"),
            ('token = "token-1"\nexpiry = 2020-01-01T00:00:00Z\n', "expired at 2020-01-01"),
            (f'token = "{jwt(ak="other")}"\nexpiry = 2099-01-01\n', "another LongBridge app key"),
            ('token = "unknown"\nexpiry = 2099-01-01\n', "no longer accepts the token"),
        ],
    )
    def test_a_bad_file_is_said_and_a_repaired_one_taken(
        self, server: LongPort, tmp_path: Path, text: str | None, words: str
    ) -> None:
        path = tmp_path / "token.toml"
        if text is not None:
            path.write_text(text)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            trader = desk.trader()

            def refused() -> Answer | None:
                answer = trader.cash(timeout=5)
                return answer if words in str(answer["ex"]) else None

            answer = wait_for(refused, words)
            assert (answer.status, answer.code) == (503, "BROKER_UNAVAILABLE")
            assert "m_" not in answer["ex"]
            assert trader.ping()["pong"] is False
            assert desk.trader(-1).cash().ok, "the other instance does not mind"
            token_file(tmp_path)
            desk.served()
            assert trader.ping()["pong"] is True

    def test_a_file_that_goes_bad_while_it_is_used(self, server: LongPort, tmp_path: Path) -> None:
        path = token_file(tmp_path)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            trader = desk.served(quotes=True)
            path.write_text("token =")
            for ask in (trader.cash, partial(trader.quote, "US", "AAPL")):
                wait_for(lambda ask=ask: "is not TOML" in str(ask()["ex"]), "the bad file")
            token_file(tmp_path)
            desk.served(quotes=True)

    def test_it_is_renewed_once_by_all_who_share_it(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        path = token_file(tmp_path, seconds=3600)
        path.chmod(0o640)
        server.grant_seconds = 30 * 86400  # less than what was asked for
        both = [broker(server, tmp_path, auto_refresh_token=True) for _ in range(2)]
        with Desk(tmp_path / "data", *both) as desk:
            for number in range(2):
                desk.served(number, quotes=True)
            exchange.wait_for(lambda: exchange.received("refresh"))
            wait_for(lambda: read_token(path, "app-key").text != "token-1", "the new token on disk")
            token = read_token(path, "app-key")
            assert list(server.tokens) == [token.text]
            assert abs(token.expiry - server.tokens[token.text]) <= 1, "the end that was granted"
            assert tomllib.loads(path.read_text())["note"] == "kept"
            assert stat.S_IMODE(path.stat().st_mode) == 0o640

            def all_new() -> bool:
                latest = {
                    operation: exchange.received(operation)[-1].fields["authorization"]
                    for operation in ("otp", "cash")
                }
                return set(latest.values()) == {token.text} and (
                    len(server.connected("quote")) == len(server.connected("trade")) == 2
                )

            for number in range(2):
                desk.served(number, quotes=True)
            wait_for(all_new, "every connection with the new token")
            assert desk.trader().place(ORDER).ok
        assert len(exchange.received("refresh")) == 1

    @pytest.mark.parametrize(
        ("kind", "dead"),
        [
            (FaultKind.REFUSE, False),
            (FaultKind.RATE_LIMIT, False),
            (FaultKind.HANG, False),
            (FaultKind.CUT, False),
            (FaultKind.GARBAGE, False),
            (FaultKind.ACCEPT_THEN_CUT, True),
        ],
    )
    def test_a_failing_renewal_stops_nothing_while_the_old_token_lives(
        self, exchange: Exchange, server: LongPort, tmp_path: Path, kind: FaultKind, dead: bool
    ) -> None:
        path = token_file(tmp_path, seconds=3600)
        exchange.fault("refresh", kind)
        each = broker(server, tmp_path, auto_refresh_token=True)
        with Desk(tmp_path / "data", each) as desk:
            trader = desk.trader()
            trader.ping()  # the gateway starts with the first request
            exchange.wait_for(lambda: exchange.received("refresh"))
            if not dead:
                assert desk.served().place(ORDER).ok
                assert read_token(path, "app-key").text == "token-1"
            else:
                found = wait_for(
                    lambda: (lambda a: a if "no longer accepts" in str(a["ex"]) else None)(
                        trader.cash()
                    ),
                    "the dead token to be said",
                )
                assert found.code == "BROKER_UNAVAILABLE"
                token_file(tmp_path, token=next(iter(server.tokens)))
                assert desk.served().place(ORDER).ok
            assert trader.cash().ok
        assert len(exchange.received("refresh")) == 1, "no storm"

    def test_a_renewed_token_without_its_end_is_kept(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        path = token_file(tmp_path, seconds=3600)
        server.answers["refresh"] = lambda data: {"token": data["token"]}
        each = broker(server, tmp_path, auto_refresh_token=True)
        with Desk(tmp_path / "data", each) as desk:
            desk.trader().ping()
            wait_for(lambda: read_token(path, "app-key").text != "token-1", "the new token on disk")
            token = read_token(path, "app-key")
            assert list(server.tokens) == [token.text]
            assert token.remaining() > 80 * 86400, "as long as it was asked for"
            assert desk.served().place(ORDER).ok

    @pytest.mark.parametrize("end", ["stop", "kill"])
    def test_a_slow_renewal_outlives_the_service(
        self, exchange: Exchange, server: LongPort, tmp_path: Path, end: str
    ) -> None:
        """The old token is dead, and the answer with the new one is still to come."""
        path = token_file(tmp_path, seconds=3600)
        exchange.fault("refresh", FaultKind.LATE, seconds=600)
        each = broker(server, tmp_path, auto_refresh_token=True)
        with Desk(tmp_path / "data", each) as desk:
            desk.trader().ping()
            wait_for(lambda: "token-1" not in server.tokens, "the old token's end")
            if end == "kill":
                desk.kill("trade")
        assert read_token(path, "app-key").text == "token-1"
        server.let_go.set()
        wait_for(lambda: read_token(path, "app-key").text != "token-1", "the new token on disk")
        assert list(server.tokens) == [read_token(path, "app-key").text]

    def test_a_renewed_token_that_nobody_is_left_to_keep_is_written_somehow(
        self,
        exchange: Exchange,
        server: LongPort,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        path = token_file(tmp_path, seconds=3600)
        exchange.fault("refresh", FaultKind.LATE, seconds=600)
        each = broker(server, tmp_path, auto_refresh_token=True)
        with Desk(tmp_path / "data", each) as desk:
            desk.trader().ping()
            wait_for(lambda: "token-1" not in server.tokens, "the old token's end")
            [renewal] = psutil.Process(desk.child("trade")).children()
            obstacle = tmp_path / f".token.toml.{renewal.pid}.new"
            obstacle.mkdir()
        server.let_go.set()
        wait_for(lambda: "could not be written" in capfd.readouterr().err, "a vain attempt")
        obstacle.rmdir()
        wait_for(lambda: read_token(path, "app-key").text != "token-1", "the new token on disk")

    def test_a_killed_renewal_is_said(
        self,
        exchange: Exchange,
        server: LongPort,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Between LongPort's answer and the file: nobody has the new token."""
        file = TokenFile(token_file(tmp_path, seconds=3600), "app-key")
        exchange.fault("refresh", FaultKind.LATE, seconds=600)
        account = Account("app-key", "app-secret", server.http_url)
        renewer = Renewer(file, account, renews=True)

        async def renew() -> None:
            others = psutil.Process().children()
            await renewer.look()
            while "token-1" in server.tokens:
                await asyncio.sleep(0.01)
            [process] = set(psutil.Process().children()) - set(others)
            process.kill()
            await renewer.finish(60.0)

        asyncio.run(renew())
        assert "token died (-9)" in caplog.text
        assert not renewer.holds_the_only_token

    def test_nothing_is_renewed_unasked(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        token_file(tmp_path, seconds=3600)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            desk.served(quotes=True)
        assert not exchange.received("refresh")

    def test_a_new_token_that_cannot_be_written_is_used_and_written_later(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        path = token_file(tmp_path, seconds=3600)
        exchange.fault("refresh", FaultKind.LATE, seconds=60)
        each = broker(server, tmp_path, auto_refresh_token=True)
        with Desk(tmp_path / "data", each) as desk:
            trader = desk.trader()
            trader.ping()
            exchange.wait_for(lambda: exchange.received("refresh"))
            # In the way of the file that they are about to write.
            writers = [psutil.Process(desk.child("trade"))]
            writers += writers[0].children()
            assert len(writers) == 2
            obstacles = [tmp_path / f".token.toml.{each.pid}.new" for each in writers]
            for obstacle in obstacles:
                obstacle.mkdir()
            server.let_go.set()
            wait_for(lambda: "token-1" not in server.tokens, "the old token's end")
            [new] = server.tokens

            def trades_with_the_new_one() -> bool:
                return trader.cash().ok and (
                    exchange.received("cash")[-1].fields["authorization"] == new
                )

            wait_for(trades_with_the_new_one, "the new token to be used")
            assert read_token(path, "app-key").text == "token-1"
            # The connection keeps it while the network is down.
            server.stop()
            wait_for(lambda: trader.cash().code == "BUSY", "an answer that nothing is reachable")
            refused = trader.place(ORDER, key="later")
            assert (refused.code, refused.error["outcome"]) == ("BUSY", "none")
            server.start()
            wait_for(trades_with_the_new_one, "the new token still to be used")
            placed = trader.place(ORDER, key="later")
            assert placed.ok and not placed.replayed, placed
            for obstacle in obstacles:
                obstacle.rmdir()
            wait_for(lambda: read_token(path, "app-key").text == new, "the new token on disk")
        assert len(exchange.received("refresh")) == 1

    def test_an_old_token_in_a_folder_that_cannot_be_written_is_not_renewed(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        """Its answer could not be kept, and the old token would be dead."""
        folder = tmp_path / "locked"
        folder.mkdir()
        path = token_file(folder, seconds=3600)
        (folder / ".token.toml.lock").mkdir()  # also root cannot open this for writing
        each = broker(server, folder, auto_refresh_token=True)
        with Desk(tmp_path / "data", each) as desk:
            desk.served(quotes=True)
            assert desk.trader().place(ORDER).ok
        assert not exchange.received("refresh")
        assert read_token(path, "app-key").text == "token-1"


class TestLife:
    """Silence, cuts, kills and limits of LongPort's side."""

    def test_four_hanging_requests_hurt_nobody(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        token_file(tmp_path)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            desk.served(quotes=True)
            other = desk.served(-1)

            def p99() -> float:
                answers = [other.cash() for _ in range(150)]
                assert all(answer.ok for answer in answers), answers
                return sorted(answer.seconds for answer in answers)[148]

            calm = min(p99(), p99())
            for operation in ("quote", "cash", "positions", "place"):
                exchange.fault(operation, FaultKind.HANG)
            before = len(exchange.received("quote"))
            with ThreadPoolExecutor(5) as pool:
                held = pool.submit(partial(desk.trader().quote, "US", "AAPL", timeout=30))
                exchange.wait_for(lambda: len(exchange.received("quote")) > before)
                works = [
                    partial(desk.trader().quote, "US", "AAPL", timeout=3),
                    partial(desk.trader().cash, timeout=3),
                    partial(desk.trader().positions, timeout=3),
                    partial(desk.trader().place, ORDER, timeout=3),
                ]
                futures = [pool.submit(work) for work in works]
                busy = min(p99(), p99())
                assert not held.done(), "the other instance did not wait for this one"
                answers = [future.result() for future in futures]
                exchange.clear_faults()
                server.cut()
            print(f"p99 of the other instance: {calm * 1000:.2f} ms, then {busy * 1000:.2f} ms")
            for answer in answers:
                assert answer.status in (504, 503), answer
                assert answer.seconds < 3 + 15, "3 s on an idle machine; 30 s if the SDK decided"
            desk.served(quotes=True)

    def test_a_hanging_read_delays_a_cancel_by_seconds_only(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        token_file(tmp_path)
        usual = LongBridge.read_seconds
        with Desk(tmp_path / "data", broker(server, tmp_path, read_seconds=usual)) as desk:
            trader = desk.served()
            order_id = trader.placed(ORDER)
            exchange.fault("positions", FaultKind.HANG)
            with ThreadPoolExecutor(1) as pool:
                reading = pool.submit(partial(desk.trader().positions, timeout=30))
                exchange.wait_for(lambda: exchange.received("positions"))
                assert trader.cancel(order_id).ok
                answer = reading.result()
            assert (answer.status, answer.code) == (504, "TIMEOUT")
            assert answer.seconds < 25, "5 s on an idle machine; 30 s if it kept its deadline"

    @pytest.mark.parametrize("connection", ["trade", "quote", "push"])
    def test_a_killed_child_is_replaced(
        self, exchange: Exchange, server: LongPort, tmp_path: Path, connection: str
    ) -> None:
        token_file(tmp_path)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            trader = desk.served(quotes=True)
            exchange.wait_for(lambda: exchange.received("subscribe"))
            pushing = server.connected("trade")
            desk.kill(connection)
            desk.replaced(connection)
            desk.served(quotes=True)
            order_id = trader.placed(ORDER)

            def pushes() -> bool:
                found = [each for each in server.connected("trade") if each.topics]
                return len(found) == 1 and (connection != "push" or found != pushing)

            wait_for(pushes, "the push connection")
            exchange.fill(order_id, 12, "12.30")
            trader.wait_order(order_id, isFilled=True)

    @pytest.mark.parametrize("kind", [FaultKind.HANG, FaultKind.ACCEPT_THEN_HANG])
    def test_killed_with_an_order_in_flight(
        self, exchange: Exchange, server: LongPort, tmp_path: Path, kind: FaultKind
    ) -> None:
        token_file(tmp_path)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            trader = desk.served()
            exchange.fault("place", kind)
            with ThreadPoolExecutor(1) as pool:
                placing = pool.submit(partial(desk.trader().place, ORDER, key="in-flight"))
                exchange.wait_for(lambda: exchange.received("place"))
                if kind is FaultKind.ACCEPT_THEN_HANG:
                    # LongPort lists it before anybody asks what became of it.
                    exchange.wait_for(lambda: exchange.orders)
                desk.kill("trade")
                answer = placing.result()
            assert (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN")

            def settled() -> bool:
                return trader.place(ORDER, key="in-flight").ok

            wait_for(settled, "the order to be settled or placed")
            desk.served()
            assert trader.order(key="in-flight")["qty"] == 12
        assert len(exchange.orders) == 1
        assert len(exchange.received("place")) == (2 if kind is FaultKind.HANG else 1)

    def test_booked_when_nobody_waits_any_more(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        """LongPort goes on with a request whose client has hung up; its own SDK waits for 30 s."""
        token_file(tmp_path)
        real = broker(server, tmp_path)
        vars(real)["booked_within"] = LongBridge.booked_within
        with Desk(tmp_path / "data", real) as desk:
            trader = desk.served()
            exchange.fault("place", FaultKind.SLOW, seconds=6.0)

            def placed() -> Answer | None:
                answer = trader.place(ORDER, key="slow", timeout=1)
                return answer if answer.ok else None

            assert wait_for(placed, "the order to be found").replayed
        assert len(exchange.orders) == len(exchange.received("place")) == 1

    def test_killed_again_and_again_while_trading(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        """Whatever moment it is killed at: each client that repeats its request ends with exactly
        one order."""
        token_file(tmp_path)
        keys = [f"order-{number}" for number in range(8)]
        # What a killed child had sent is at LongPort long before three of these delays are over,
        # also when the thread that reads it there stands still meanwhile.
        with Desk(tmp_path / "data", broker(server, tmp_path), listing_delay=1.0) as desk:
            desk.served()

            def insist(key: str) -> Answer:
                trader = desk.trader()
                return wait_for(
                    lambda: (lambda a: a if a.ok else None)(trader.place(ORDER, key=key)), key, 60
                )

            with ThreadPoolExecutor(len(keys)) as pool:
                placing = [pool.submit(insist, key) for key in keys]
                for number in (1, 3, 6):
                    exchange.wait_for(lambda n=number: len(exchange.received("place")) >= n, 60)
                    desk.kill("trade")
                ids = {future.result()["orderId"] for future in placing}
        assert ids == set(exchange.orders) and len(ids) == len(keys)
        marks = [order.mark for order in exchange.orders.values()]
        assert len(set(marks)) == len(keys)

    def test_silent_for_ever(self, exchange: Exchange, server: LongPort, tmp_path: Path) -> None:
        token_file(tmp_path)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            trader = desk.served(quotes=True)
            server.deaf = True
            server.cut()
            for ask in (trader.cash, partial(trader.quote, "US", "AAPL"), trader.market):
                answer = ask(timeout=1)
                assert answer.status in (503, 504) and answer.seconds < PROMPT, answer
            answer = trader.place(ORDER, key="silent", timeout=1)
            assert answer.status in (503, 504) and answer.seconds < PROMPT, answer
            assert trader.ping(timeout=1).seconds < PROMPT
            server.deaf = False
            server.cut()
            desk.served(quotes=True)
            wait_for(lambda: trader.place(ORDER, key="silent").ok, "the order to be placed")
        assert len(exchange.orders) == 1

    def test_no_connection_left(self, exchange: Exchange, server: LongPort, tmp_path: Path) -> None:
        """Trading goes on without quotes and pushes, and nobody storms."""
        token_file(tmp_path)
        server.connection_limit = 0
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            trader = desk.served()

            def said() -> bool:
                answer = trader.quote("US", "AAPL", timeout=1)
                return "no further connection" in str(answer["ex"])

            wait_for(said, "the limit to be said")
            order_id = trader.placed(ORDER)
            exchange.fill(order_id, 12, "12.30")
            trader.wait_order(order_id, isFilled=True)
            exchange.wait_for(lambda: len(exchange.received("otp")) >= 6, 120)
            attempts = [request.time for request in exchange.received("otp")]
            # One of the two connections has made three of the six, with growing pauses.
            assert attempts[5] - attempts[0] > 1, "no storm"
            assert not server.connects
            server.connection_limit = 10
            desk.served(quotes=True)

    def test_a_push_connection_that_broke_unseen(
        self, exchange: Exchange, server: LongPort, tmp_path: Path
    ) -> None:
        """What happened meanwhile is known without asking LongPort again."""
        token_file(tmp_path)
        with Desk(tmp_path / "data", broker(server, tmp_path)) as desk:
            trader = desk.served()
            order_id = trader.placed(ORDER)
            wait_for(lambda: server.connected("trade"), "the push connection")
            exchange.wait_for(lambda: exchange.received("subscribe"))
            server.deaf_kinds.add("trade")
            server.cut("trade")
            exchange.fill(order_id, 12, "12.30")
            server.deaf_kinds.clear()
            server.cut("trade")
            exchange.wait_for(lambda: len(exchange.received("subscribe")) >= 2)
            exchange.fault("order", FaultKind.REFUSE, times=100_000)

            def filled() -> bool:
                """The order's end is known without LongPort, or it would refuse to tell."""
                answer = trader.state(order_id)
                return answer.ok and answer["order"]["isFilled"]

            wait_for(filled, "the fill to be known")
            moments = [moment for moment, kind in server.connects if kind == "trade"]
            assert len(moments) <= 8 + 2 * (moments[-1] - moments[0]), "no storm"

    def test_refused_access_is_said(self, server: LongPort, tmp_path: Path) -> None:
        token_file(tmp_path)
        each = broker(server, tmp_path, app_secret="wrong")
        with Desk(tmp_path / "data", each) as desk:
            trader = desk.trader()
            answer = wait_for(
                lambda: (lambda a: a if "app_secret" in str(a["ex"]) else None)(
                    trader.cash(timeout=5)
                ),
                "the wrong secret to be said",
            )
            assert answer.code == "BROKER_UNAVAILABLE"
            assert "wrong" not in answer["ex"].replace("is wrong", "")


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="needs app_secret, token_file"):
        LongBridge({"app_key": "k"})
    with pytest.raises(ValueError, match="true or false"):
        LongBridge(
            {"app_key": "k", "app_secret": "s", "token_file": "t", "auto_refresh_token": "no"}
        )
    with pytest.raises(ValueError, match="no argument 'tokenfile'"):
        LongBridge({"app_key": "k", "app_secret": "s", "tokenfile": "t"})
    for name in ("app_key", "app_secret"):
        with pytest.raises(ValueError, match=f"{name} is of an account in LongBridge's US data"):
            LongBridge({"app_key": "k", "app_secret": "s", "token_file": "t", name: "us_k"})
        for wrong in ("k ", "k\r\nX: 1", "钥"):
            with pytest.raises(ValueError, match=f"LongBridge's {name} has a character"):
                LongBridge({"app_key": "k", "app_secret": "s", "token_file": "t", name: wrong})


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("http_url", "openapi.longportapp.com"),
        ("http_url", "htps://openapi.longportapp.com"),
        ("http_url", "wss://openapi.longportapp.com"),
        ("http_url", "https://"),
        ("http_url", "https://openapi.longportapp.com:99999"),
        ("http_url", "https://openapi.longportapp.com:0"),
        ("http_url", "https://openapi.longportapp.com?region=us"),
        ("http_url", "https://me:word@openapi.longportapp.com"),
        ("http_url", "https://openapi.longportapp.com "),
        ("http_url", "https://[::1"),
        ("quote_ws_url", "openapi-quote.longportapp.com/v2"),
        ("quote_ws_url", "https://openapi-quote.longportapp.com/v2"),
        ("trade_ws_url", "wss://"),
        ("trade_ws_url", 443),
    ],
)
def test_addresses_are_checked(name: str, url: object) -> None:
    scheme = "https" if name == "http_url" else "wss"
    with pytest.raises(ValueError, match=f"LongBridge's {name} must .* begins with {scheme}://"):
        LongBridge({"app_key": "k", "app_secret": "s", "token_file": "t", name: url})


def test_instances_of_one_account_share_their_limits(tmp_path: Path) -> None:
    arguments = {"app_key": "k", "app_secret": "s", "token_file": str(tmp_path / "t.toml")}
    one, other = LongBridge(arguments), LongBridge({**arguments, "auto_refresh_token": True})
    assert one.account_key() == other.account_key()
    paper = LongBridge({**arguments, "token_file": "/u.toml"})  # its token is its account's own
    assert one.window_key("trade") == other.window_key("trade") != paper.window_key("trade")
    assert one.window_key("quote") == paper.window_key("quote")
    slash = LongBridge({**arguments, "http_url": "https://openapi.longportapp.com/"})
    assert one.window_key("quote") == slash.window_key("quote")
    another = LongBridge({**arguments, "app_key": "l"})
    assert one.window_key("quote") != another.window_key("quote")
