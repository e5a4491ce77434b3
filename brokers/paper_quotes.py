"""Another instance's quotes for the paper exchange, fetched by a thread of their own, so that a
slow or silent broker there never holds up the paper account."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from decimal import Decimal

from httptrading.model import Contract, Quote, TradeType

FRESH = 1.0
"""Seconds for which a price is not asked for again: the other broker counts its requests."""

GOOD_FOR = 12.0
"""Seconds after which a price is too old to trade on; more than two pulses of the exchange."""


class BorrowedPrices:
    """The `Prices` of the exchange: the last price that the thread has fetched; the past is not
    known."""

    def __init__(self, quote_of: Callable[[Contract], Quote]) -> None:
        """`quote_of` may take its time, and raises where there is no quote."""
        self._quote_of = quote_of
        self._lock = threading.Lock()
        self._waiting: dict[Contract, list[Future[Quote]]] = {}
        self._known: dict[tuple[str, str], tuple[float, Decimal | None]] = {}
        self._orders: queue.SimpleQueue[Contract | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="httptrading-paper-quotes", daemon=True).start()

    def close(self) -> None:
        self._orders.put(None)

    def ask(self, contract: Contract) -> Future[Quote]:
        """A quote on its way; one request serves everybody who asks meanwhile, and each may
        cancel waiting for it."""
        mine: Future[Quote] = Future()
        with self._lock:
            if contract not in self._waiting:
                self._waiting[contract] = []
                self._orders.put(contract)
            self._waiting[contract].append(mine)
        return mine

    def refresh(self, region: str, ticker: str) -> Future[Quote] | None:
        """Asks for a price unless the known one is fresh."""
        asked, _ = self._known.get((region, ticker), (float("-inf"), None))
        if time.monotonic() - asked < FRESH:
            return None
        return self.ask(Contract(TradeType.Securities, ticker, region))

    def latest(self, region: str, ticker: str, epoch: float) -> Decimal | None:
        asked, price = self._known.get((region, ticker), (float("-inf"), None))
        return price if time.monotonic() - asked < GOOD_FOR else None

    def moments(self, since: float, now: float, most: int) -> list[float]:
        return [now]

    def _run(self) -> None:
        while (contract := self._orders.get()) is not None:
            price: Decimal | None = None
            error: Exception | None = None
            try:
                quote = self._quote_of(contract)
                latest = Decimal(str(quote.latest))
                price = latest if quote.is_tradable and latest > 0 else None
            except Exception as raised:
                error = raised
            with self._lock:
                self._known[contract.region, contract.ticker] = time.monotonic(), price
                waiting = self._waiting.pop(contract)
            for one in waiting:
                if not one.set_running_or_notify_cancel():
                    continue
                if error is None:
                    one.set_result(quote)
                else:
                    one.set_exception(error)
