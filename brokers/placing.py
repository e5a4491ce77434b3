"""Sends an order at most once per client order id: a place in the queue, a record, then the SDK.

Whoever repeats a request meets what became of the first: in flight, in the journal, or settled.
"""

from __future__ import annotations

import copy
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from httptrading.brokers.journal import Journal
from httptrading.brokers.journal_database import TOO_SLOW
from httptrading.brokers.journal_rows import JournalOrder, OrderRequest, Outcome
from httptrading.brokers.journal_tables import NOT_PLACED, PLACED, REFUSED, UNKNOWN
from httptrading.brokers.recorder import Recorder
from httptrading.brokers.worker import Call, NotSentInTime, not_sent_in_time
from httptrading.errors import (
    BrokerUnavailable,
    Busy,
    HttpTradingError,
    IdempotencyConflict,
    InvalidRequest,
    OutcomeUnknown,
    RateLimited,
    Rejected,
    Unsupported,
)

if TYPE_CHECKING:
    from httptrading.brokers.instance import Instance

WRITE_SECONDS = 0.1
"""How much longer an answer may take for its record to be written."""

NOTHING_SENT = (
    BrokerUnavailable,
    Busy,
    InvalidRequest,
    NotSentInTime,
    RateLimited,
    Unsupported,
)
"""With these an operation that changes something promises that it did nothing; any other error,
but for the broker's refusal, leaves it open."""


@dataclass(frozen=True)
class Placed:
    """An order that the broker took. `replayed`: the stored answer of an earlier request."""

    order_id: str
    client_order_id: str
    time: datetime
    replayed: bool = False


class Placement(Future[str]):
    """An order being sent right now under a client order id; done when the SDK call has ended."""

    def __init__(self, key: str, request: OrderRequest) -> None:
        super().__init__()
        self.key = key  # the client order id
        self.request = request
        self.mark = ""
        self.call: Call | None = None
        self.answer: str | HttpTradingError | None = None  # known; done when that is recorded
        self.row_id: int | None = None  # None until it is in the journal
        self.created: datetime | None = None


