"""One account: what the HTTP routes ask, turned into calls on its workers and rows in the journal.

Every method takes a `deadline` in `time.monotonic()` seconds and ends by it, with an answer or an
error of the tree. Sections below: reads, placing, cancelling, orders, what the workers tell.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from httptrading.brokers.base import READS, BaseBroker, Combination, Link, masked
from httptrading.brokers.journal import Journal
from httptrading.brokers.journal_rows import JournalOrder, OrderRequest
from httptrading.brokers.journal_tables import NOT_PLACED, PLACED, REFUSED, SEEN, UNSETTLED
from httptrading.brokers.limits import WindowState, shared_windows
from httptrading.brokers.local import LocalBroker
from httptrading.brokers.placing import NOTHING_SENT, WRITE_SECONDS, Placed, Placing, unknown
from httptrading.brokers.process import ChildBroker
from httptrading.brokers.reads import ReadMemory
from httptrading.brokers.recorder import Recorder
from httptrading.brokers.settings import InstanceSettings
from httptrading.brokers.settlement import Settlement
from httptrading.brokers.worker import (
    Backend,
    Call,
    Worker,
    WorkerState,
    not_sent_in_time,
)
from httptrading.errors import (
    BrokerUnavailable,
    Busy,
    HttpTradingError,
    OrderNotFound,
    OutcomeUnknown,
    Rejected,
    TimedOut,
    Unsupported,
)
from httptrading.model import (
    CURRENCIES,
    Cash,
    Contract,
    Fill,
    MarketStatus,
    Order,
    OrderReport,
    Position,
    Quote,
    exact,
)
from httptrading.tickers import currency_of

log = logging.getLogger("httptrading.instance")

ANSWER_GRACE = 0.1
"""Seconds a waiter stays beyond the deadline for the operation's own account of what happened."""

WORTH_ASKING = 0.5
"""Seconds that must be left for a read to be asked again after another reader's call timed out."""


@dataclass
class _Joined:
    """The broker's answer about an order, joined to the journal as it was after so many writes, and
    whether it was no news to that."""

    answer: Order | OrderReport
    order: Order
    writes: int
    no_news: bool

    def is_no_news(self, answer: Order | OrderReport, journal: Journal) -> bool:
        """Who polls an order is mostly told what the journal knows already."""
        return self.no_news and journal.unchanged_since(self.writes) and self.answer == answer


@dataclass(frozen=True)
class ConnectionState:
    name: str
    state: WorkerState
    queued: int
    child_memory: int | None  # resident bytes of the child process


@dataclass(frozen=True)
class InstanceState:
    """What `instance/state` tells."""

    connections: tuple[ConnectionState, ...]
    windows: Mapping[str, WindowState]
    operations: tuple[str, ...]
    combinations: tuple[Combination, ...] | None
    quote_regions: tuple[str, ...] | None
    unsettled: int
    oldest_unsettled: datetime | None

    @property
    def unsettled_seconds(self) -> float:
        """The age of the oldest order whose outcome is not known."""
        if self.oldest_unsettled is None:
            return 0.0
        return (datetime.now(UTC) - self.oldest_unsettled).total_seconds()


