"""The simulated Tiger, driven by the real SDK as its makers meant it to be used."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tigeropen.common.consts import OrderStatus as SdkStatus
from tigeropen.common.exceptions import ApiException, ResponseException
from tigeropen.common.util.contract_utils import stock_contract
from tigeropen.push.push_client import PushClient
from tigeropen.quote.quote_client import QuoteClient
from tigeropen.tiger_open_config import TigerOpenClientConfig
from tigeropen.trade.trade_client import TradeClient

from simulators.exchange import Exchange, ExchangePosition, FaultKind
from simulators.tiger_gateway import CLIENT_KEYS, Spoil, TigerGateway, self_signed_certificate


@pytest.fixture
def exchange() -> Exchange:
    exchange = Exchange()
    exchange.quote("US", "AAPL", latest=Decimal("227.18"))
    exchange.positions.append(ExchangePosition("US", "AAPL", "USD", Decimal("0.00773")))
    return exchange


@pytest.fixture
def gateway(exchange: Exchange) -> Iterator[TigerGateway]:
    logging.getLogger("tiger_openapi").setLevel(logging.CRITICAL + 1)
    with TigerGateway(exchange, accounts=("12345678", "U1234567")) as gateway:
        yield gateway


@pytest.fixture
def config(gateway: TigerGateway, tmp_path: Path) -> TigerOpenClientConfig:
    config = TigerOpenClientConfig(enable_dynamic_domain=False, props_path=str(tmp_path))
    config.tiger_id, config.account = gateway.tiger_id, gateway.accounts[0]
    config.private_key = CLIENT_KEYS.private_base64
    config.server_url = config.quote_server_url = gateway.server_url
    config.tiger_public_key = gateway.public_key
    config.license, config.retry_max_tries, config.timeout = "TBNZ", 0, 60
    return config


@pytest.fixture
def client(config: TigerOpenClientConfig) -> TradeClient:
    return TradeClient(config)


def place(client: TradeClient, **fields: Any) -> Any:
    contract = stock_contract("AAPL", "USD")
    order = client.create_order("12345678", contract, "BUY", "LMT", 2, limit_price=200.01, **fields)
    order.id = client.place_order(order)
    return order


def test_an_order_from_reservation_to_fill(client: TradeClient, exchange: Exchange) -> None:
    order = place(client, user_mark="mark-1", outside_rth=False, time_in_force="DAY")
    taken = exchange.orders[str(order.id)]
    assert order.id > 2**53
    assert (taken.price, taken.qty, taken.mark) == (Decimal("200.01"), 2, "mark-1")
    assert taken.wire["order_id"] == order.order_id
    exchange.fill(taken.order_id, 1, "200")
    seen = client.get_order(id=order.id)
    assert (seen._status, seen.filled, seen.user_mark) == (SdkStatus.HELD, 1, "mark-1")
    assert [t.filled_quantity for t in client.get_transactions(order_id=order.id)] == [1]
    assert client.cancel_order(id=order.id) == order.id
    assert client.get_order(id=order.id)._status is SdkStatus.CANCELLED


def test_a_reserved_number_places_once(client: TradeClient, exchange: Exchange) -> None:
    order = place(client)
    with pytest.raises(ApiException) as refused:
        client.place_order(order)
    assert refused.value.code == 1100
    assert len(exchange.orders) == 1


def test_pages_of_orders(client: TradeClient) -> None:
    ids = {place(client).id for _ in range(3)}
    first = client.get_orders(limit=2, page_token="")
    rest = client.get_orders(limit=2, page_token=first.next_page_token)
    assert {order.id for order in first.result + rest.result} == ids
    assert len(first.result) == 2 and not rest.next_page_token


def test_money_and_holdings(client: TradeClient, exchange: Exchange) -> None:
    assets = client.get_prime_assets(base_currency="USD")
    assert assets.segments["S"].currency_assets["HKD"].cash_available_for_trade == 1000.5
    (account,) = client.get_assets(account="U1234567", market_value=True)
    assert account.summary.available_funds == 30877.499
    assert account.market_value("HKD").cash_balance == 1000.5
    (position,) = client.get_positions()
    assert (position.quantity, position.position_scale) == (773, 5)
    with pytest.raises(ApiException):
        client.get_prime_assets(account="U1234567")


def test_quotes_belong_to_one_device(config: TigerOpenClientConfig, gateway: TigerGateway) -> None:
    quotes = QuoteClient(config, is_grab_permission=False)
    with pytest.raises(ApiException, match="permission denied"):
        quotes.get_stock_briefs(["AAPL"])
    assert quotes.grab_quote_permission()
    assert quotes.get_stock_briefs(["AAPL"])["latest_price"][0] == 227.18
    gateway.take_quotes_away()
    with pytest.raises(ApiException, match="permission denied"):
        quotes.get_stock_briefs(["AAPL"])
    states = {state.market: state.trading_status for state in quotes.get_market_status()}
    assert states == gateway.market_states


def test_signatures_of_both_sides(config: TigerOpenClientConfig, gateway: TigerGateway) -> None:
    client = TradeClient(config)
    gateway.spoil("ping", Spoil.WRONGLY_SIGNED)
    with pytest.raises(ResponseException):
        client.get_managed_accounts()
    assert len(client.get_managed_accounts()) == 2
    config.tiger_id = "20159999"
    with pytest.raises(ApiException, match="developer information"):
        client.get_managed_accounts()


def test_limits_and_faults(
    client: TradeClient, config: TigerOpenClientConfig, gateway: TigerGateway, exchange: Exchange
) -> None:
    quotes = QuoteClient(config, is_grab_permission=False)
    for _ in range(10):
        quotes.get_market_status()
    with pytest.raises(ResponseException) as limited:
        quotes.get_market_status()
    assert limited.value.status == 429
    gateway.rate_limit_form = "code"
    with pytest.raises(ApiException, match="market_state, up to 10 times"):
        quotes.get_market_status()
    exchange.fault("positions", FaultKind.GARBAGE)
    with pytest.raises(ValueError):
        client.get_positions()
    exchange.fault("place", FaultKind.ACCEPT_THEN_CUT)
    with pytest.raises(Exception, match="request failed"):
        place(client)
    assert len(exchange.orders) == 1
    gateway.spoil("positions", Spoil.SERVER_ERROR)
    with pytest.raises(ResponseException):
        client.get_positions()
    config.timeout, gateway.deaf = 1, True
    with pytest.raises(Exception, match="timed out"):
        client.get_positions()
    exchange.wait_for(lambda: len(exchange.received("positions")) >= 3)  # the last one given up
    assert len(exchange.received("positions")) == 3


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_push_and_its_one_connection(exchange: Exchange, tmp_path: Path, tls: bool) -> None:
    certificate = self_signed_certificate(tmp_path) if tls else None
    connected, kicked, changed = threading.Event(), threading.Event(), threading.Event()
    orders: list[Any] = []

    def told(order: Any) -> None:
        orders.append(order)
        changed.set()

    def listener(gateway: TigerGateway) -> PushClient:
        push = PushClient("127.0.0.1", gateway.push_port, use_ssl=tls)
        push.connect_callback = lambda frame: connected.set()
        push.disconnect_callback = lambda: None
        push.kickout_callback = lambda frame: kicked.set()
        push.order_changed = told
        push.connect(gateway.tiger_id, CLIENT_KEYS.private_base64)
        assert connected.wait(60)
        return push

    with TigerGateway(exchange, push_certificate=certificate) as gateway:
        first = listener(gateway)
        first.subscribe_order(account="12345678")
        exchange.wait_for(lambda: exchange.received("subscribe"))
        placed = gateway._order_of(
            {
                "account": "12345678",
                "symbol": "AAPL",
                "currency": "USD",
                "sec_type": "STK",
                "action": "BUY",
                "order_type": "LMT",
                "limit_price": 1.5,
                "total_quantity": 111,
                "total_quantity_scale": 2,
            }
        )
        exchange.place(placed)
        assert changed.wait(60)
        assert orders[0].id == int(placed.order_id) and orders[0].status == "HELD"
        assert (orders[0].totalQuantity, orders[0].totalQuantityScale) == (111, 2)
        connected.clear()
        second = listener(gateway)
        assert kicked.wait(60)
        assert len(gateway.push_sessions) == 1
        for push in (first, second):
            push.client._connection.transport.disconnect_socket()
            push.client.callback_executor.shutdown(wait=False)


def test_the_ports_are_kept_over_a_restart(exchange: Exchange) -> None:
    gateway = TigerGateway(exchange)
    with gateway:
        ports = gateway.http_port, gateway.push_port
    with gateway:
        assert (gateway.http_port, gateway.push_port) == ports
