"""Paper passes the cases every broker passes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest

from acceptance.cases import BrokerAcceptance
from acceptance.kit import Subject, wait_for
from httptrading.brokers import gateway, paper, paper_quotes
from httptrading.brokers.base import BaseBroker
from httptrading.brokers.paper import INITIAL_CASH, Paper
from httptrading.brokers.paper_exchange import (
    CASH,
    HOLDINGS,
    NO_FEES,
    PaperExchange,
    PaperOrder,
    Status,
)
from httptrading.brokers.paper_market import AlwaysOpen
from httptrading.brokers.registry import broker_register
from httptrading.brokers.settings import InstanceSettings
from httptrading.errors import Rejected
from httptrading.model import CURRENCIES, Contract, Quote
from simulators.exchange import (
    Exchange,
    ExchangeFill,
    ExchangeOrder,
    ExchangePosition,
    ExchangeQuote,
    OrderStatus,
)

STATUS = {
    Status.WORKING: OrderStatus.WORKING,
    Status.FILLED: OrderStatus.FILLED,
    Status.CANCELED: OrderStatus.CANCELED,
    Status.REJECTED: OrderStatus.REJECTED,
    Status.EXPIRED: OrderStatus.EXPIRED,
}


class WatchedPaper(Paper):
    """Paper that counts what reaches it."""

    received: ClassVar[list[str]] = []

    async def place_order(self, *arguments: Any, **keywords: Any) -> str:
        self.received.append("place")
        return await super().place_order(*arguments, **keywords)

    async def cancel_order(self, order_id: str) -> None:
        self.received.append("cancel")
        await super().cancel_order(order_id)


class NoPrices:
    """Nothing trades by itself on the script's side."""

    def latest(self, region: str, ticker: str, epoch: float) -> Decimal | None:
        return None

    def moments(self, since: float, now: float, most: int) -> list[float]:
        return [now]


class PaperSubject(Subject):
    """The script is a second exchange object on the account's file."""

    def __init__(self, data_dir: Path, broker_args: dict[str, Any] | None = None) -> None:
        WatchedPaper.received.clear()
        super().__init__(WatchedPaper(broker_args), data_dir, hard_limit=60.0)  # nothing hangs

    def ready(self) -> None:
        super().ready()
        (path,) = self.data_dir.glob("instances/*/paper.sqlite")
        self.script = PaperExchange(
            path,
            {currency: Decimal(amount) for currency, amount in INITIAL_CASH.items()},
            NoPrices(),
            AlwaysOpen(),
            NO_FEES,
            lambda: 0.0,
        )

    def calm(self) -> None:
        for currency, amount in INITIAL_CASH.items():
            self.set_cash(currency, amount)
        self.script.close()

    def placements(self) -> int:
        return WatchedPaper.received.count("place")

    def cancellations(self) -> int:
        return WatchedPaper.received.count("cancel")

    def orders(self) -> list[ExchangeOrder]:
        return [self.shown(order) for order in self.script.orders(0)]

    def shown(self, order: PaperOrder) -> ExchangeOrder:
        fills = [
            ExchangeFill(str(fill.number), Decimal(fill.qty), fill.price, fill.time)
            for fill in self.script.fills(order.order_id)
        ]
        return ExchangeOrder(
            order.order_id,
            order.region,
            order.ticker,
            order.direction,
            order.order_type.name,
            order.price,
            Decimal(order.qty),
            order.time_in_force.name,
            order.lifecycle.name,
            mark=order.mark,
            status=STATUS[order.status],
            reason=order.reason,
            fills=fills,
        )

    def fill(self, order_id: str, qty: Decimal | int, price: Decimal | str) -> None:
        self.script.execute(order_id, int(qty), Decimal(price))

    def reject(self, order_id: str, reason: str) -> None:
        self.script.finish(order_id, Status.REJECTED, reason)

    def cancel(self, order_id: str) -> None:
        self.script.finish(order_id, Status.CANCELED)

    def expire(self, order_id: str) -> None:
        self.script.finish(order_id, Status.EXPIRED, "The order's day has ended.")

    def refused_order(self) -> tuple[dict[str, Any], str]:
        return self.limit(qty=10_000_000), "Not enough buying power"

    def refused_quote(self) -> tuple[str, str] | None:
        return None  # made-up prices are made up for every ticker

    def set_quote(self, region: str, ticker: str, **fields: Any) -> bool:
        return False

    def set_cash(self, currency: str, amount: str) -> None:
        """Sets what can be spent: beside what working orders have set aside."""
        with self.script._transaction() as db:
            here = CASH.c.currency == currency
            reserved = db.execute(CASH.select().where(here)).one().reserved
            db.execute(CASH.update().where(here).values(amount=Decimal(amount) + reserved))

    def set_positions(self, positions: list[ExchangePosition]) -> None:
        with self.script._transaction() as db:
            db.execute(HOLDINGS.delete())
            for held in positions:
                row = {"region": held.region, "ticker": held.ticker, "currency": held.currency}
                db.execute(HOLDINGS.insert().values(row | {"qty": held.qty, "cost": Decimal(1)}))


