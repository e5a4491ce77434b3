"""The TWS simulator speaks the protocol: the real SDK connects, trades and is cut off."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from decimal import Decimal
from typing import Any

import pytest

from simulators.exchange import Exchange, ExchangePosition, FaultKind
from simulators.tws import Tws

SDK = "ib_insync" if importlib.util.find_spec("ib_insync") else "ib_async"
sdk: Any = importlib.import_module(SDK)


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


@pytest.fixture
def tws(exchange: Exchange) -> Iterator[Tws]:
    with Tws(exchange) as simulator:
        yield simulator


def run(tws: Tws, conversation: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Connects the real SDK and holds the conversation."""

    async def hold() -> None:
        ib = sdk.IB()
        await ib.connectAsync(tws.host, tws.port, clientId=5, timeout=60)
        try:
            await conversation(ib)
        finally:
            ib.disconnect()

    asyncio.run(hold())


async def until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit, "the SDK did not reach the awaited state"
        await asyncio.sleep(0.005)


def limit_order(**fields: Any) -> Any:
    return sdk.LimitOrder("BUY", 10, 100.5, account="DU1234567", tif="DAY", **fields)


def test_connecting_synchronises_account_positions_and_orders(tws: Tws, exchange: Exchange) -> None:
    exchange.positions.append(ExchangePosition("HK", "00700", "HKD", Decimal("100.5")))
    foreign = tws.place_elsewhere("AAPL", 10, "99.5", client_id=7, order_id=3)

    async def conversation(ib: Any) -> None:
        [position] = ib.positions()
        assert (position.contract.symbol, position.contract.currency) == ("700", "HKD")
        assert position.position == 100.5
        cash = {v.currency: v.value for v in ib.accountValues() if v.tag == "CashBalance"}
        assert cash["USD"] == "30877.499"
        assert ib.trades() == []
        [trade] = await ib.reqAllOpenOrdersAsync()
        assert (trade.order.clientId, str(trade.order.permId)) == (7, foreign.order_id)

    run(tws, conversation)


def test_an_order_lives_and_dies(tws: Tws, exchange: Exchange) -> None:
    async def conversation(ib: Any) -> None:
        contract = sdk.Stock("BRK B", "SMART", "USD")
        trade = ib.placeOrder(contract, limit_order(orderRef="mine"))
        await until(lambda: trade.order.permId)
        [order] = exchange.by_mark("mine")
        assert (order.order_id, order.ticker) == (str(trade.order.permId), "BRK.B")
        exchange.fill(order.order_id, 4, "100.25")
        await until(lambda: trade.orderStatus.filled == 4 and trade.fills)
        ib.cancelOrder(trade.order)
        await until(lambda: trade.orderStatus.status == "Cancelled")
        [done] = await ib.reqCompletedOrdersAsync(False)
        assert (done.order.permId, done.order.filledQuantity) == (trade.order.permId, 4)
        [fill] = await ib.reqExecutionsAsync()
        assert (fill.execution.shares, fill.execution.price) == (4, 100.25)

    run(tws, conversation)
    [wire] = exchange.received("place")
    assert (wire.fields["lmtPrice"], wire.fields["outsideRth"]) == ("100.5", "0")


def test_a_filled_order_is_listed_with_a_total_of_zero(tws: Tws) -> None:
    async def conversation(ib: Any) -> None:
        contract = sdk.Stock("AAPL", "SMART", "USD")
        trade = ib.placeOrder(contract, sdk.MarketOrder("BUY", 3, account="DU1234567"))
        await until(lambda: trade.orderStatus.status == "Filled")
        [done] = await ib.reqCompletedOrdersAsync(False)
        assert (done.order.totalQuantity or 0, done.order.filledQuantity) == (0, 3)

    run(tws, conversation)