class Instance:
    """A configured account with its workers."""

    def __init__(
        self,
        settings: InstanceSettings,
        journal: Journal,
        recorder: Recorder,
        data_dir: Path,
        quote_of: Callable[[str, Contract], Quote],
    ) -> None:
        self.settings = settings
        self.broker = settings.broker
        self.id = settings.broker.instance_id
        self.masked_id = masked(self.id)
        self.quote_of = quote_of
        self._journal = journal
        self._recorder = recorder
        broker_class = type(self.broker)
        self._reads = ReadMemory({**broker_class.ages, **settings.ages})
        windows = {**self.broker.windows, **settings.windows}
        self.windows = shared_windows(self.broker.window_key, windows)
        folder = hashlib.sha256(self.id.encode()).hexdigest()[:16]
        self.data_dir = data_dir / "instances" / folder
        self._windows_dir = data_dir / "windows"
        self.workers: dict[str, Worker] = {}
        self._worker_of: dict[str, Worker] = {}
        for name, operations in self.broker.connections.items():
            worker = Worker(
                f"{self.broker.broker_name}-{self.masked_id}-{name}",
                self._backend_maker(name),
                self.windows,
                self.broker.costs,
                self,
                queue_size=settings.queue_size,
                hard_limit=settings.hard_limit,
                connect_timeout=settings.connect_timeout,
            )
            self.workers[name] = worker
            self._worker_of |= dict.fromkeys(operations, worker)
        self._cash_takes_currency = "currency" in inspect.signature(broker_class.cash).parameters
        self._joined: dict[str, _Joined] = {}  # by order id
        self.settlement = Settlement(self, journal)
        self._placing = Placing(self, journal, recorder)
        self._draining = False
        self._drain_until = float("inf")

    def _backend_maker(self, connection: str) -> Callable[[Link], Backend]:
        settings = self.settings

        def make(link: Link) -> Backend:
            with suppress(OSError):  # a full disk: whoever needs it says so when connecting
                self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            if settings.where == "process":
                return ChildBroker(self.broker, connection, self.data_dir, link, settings.python)
            return LocalBroker(self.broker, connection, self.data_dir, link)

        return make

    # --- life ---------------------------------------------------------------------------------
    def start(self) -> None:
        self.windows.keep_in(self._windows_dir)
        self.settlement.start()
        for worker in self.workers.values():
            worker.start()

    def check(self) -> None:
        for worker in self.workers.values():
            worker.check()

    def drain(self, seconds: float) -> None:
        """Answers what is queued at once, and what is running after at most so many seconds."""
        self._drain_until = min(self._drain_until, time.monotonic() + seconds)
        self._draining = True
        self.settlement.drain(self._drain_until)
        for worker in self.workers.values():
            worker.drain()

    def close(self, seconds: float) -> None:
        self.settlement.stop()
        end = time.monotonic() + seconds
        self.drain(seconds)
        for worker in self.workers.values():
            worker.close(max(0.05, end - time.monotonic()))

    @property
    def is_stuck(self) -> bool:
        """Whether a call is running, on a worker that has been given up perhaps."""
        return any(worker.is_stuck for worker in self.workers.values())

    def state(self) -> InstanceState:
        unsettled = self._journal.unsettled(self.id)
        broker_class = type(self.broker)
        combinations = self.broker.combinations
        regions = self.broker.quote_regions
        writes = () if self.settings.read_only else ("place_order", "cancel_order")
        return InstanceState(
            connections=self.connections(),
            windows=self.windows.state(),
            operations=tuple(
                operation for operation in (*READS, *writes) if offers(broker_class, operation)
            ),
            combinations=None if combinations is None else tuple(sorted(combinations, key=str)),
            quote_regions=None if regions is None else tuple(sorted(regions)),
            unsettled=len(unsettled),
            oldest_unsettled=unsettled[0].created if unsettled else None,
        )

    def connections(self) -> tuple[ConnectionState, ...]:
        return tuple(
            ConnectionState(name, worker.state, worker.queued(), worker.child_memory())
            for name, worker in self.workers.items()
        )

    # --- reads --------------------------------------------------------------------------------
    def ping(self, deadline: float, *, fresh: bool = False) -> bool:
        """False when there is no connection, or the broker itself says it is not well."""
        try:
            return bool(self._read("ping", deadline, fresh=fresh))
        except BrokerUnavailable:
            return False

    def quote(self, contract: Contract, deadline: float, *, fresh: bool = False) -> Quote:
        self.broker.check_contract(contract)
        found: Quote = self._read("quote", deadline, fresh=fresh, contract=contract)
        return found

    def market_status(
        self, deadline: float, *, fresh: bool = False
    ) -> dict[str, dict[str, MarketStatus]]:
        """Trade type in lower case → region → state."""
        found: Mapping[Any, Any] = self._read("market_status", deadline, fresh=fresh)
        return {
            getattr(kind, "name", str(kind)).lower(): dict(states)
            for kind, states in found.items()
            if isinstance(states, Mapping)
        }

    def cash(self, currency: str | None, deadline: float, *, fresh: bool = False) -> Cash:
        if self._cash_takes_currency:
            wanted = {"currency": currency or "USD"}
        else:
            wanted = {}
        found: Cash = self._read("cash", deadline, fresh=fresh, **wanted)
        if currency is not None and found.currency != currency:
            raise Unsupported(f"{self.broker.broker_display} tells cash in {found.currency} only")
        return found

    def positions(
        self, deadline: float, *, region: str | None, ticker: str | None, fresh: bool = False
    ) -> list[Position]:
        found: list[Position] = self._read("positions", deadline, fresh=fresh)
        return [
            position
            for position in found
            if (region is None or position.contract.region == region)
            and (ticker is None or position.contract.ticker == ticker)
        ]

    def _read(
        self, operation: str, deadline: float, *, fresh: bool = False, **arguments: Any
    ) -> Any:
        key = _read_key(operation, arguments)
        if not fresh:
            known, value = self._reads.answer(operation, key)
            if known:
                return value
        worker = self.worker(operation)
        own = Call(operation, arguments, deadline)
        shared = self._reads.join(operation, key, fresh, lambda: worker.submit(own))
        call = shared.call
        call.deadline = max(call.deadline, deadline)
        try:
            return self.wait(call, deadline)
        except TimedOut:
            # The time of the reader who began the call is up, but perhaps not this one's.
            if call is own or deadline - time.monotonic() < WORTH_ASKING:
                raise
            return self._read(operation, deadline, fresh=fresh, **arguments)
        except FutureTimeout:
            pass
        if self._reads.leave(shared) and worker.withdraw(call):
            call.set_exception(not_sent_in_time())
        # A call that began was sent, even if its connection has been replaced for it meanwhile.
        unavailable = worker.unavailable() if call.began is None else None
        raise unavailable or TimedOut(
            f"{self.broker.broker_display} did not answer before the deadline."
        )

    def worker(self, operation: str) -> Worker:
        if not offers(type(self.broker), operation):
            raise Unsupported(f"{self.broker.broker_display} does not offer {operation}")
        worker = self._worker_of.get(operation)
        if worker is None:
            raise Unsupported(f"{self.broker.broker_display} does not offer {operation}")
        worker.start()
        return worker

    def wait(self, future: Future[Any], deadline: float) -> Any:
        """The result by the deadline, or by the end of the drain when the service is stopping."""
        while True:
            until = deadline + ANSWER_GRACE
            if self._draining:
                until = min(until, self._drain_until)
            left = until - time.monotonic()
            try:
                # In steps, so that a drain that begins meanwhile is noticed.
                return future.result(timeout=max(0.0, min(left, 0.5)))
            except FutureTimeout:
                if future.done():
                    return future.result()
                if left <= 0.5:
                    raise

    # --- placing ------------------------------------------------------------------------------
    def place(self, request: OrderRequest, client_order_id: str | None, deadline: float) -> Placed:
        """Sends an order at most once per client order id."""
        return self._placing.place(request, client_order_id, deadline)

    def check_allowed(self, request: OrderRequest, deadline: float) -> None:
        """What the broker takes, and the instance's own switches."""
        self._check_writable()
        self.broker.check_order(
            request.contract,
            request.order_type,
            request.time_in_force,
            request.lifecycle,
            request.direction,
            request.qty,
            None if request.price is None else float(request.price),
        )
        region = request.contract.region
        currency = currency_of(region, request.contract.ticker)
        largest = self.settings.largest_order(currency)
        if largest is None and currency != CURRENCIES[region]:
            # A counter in another currency is not without limit where its market has one.
            currency = CURRENCIES[region]
            largest = self.settings.largest_order(currency)
        if largest is None:
            return
        price = request.price
        if price is None:
            try:
                price = exact(self.quote(request.contract, deadline).latest)
            except HttpTradingError as error:
                if error.retryable:
                    raise
                raise Unsupported(
                    "max_order_value is set for this instance, and there is no quote to value a "
                    "market order with. Use a limit order."
                ) from None
        value = price * request.qty
        if value > largest:
            raise Unsupported(
                f"The order is worth about {value:f} {currency}, more than max_order_value "
                f"({largest:f} {currency}) allows on this instance."
            )

    def _check_writable(self) -> None:
        if self.settings.read_only:
            raise Unsupported(
                "This instance is configured read_only: it neither places nor cancels."
            )

    # --- cancelling ---------------------------------------------------------------------------
    def cancel(self, order_id: str | None, client_order_id: str | None, deadline: float) -> None:
        """Asks the broker to cancel; returns when the broker has taken the request."""
        self._check_writable()
        row = self._row(order_id, client_order_id)
        if row is not None:
            order_id = self._order_id_of(row)
            if not row.is_open:
                raise Rejected(f"The order is {_final_word(row.order)}; nothing is left to cancel.")
        assert order_id is not None
        call = Call(
            "cancel_order",
            {"order_id": order_id},
            deadline,
            begin=self._reads.stale,
            finish=lambda result, error: self._reads.stale(),
        )
        worker = self.worker("cancel_order")
        worker.submit(call)
        try:
            self.wait(call, deadline)
        except FutureTimeout:
            if worker.withdraw(call):
                raise worker.unavailable() or not_sent_in_time() from None
            raise _cancel_unknown() from None
        except HttpTradingError as error:
            said_no = isinstance(error, (Rejected, OrderNotFound, *NOTHING_SENT))
            if call.began is not None and not said_no:
                raise _cancel_unknown() from None
            raise

    def cancel_all(self, deadline: float) -> list[tuple[str, HttpTradingError | None]]:
        """Cancels every open order; each order id with None or why it was not cancelled.

        Orders whose outcome is not known have no id yet ("") and are among those not cancelled, as
        are those of others when they cannot be listed and only what the journal knows is left.
        """
        self._check_writable()
        self.worker("cancel_order")  # Unsupported where there is none, whatever is open
        answers: list[tuple[str, HttpTradingError | None]] = []
        orders, unlisted = self._open_orders(deadline)
        for order in orders:
            if order.is_pending_cancel:
                answers.append((order.order_id, None))
                continue
            if time.monotonic() >= deadline:
                answers.append((order.order_id, not_sent_in_time()))
                continue
            try:
                self.cancel(order.order_id, None, deadline)
                answers.append((order.order_id, None))
            except HttpTradingError as error:
                answers.append((order.order_id, error))
        with suppress(Busy):
            for row in self._journal.unsettled(self.id):
                answers.append(("", self.unsettled(row)))
        if unlisted is not None:
            words = f"Only orders known here were cancelled, others may be open: {unlisted.text}"
            answers.append(("", HttpTradingError(words)))
        return answers

    def _open_orders(self, deadline: float) -> tuple[list[Order], HttpTradingError | None]:
        """The broker's and the journal's, and why only the journal's; a journal that cannot be used
        holds nothing up, nor does a listing that fails, or takes half of the time, what is known
        without it."""
        found: dict[str, Order] = {}
        unlisted: HttpTradingError | None = None
        if self.lists_orders:
            seen = time.time()
            reports: list[OrderReport] = []
            now = time.monotonic()
            try:
                reports = self.list_recent(now + (deadline - now) / 2)
            except HttpTradingError as error:
                lists, cancels = map(self._worker_of.get, ("recent_orders", "cancel_order"))
                if lists is cancels and isinstance(error, (BrokerUnavailable, Busy)):
                    raise  # a cancellation would be told the same
                unlisted = error
            found = {report.order.order_id: report.order for report in reports}
            soon = min(deadline, time.monotonic() + WRITE_SECONDS)
            with suppress(Busy):
                self._journal.record(self.id, reports, seen, deadline=soon)
            with suppress(Busy):
                joined = self._journal.joined(self.id, reports)
                found |= {row.order_id: row.order for row in joined}
        try:
            rows = self._journal.orders(self.id, open_=True, since=None, limit=None)
        except Busy:
            if not self.lists_orders:
                raise
            rows = []
        for row in rows:
            found.setdefault(row.order_id, row.order)
        orders = [order for order in found.values() if order.order_id and not order.is_completed]
        if unlisted is not None and not orders:
            raise unlisted
        return orders, unlisted

    # --- orders -------------------------------------------------------------------------------
    def order(
        self,
        order_id: str | None,
        client_order_id: str | None,
        deadline: float,
        *,
        fresh: bool = False,
    ) -> Order:
        """From the broker where it still knows the order, else from the journal."""
        if order_id is not None and not fresh:
            remembered = self._remembered_order(order_id)
            if remembered is not None:
                return remembered
        row = self._row(order_id, client_order_id)
        if row is not None and row.state == REFUSED:
            return row.order
        if row is not None:
            order_id = self._order_id_of(row)
            if not row.is_open and not row.is_priced_in_part:
                return row.order  # final is final
        seen = time.time()
        try:
            found = self._at_the_broker(order_id, deadline, fresh=fresh)
        except HttpTradingError as error:
            knows_none = isinstance(error, OrderNotFound | Unsupported)
            if row is None or (row.is_open and not knows_none):
                raise
            return row.order
        report = found if isinstance(found, OrderReport) else OrderReport(found)
        joined = self._joined.get(report.order.order_id)
        if joined is not None and joined.is_no_news(found, self._journal):
            joined.answer = found
            return joined.order
        before = self._journal.writes
        recorded = True
        try:
            self._journal.record(self.id, [report], seen, deadline=deadline)
        except Busy:  # the broker's answer is worth more than its record
            recorded = False
        writes = self._journal.writes
        order = self._joined_order(report)
        if len(self._joined) > 1000:
            self._joined.clear()
        no_news = recorded and writes == before
        self._joined[order.order_id] = _Joined(found, order, writes, no_news)
        return order

    def _at_the_broker(
        self, order_id: str | None, deadline: float, *, fresh: bool
    ) -> Order | OrderReport:
        """The broker's answer, from its list where it cannot be asked for a single order."""
        try:
            found: Order | OrderReport = self._read(
                "order", deadline, fresh=fresh, order_id=order_id
            )
            return found
        except Unsupported:
            if not self.lists_orders:
                raise
        reports: list[OrderReport] = self._read("recent_orders", deadline, fresh=fresh)
        for report in reports:
            if report.order.order_id == order_id:
                return report
        raise OrderNotFound(f"The broker's list has no order {order_id}.")

    def _joined_order(self, report: OrderReport) -> Order:
        """What the report and the journal say together."""
        try:
            return self._journal.together(self.id, report)
        except Busy:
            return report.order

    def _remembered_order(self, order_id: str) -> Order | None:
        """What the broker's answer in memory, already joined to the journal, came to; None when
        there is none, or the journal may know more by now."""
        known, found = self._reads.answer("order", _read_key("order", {"order_id": order_id}))
        joined = self._joined.get(order_id)
        if not known or joined is None or joined.answer is not found:
            return None
        return joined.order if self._journal.unchanged_since(joined.writes) else None

    def orders(
        self,
        *,
        open_: bool | None,
        since: datetime | None,
        limit: int,
        deadline: float,
        fresh: bool = False,
    ) -> list[JournalOrder]:
        """The account's orders, newest first: the broker's list joined to the journal."""
        unwritten: list[JournalOrder] = []
        if self.lists_orders:
            seen = time.time()
            reports = self._read("recent_orders", deadline, fresh=fresh)
            try:
                self._journal.record(self.id, reports, seen, deadline=deadline)
            except Busy:
                unwritten = self._journal.joined(self.id, reports)
        rows = self._journal.orders(self.id, open_=open_, since=since, limit=limit)
        if not unwritten:
            return rows
        newer = {row.order_id: row for row in (*rows, *unwritten)}
        wanted = [
            row
            for row in newer.values()
            if row.state in (PLACED, SEEN)
            and (open_ is None or row.is_open == open_)
            and (since is None or row.created >= since)
        ]
        return sorted(wanted, key=lambda row: row.created, reverse=True)[:limit]

    @property
    def lists_orders(self) -> bool:
        """Whether the broker has a listing that an order can be looked for in."""
        return offers(type(self.broker), "recent_orders") and "recent_orders" in self._worker_of

    def listed_since(self, now: datetime) -> datetime:
        """As the broker says; a time without a zone is this machine's."""
        return self.broker.listed_since(now).astimezone(UTC)

    def fills(self, order_id: str, deadline: float, *, fresh: bool = False) -> list[Fill]:
        """An order's executions, oldest first: the broker's joined to the journal's."""
        row = self._row(order_id, None)
        known = self._known_fills(order_id)
        filled = sum((exact(fill.qty) for fill in known), Decimal(0))
        if row is not None and not row.is_open and filled == row.order.filled_qty:
            return known
        try:
            found: list[Fill] = self._read("fills", deadline, fresh=fresh, order_id=order_id)
        except (OrderNotFound, Unsupported):
            if row is None and not known:
                raise
            return known
        if row is None and not found:
            self.order(order_id, None, deadline)  # OrderNotFound for an id nobody knows
        try:
            self._journal.record_fills(self.id, found, deadline=deadline)
        except Busy:
            joined = {fill.fill_id: fill for fill in (*known, *found)}
            left = [fill for fill in joined.values() if fill.qty]
            return sorted(left, key=lambda fill: (fill.time, fill.fill_id))
        return self._known_fills(order_id)

    def _known_fills(self, order_id: str) -> list[Fill]:
        try:
            return self._journal.fills(self.id, order_id)
        except Busy:
            return []  # the broker may still know them

    def list_recent(self, deadline: float) -> list[OrderReport]:
        """A complete listing from the broker, begun now; for settlement."""
        found: list[OrderReport] = self._read("recent_orders", deadline, fresh=True)
        return found

    def _row(self, order_id: str | None, client_order_id: str | None) -> JournalOrder | None:
        if client_order_id is None:
            assert order_id is not None
            try:
                return self._journal.by_order_id(self.id, order_id)
            except Busy:
                return None  # reads and cancels go on without a journal
        row = self._journal.by_client_order_id(self.id, client_order_id)
        if row is None:
            raise OrderNotFound(f"No order was sent under clientOrderId {client_order_id}.")
        return row

    def _order_id_of(self, row: JournalOrder) -> str:
        """Raises when the row has no order at the broker, or not one that is known yet."""
        if row.state in UNSETTLED:
            raise self.unsettled(row)
        if row.state == NOT_PLACED:
            raise OrderNotFound(
                f"The order was not placed; clientOrderId {row.client_order_id} may be used again."
            )
        if row.state == REFUSED:
            raise OrderNotFound(f"The broker refused the order: {row.order.error_reason}")
        return row.order_id

    def unsettled(self, row: JournalOrder) -> OutcomeUnknown:
        """Which may be for good: then only the trader can find out."""
        key = row.client_order_id or ""
        if not self.lists_orders or row.created >= self.listed_since(datetime.now(UTC)):
            return unknown(key)
        error = OutcomeUnknown(
            "The order was sent so long ago that the broker's lists no longer tell what became of "
            "it. Look for it in the broker's own app; when it surely is not there, send it under "
            "another clientOrderId."
        )
        error.client_order_id = key
        return error

    # --- what the workers tell (Listener) -------------------------------------------------------
    def on_reports(self, reports: Iterable[OrderReport]) -> None:
        self._reads.stale()
        self._recorder.reports(self.id, tuple(reports), time.time(), self.settlement.news)

    def on_fills(self, fills: Iterable[Fill]) -> None:
        self._reads.stale()
        self._recorder.fills(self.id, tuple(fills))

    def on_stale(self) -> None:
        self._reads.stale()

    def on_connected(self, worker: Worker) -> None:
        self._reads.stale()
        if worker is self._worker_of.get("recent_orders"):
            self.settlement.connected()

    def on_restored(self) -> None:
        """News may have been missed, whichever connection they come over: Tiger's push is not that
        of `recent_orders`."""
        self._reads.stale()
        if self.lists_orders:
            self.settlement.connected()


def _read_key(operation: str, arguments: Mapping[str, Any]) -> Hashable:
    return (operation, *sorted(arguments.items()))


def offers(broker_class: type, operation: str) -> bool:
    """Whether a broker has an operation of its own (`ping` is always there)."""
    method = getattr(broker_class, operation, None)
    inherited = method is getattr(BaseBroker, operation)
    return method is not None and (operation == "ping" or not inherited)


def _final_word(order: Order) -> str:
    if order.is_filled:
        return "filled"
    return "already cancelled" if order.is_canceled else f"failed ({order.error_reason})"


def _cancel_unknown() -> OutcomeUnknown:
    return OutcomeUnknown(
        "The cancellation was sent, but no clear answer came. Ask order/state what became of it."
    )