@broker_register("quotes", "Quotes")
class Quotes(BaseBroker):
    """Another instance, with quotes only."""

    async def quote(self, contract: Contract) -> Quote:
        exchange: Exchange = self.broker_args["exchange"]
        fault = exchange.receive("quote")
        if fault is not None:
            raise Rejected(fault.text)
        found = exchange.quote(contract.region, contract.ticker)
        return Quote(
            contract,
            CURRENCIES[contract.region],
            found.is_tradable,
            found.latest,
            found.pre_close,
            found.open_price,
            found.high_price,
            found.low_price,
            datetime.fromtimestamp(found.epoch, UTC),
        )


class BorrowingSubject(PaperSubject):
    """Paper on the quotes of another instance, which the script sets."""

    SOURCE = "TheOtherInstance1"

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir, {"quotes_from": self.SOURCE})

    def instances(self) -> list[InstanceSettings]:
        source = Quotes({"exchange": self.exchange}, self.SOURCE, ["theOthersToken0001"])
        return [self.settings, InstanceSettings(source, ages={"quote": 0}, hard_limit=60.0)]

    def calm(self) -> None:
        self.exchange.clear_faults()
        with self.exchange.lock:
            changed = list(self.exchange.quotes)
            self.exchange.quotes.clear()
        trader = self.trader()
        for name in changed:  # else an order of the next case may meet the price of this one
            usual = ExchangeQuote(*name).latest
            wait_for(
                lambda name=name, usual=usual: trader.quote(*name)["quote"]["latest"] == usual,
                "the usual price",
            )
        super().calm()

    def set_quote(self, region: str, ticker: str, **fields: Any) -> bool:
        return Subject.set_quote(self, region, ticker, **fields)

    def refused_quote(self) -> tuple[str, str] | None:
        return Subject.refused_quote(self)


def test_in_a_child_process(tmp_path: Path) -> None:
    """The same account behind a child process that is killed between two orders."""
    with Subject(Paper(), tmp_path, isolation="process", hard_limit=60.0) as subject:
        subject.ready()
        trader = subject.trader()
        order = subject.market_order()
        assert order is not None
        first = trader.placed(order)
        assert trader.wait_order(first, isFilled=True)["filledQty"] == 12
        assert subject.app is not None
        instance = subject.app.extensions["httptrading"].instance(subject.broker.instance_id)
        (worker,) = instance.workers.values()
        os.kill(worker._lane.pid, signal.SIGKILL)
        key = subject.key()
        wait_for(lambda: trader.place(order, key=key).ok, "the account to be served again")
        trader.wait_order(key=key, isFilled=True)
        assert [held["qty"] for held in trader.positions()["positions"]] == [24]


class TestPaper(BrokerAcceptance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        with PaperSubject(tmp_path_factory.mktemp("paper")) as subject:
            yield subject


class TestPaperOnOthersQuotes(BrokerAcceptance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        with pytest.MonkeyPatch.context() as patch:
            # Each case sets prices of its own: an order waits for them, and nobody else asks, who
            # would meet a case's fault or bring back the price of another.
            patch.setattr(paper_quotes, "FRESH", 0.0)
            patch.setattr(paper, "BORROWED_WAIT", 25.0)
            patch.setattr(paper, "PULSE_BORROWED", 600.0)
            patch.setattr(gateway, "QUOTE_FROM_SECONDS", 25.0)
            with BorrowingSubject(tmp_path_factory.mktemp("paper")) as subject:
                yield subject