def test_a_client_id_in_use_is_refused(tws: Tws) -> None:
    codes: list[int] = []

    async def conversation(ib: Any) -> None:
        second = sdk.IB()
        second.errorEvent += lambda request, code, text, contract: codes.append(code)
        attempt = asyncio.ensure_future(
            second.connectAsync(tws.host, tws.port, clientId=5, timeout=60)
        )
        await until(lambda: codes)
        assert not second.client.isReady()
        attempt.cancel()  # the SDK would wait for its time to pass
        with suppress(asyncio.CancelledError, TimeoutError, ConnectionError):
            await attempt
        assert not second.isConnected()

    run(tws, conversation)
    assert codes == [326]
    assert tws.connections == 2


def test_contracts_quotes_and_time(tws: Tws, exchange: Exchange) -> None:
    exchange.quote("US", "AAPL", latest=Decimal("201.25"))

    async def conversation(ib: Any) -> None:
        [details] = await ib.reqContractDetailsAsync(sdk.Stock("700", "SEHK", "HKD"))
        assert details.contract.primaryExchange == "SEHK"
        assert details.timeZoneId == "Hongkong"
        assert await ib.reqContractDetailsAsync(sdk.Stock("NOSUCH", "SMART", "USD")) == []
        assert len(await ib.reqContractDetailsAsync(sdk.Stock("TWIN", "SMART", "USD"))) == 2
        [apple] = await ib.qualifyContractsAsync(sdk.Stock("AAPL", "SMART", "USD"))
        [ticker] = await ib.reqTickersAsync(apple)
        assert (ticker.last, ticker.close, ticker.halted) == (201.25, 99, 0)
        assert (await ib.reqCurrentTimeAsync()).timestamp() == pytest.approx(time.time(), abs=60)

    run(tws, conversation)


def test_restart_keeps_port_and_orders(tws: Tws, exchange: Exchange) -> None:
    async def conversation(ib: Any) -> None:
        trade = ib.placeOrder(sdk.Stock("AAPL", "SMART", "USD"), limit_order())
        await until(lambda: trade.order.permId)
        perm_id, port = trade.order.permId, tws.port
        tws.restart()
        assert tws.port == port
        await until(lambda: not ib.isConnected())
        again = sdk.IB()
        await again.connectAsync(tws.host, tws.port, clientId=5, timeout=60)
        assert [each.order.permId for each in again.openTrades()] == [perm_id]
        again.disconnect()

    run(tws, conversation)


def test_faults(tws: Tws, exchange: Exchange) -> None:
    exchange.fault("place", FaultKind.REFUSE, text="201 no money")
    exchange.fault("place", FaultKind.ACCEPT_THEN_CUT)

    async def conversation(ib: Any) -> None:
        contract = sdk.Stock("AAPL", "SMART", "USD")
        errors: list[tuple[int, str]] = []
        ib.errorEvent += lambda request, code, text, about: errors.append((code, text))
        ib.placeOrder(contract, limit_order())
        await until(lambda: (201, "no money") in errors)
        ib.placeOrder(contract, limit_order(orderRef="lost"))
        await until(lambda: not ib.isConnected())

    run(tws, conversation)
    assert len(exchange.by_mark("lost")) == 1


def test_what_is_late_is_done_when_its_connection_ends(tws: Tws, exchange: Exchange) -> None:
    """It was read: no later connection finds the order missing and sees it appear afterwards."""
    exchange.fault("place", FaultKind.LATE, seconds=600)

    async def conversation(ib: Any) -> None:
        ib.placeOrder(sdk.Stock("AAPL", "SMART", "USD"), limit_order(orderRef="late"))
        await until(lambda: exchange.received("place"))
        assert exchange.by_mark("late") == []
        ib.disconnect()
        await until(lambda: exchange.by_mark("late"))

    run(tws, conversation)


def test_stopping_leaves_nothing(exchange: Exchange) -> None:
    simulator = Tws(exchange).start()
    threads = [thread for thread in threading.enumerate() if thread.name == "tws-simulator"]
    simulator.stop()
    simulator.stop()
    assert threads and not any(thread.is_alive() for thread in threads)
    assert exchange.on_change == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((simulator.host, simulator.port), 60)