class Placing:
    """One instance's orders on their way to the broker."""

    def __init__(self, instance: Instance, journal: Journal, recorder: Recorder) -> None:
        self._instance = instance
        self._journal = journal
        self._recorder = recorder
        self._lock = threading.Lock()
        self._in_flight: dict[str, Placement] = {}  # by client order id

    def place(self, request: OrderRequest, client_order_id: str | None, deadline: float) -> Placed:
        """Sends an order at most once per client order id; see the journal for its states."""
        key = client_order_id or secrets.token_hex(12)
        try:
            return self._place(request, key, deadline)
        except HttpTradingError as error:
            error.client_order_id = key
            raise

    def _place(self, request: OrderRequest, key: str, deadline: float) -> Placed:
        while True:
            with self._lock:
                placement = self._in_flight.get(key)
                mine = placement is None
                if placement is None:
                    placement = self._in_flight[key] = Placement(key, request)
            if placement.request != request:
                raise _conflict(key)
            if not mine:
                # A push or a listing may have found the order while its call is stuck.
                found = self._found(key)
                try:
                    return found or self._await_placement(placement, deadline, replayed=True)
                except OutcomeUnknown:
                    found = self._found(key)
                    if found is not None:
                        return found
                    if placement.call is not None or time.monotonic() >= deadline:
                        raise
                    continue  # that request has found it unsettled: wait for that as it does
                except HttpTradingError:
                    # What the broker was asked and said is said to all; but a request that gave
                    # up before leaves this one its right to try.
                    if placement.call is not None and placement.call.began is not None:
                        raise
                    continue
            try:
                known = self._journal.by_client_order_id(self._instance.id, key)
                if known is not None:
                    if not known.same_content(request):
                        raise _conflict(key)
                    if known.state == PLACED:
                        return self._release(placement, known)
                    if known.state == REFUSED:
                        raise _own(Rejected(known.order.error_reason), replayed=True)
                if known is None or known.state == NOT_PLACED:
                    # Only now: an order sent earlier is answered for, whatever is allowed today.
                    self._instance.check_allowed(request, deadline)
                    self._send(placement, known.attempt + 1 if known else 1, deadline)
                    return self._await_placement(placement, deadline, replayed=False)
            except BaseException as error:
                self._give_back(placement, error)
                raise
            # Sent earlier with an outcome that is not known yet: never again before it is settled.
            self._give_back(placement, unknown(key))
            try:
                settled = self._instance.settlement.wait_for(known, deadline)
            except Busy:
                settled = False  # the journal, which was readable just now
            if not settled:
                raise self._instance.unsettled(known)

    def _found(self, key: str) -> Placed | None:
        """The replayed answer for an order that is known to be at the broker."""
        try:
            known = self._journal.by_client_order_id(self._instance.id, key)
        except Busy:
            return None
        if known is None or known.state != PLACED:
            return None
        return Placed(known.order_id, key, known.created, replayed=True)

    def _release(self, placement: Placement, known: JournalOrder) -> Placed:
        self._forget(placement)
        placement.set_result(known.order_id)
        return Placed(known.order_id, placement.key, known.created, replayed=True)

    def _forget(self, placement: Placement) -> bool:
        """True once: whoever is told so ends the placement, and nobody else does."""
        with self._lock:
            if self._in_flight.get(placement.key) is not placement:
                return False
            del self._in_flight[placement.key]
            return True

    def _give_back(self, placement: Placement, error: BaseException) -> None:
        """Ends a placement that was never let run."""
        self._withdraw(placement)
        call = placement.call
        if (call is None or not call.ready) and self._forget(placement):
            placement.set_exception(error)

    def _withdraw(self, placement: Placement) -> None:
        """Takes its call out of the queue, if it is still there."""
        call = placement.call
        if call is None:
            return
        worker = self._instance.worker("place_order")
        if worker.withdraw(call):
            call.set_exception(worker.unavailable() or not_sent_in_time())

    def _send(self, placement: Placement, attempt: int, deadline: float) -> None:
        """Takes a place in the queue, has the order recorded, and only then lets it run.

        In this order nothing is recorded for a call that is refused, and no worker waits for the
        disk, so that orders that come together are written together.
        """
        key, request = placement.key, placement.request
        mark = placement.mark = self._journal.mark(self._instance.id, key, attempt)

        def finish(order_id: Any, error: HttpTradingError | None) -> None:
            self._finish_place(placement, order_id, error)

        arguments = {
            "contract": request.contract,
            "order_type": request.order_type,
            "time_in_force": request.time_in_force,
            "lifecycle": request.lifecycle,
            "direction": request.direction,
            "qty": request.qty,
            "price": None if request.price is None else float(request.price),
            "client_order_id": key,
            "mark": mark,
        }
        begin = self._instance.on_stale
        call = Call("place_order", arguments, deadline, begin=begin, finish=finish, ready=False)
        self._instance.worker("place_order").submit(call)
        placement.call = call
        call.add_done_callback(lambda call: self._call_ended(placement))
        self._instance.settlement.call_began(mark)
        recorded = self._journal.begin(self._instance.id, key, attempt, request)
        recorded.add_done_callback(lambda row: self._recorded(placement, row))

    def _recorded(self, placement: Placement, row: Future[tuple[int, datetime]]) -> None:
        """On the journal's thread: the order's row is durable, so the call may run; or it cannot be
        written."""
        call, worker = placement.call, self._instance.worker("place_order")
        assert call is not None
        error = row.exception()
        if error is not None:
            # It may have got there all the same; settlement then finds that there is no such order.
            self._instance.settlement.call_ended(placement.mark, settled=False)
            self._give_back(placement, error)
            return
        placement.row_id, placement.created = row.result()
        if not worker.release(call):
            unsent = call.exception()
            assert isinstance(unsent, HttpTradingError)
            self._never_sent(placement, unsent)

    def _finish_place(
        self, placement: Placement, order_id: Any, error: HttpTradingError | None
    ) -> None:
        """On the worker, which does not wait for the disk: what became of a sent order."""
        self._instance.on_stale()
        if error is None:
            self._settle(placement, Outcome(PLACED, order_id=order_id), order_id)
        elif isinstance(error, Rejected):
            self._settle(placement, Outcome(REFUSED, reason=error.text), error)
        elif isinstance(error, NOTHING_SENT):
            self._never_sent(placement, error)
        else:
            self._settle(placement, Outcome(UNKNOWN), unknown(placement.key))

    def _never_sent(self, placement: Placement, error: HttpTradingError) -> None:
        self._settle(placement, Outcome(NOT_PLACED, reason=error.text), error)

    def _settle(
        self, placement: Placement, outcome: Outcome, answer: str | HttpTradingError
    ) -> None:
        """Writes the outcome; when it is recorded, those who wait for the order are answered."""
        placement.answer = answer

        def resolve() -> None:
            if not self._forget(placement):
                return  # its request was told in time that nothing was sent
            if isinstance(answer, str):
                placement.set_result(answer)
            else:
                placement.set_exception(answer)

        self._write(placement, outcome, resolve)

    def _write(self, placement: Placement, outcome: Outcome, then: Callable[[], None]) -> None:
        """Gives the outcome to the journal; `then` runs when that is done, or has failed: the
        client is answered all the same, and the journal learns it as soon as it can."""
        assert placement.row_id is not None and placement.call is not None
        settle = partial(
            self._journal.settle, placement.row_id, outcome, soon=self._instance.lists_orders
        )
        settled = outcome.state != UNKNOWN
        began = placement.call.began
        ended = partial(self._instance.settlement.call_ended, placement.mark, began=began)

        def written(future: Future[None]) -> None:
            if future.exception() is None:
                ended(settled=settled)
            else:
                self._recorder.outcome(
                    self._instance.id,
                    lambda: settle().result(),
                    written=partial(ended, settled=settled),
                    dropped=partial(ended, settled=False),  # it is looked for at the broker
                )
            then()

        settle().add_done_callback(written)

    def _call_ended(self, placement: Placement) -> None:
        """The call is over. If it ran, `_finish_place` knows more; if it was not ready,
        `_recorded` will see."""
        call = placement.call
        assert call is not None
        if call.began is None and call.ready:
            error = call.exception()
            assert isinstance(error, HttpTradingError)
            self._never_sent(placement, error)

    def _await_placement(self, placement: Placement, deadline: float, *, replayed: bool) -> Placed:
        try:
            order_id = self._instance.wait(placement, deadline)
        except FutureTimeout:
            if not replayed:
                self._withdraw(placement)
                if placement.call is not None and not placement.call.ready:
                    raise Busy(TOO_SLOW, retry_after=2) from None  # nor will it ever run
            answer = placement.answer
            if answer is None:
                self._instance.settlement.call_late(placement.mark)
                raise unknown(placement.key) from None
            # Until it is recorded the key is taken.
            wait([placement], WRITE_SECONDS)
            if isinstance(answer, HttpTradingError):
                raise _own(answer, replayed) from None
            order_id = answer
        except HttpTradingError as error:
            raise _own(error, replayed) from None
        return Placed(order_id, placement.key, placement.created or datetime.now(UTC), replayed)


def _conflict(key: str) -> IdempotencyConflict:
    return IdempotencyConflict(
        f"clientOrderId {key} names an order with other content; nothing was sent. "
        "Use a new clientOrderId for a new order."
    )


def unknown(key: str) -> OutcomeUnknown:
    error = OutcomeUnknown(
        "The order was sent, but its outcome is not known yet. Do not send it under another "
        f"clientOrderId: ask order/state?clientOrderId={key}, or repeat the same request."
    )
    error.client_order_id = key
    return error


def _own(error: HttpTradingError, replayed: bool = False) -> HttpTradingError:
    """A copy of an error that several requests are answered with: each marks its own."""
    mine = copy.copy(error)
    mine.replayed = replayed
    return mine
