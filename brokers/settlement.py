"""Finds out what became of orders whose outcome is unknown; never by sending, only by looking.

After a start, after each reconnect and after every unknown outcome the broker is asked for a
complete listing. An order found by its mark is `placed`. One that is missing from two listings,
both begun later than the broker needs to accept and to show an order, and with no call of it still
running, is `not placed`, if the listings reach back to when it was sent: it may have been filled
during a long outage; and if they are not empty although there are orders. Until then it stays
unknown, and every answer says so. The time since counts over restarts, however soon they follow
each other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from httptrading.brokers.journal import Journal
from httptrading.brokers.journal_rows import JournalOrder, Outcome
from httptrading.brokers.journal_tables import NOT_PLACED, PLACED, SENDING, UNKNOWN, UNSETTLED
from httptrading.errors import Busy, HttpTradingError, Unsupported
from httptrading.model import OrderReport

if TYPE_CHECKING:
    from httptrading.brokers.instance import Instance

log = logging.getLogger("httptrading.settlement")

LISTING_SECONDS = 20.0
"""How long one listing may take."""

LISTINGS = 2
"""In how many listings an order must be missing before it counts as not placed, the first of them
one `listing_delay` after its call was over, the last not before:"""

PATIENCE = 3.0
"""listing delays after its call was over."""

FIRST_LOOK = 0.3
"""Seconds from an unknown outcome to the first listing: most accepted orders show at once."""

LEAST_PAUSE, GROWTH, LONGEST_PAUSE = 0.2, 1.5, 30.0
"""Seconds between two listings: at least the broker's `listing_delay`, then more and more."""

LOOK_UP = 10
"""Open orders missing from the listing after a reconnect that are asked for one by one."""

CLOCKS_DIFFER = timedelta(minutes=5)
"""How far the broker's clock may be from ours: for orders from before ours, and for how far back
its lists reach."""

POLL = 0.25
"""Seconds between two looks into the journal while somebody waits for a row."""


class Settlement:
    """One instance's thread; it sleeps while nothing is to be settled. Orders go by their mark."""

    def __init__(self, instance: Instance, journal: Journal) -> None:
        self._instance = instance
        self._journal = journal
        self._lock = threading.RLock()
        self._due = threading.Condition(self._lock)  # the thread has something to do
        self._news = threading.Condition(self._lock)  # whoever waits for a row may look again
        self._calls: Counter[str] = Counter()  # orders whose SDK call has not ended
        self._late: set[str] = set()  # those of them that nobody waits for any more
        # Unsettled order → when its call was surely over, at the broker too, monotonic.
        self._over: dict[str, float] = {}
        self._misses: dict[str, int] = {}
        self._born = time.monotonic()  # see start()
        self._next: float | None = None  # when to look next, monotonic
        self._looked = float("-inf")  # when the last listing was begun, monotonic
        self._looks = 0  # listings since the last event
        self._resync = False
        self._drain_until = float("inf")
        self._stopped = False
        self._thread = threading.Thread(
            target=self._run, name=f"httptrading-settle-{instance.masked_id}", daemon=True
        )

    def start(self) -> None:
        """From here on no other process serves the instance: its calls were over by now."""
        if not self._thread.is_alive():
            self._born = time.monotonic()
            self._thread.start()

    def drain(self, until: float) -> None:
        """Nobody waits for a row longer than that (monotonic)."""
        with self._lock:
            self._drain_until = until
            self._news.notify_all()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            self._due.notify_all()
            self._news.notify_all()

    # --- told by the instance -----------------------------------------------------------------
    def call_began(self, mark: str) -> None:
        """Before the order is in the journal: it is not looked for while it is being sent."""
        with self._lock:
            self._calls[mark] += 1

    def call_late(self, mark: str) -> None:
        """Nobody waits for the call any more, but it has not ended: the order may be found, yet it
        cannot count as not placed."""
        with self._lock:
            if mark in self._calls:
                self._late.add(mark)
                self._look_in(FIRST_LOOK)

    def call_ended(self, mark: str, *, settled: bool, began: float | None = None) -> None:
        """What became of it is in the journal. `settled`: and it is no longer in doubt. `began`:
        when it began (monotonic); None: never."""
        with self._lock:
            self._calls -= Counter((mark,))  # drops what has come to nothing
            self._late.discard(mark)
            if not settled:
                over = time.monotonic()
                if began is not None:
                    over = max(over, began + self._instance.broker.booked_within)
                self._over[mark] = over
                self._look_in(FIRST_LOOK)
            self._news.notify_all()

    def connected(self) -> None:
        with self._lock:
            self._resync = True
            self._looks = 0
            self._next = time.monotonic()
            self._due.notify_all()

    def news(self) -> None:
        """Something was recorded that may have settled a row."""
        with self._lock:
            self._news.notify_all()

    def wait_for(self, row: JournalOrder, deadline: float) -> bool:
        """Waits until the row is settled; False when it is not by the deadline."""
        with self._lock:
            self._look_in(0.0)
        while True:
            known = self._journal.by_row_id(row.row_id)
            if known is None or known.state not in UNSETTLED:
                return True
            with self._lock:
                left = min(deadline, self._drain_until) - time.monotonic()
                hopeless = not self._instance.lists_orders and row.mark not in self._calls
                if left <= 0 or self._stopped or hopeless:
                    return False
                self._news.wait(min(left, POLL))

    def _look_in(self, seconds: float) -> None:
        """An event: a listing is due soon, but not right after the last one."""
        self._looks = 0
        self._wake_at(max(time.monotonic() + seconds, self._looked + self._pause()))

    def _wake_at(self, moment: float) -> None:
        self._next = moment if self._next is None else min(self._next, moment)
        self._due.notify_all()

    def _pause(self) -> float:
        least = max(float(self._instance.broker.listing_delay), LEAST_PAUSE)
        return min(least * GROWTH ** max(0, self._looks - 1), max(least, LONGEST_PAUSE))

    # --- the thread ---------------------------------------------------------------------------
    def _run(self) -> None:
        self._note_calls_of_before()
        while self._wait():
            pause: float | None
            try:
                pause = self._look()
            except Busy:
                pause = 1.0
            except HttpTradingError as error:
                pause = min(max(1.0, error.retry_after or 0.0), LONGEST_PAUSE)
            except Exception:
                log.exception("settling failed")
                pause = 10.0
            if pause is not None:
                with self._lock:
                    self._wake_at(time.monotonic() + pause)

    def _note_calls_of_before(self) -> None:
        """What an earlier process was sending when it was killed is over by now; the next one is
        to know since when."""
        with suppress(Busy):
            rows = self._journal.unsettled(self._instance.id)
            with self._lock:
                of_before = [row for row in rows if row.mark not in self._calls]
            for row in of_before:
                if row.state == SENDING:
                    self._journal.settle(row.row_id, Outcome(UNKNOWN))

    def _over_before(self, row: JournalOrder) -> float:
        """When the call of an order of an earlier process was surely over, at the broker too."""
        over = self._born
        if row.state == UNKNOWN:
            age = (datetime.now(UTC) - row.updated).total_seconds()
            over = min(over, time.monotonic() - age)
        return over + self._instance.broker.booked_within

    def _wait(self) -> bool:
        """Until a look is due; False when the service stops."""
        with self._lock:
            while not self._stopped:
                now = time.monotonic()
                if self._next is not None and self._next <= now:
                    self._next = None
                    return True
                self._due.wait(None if self._next is None else self._next - now)
            return False

    def _look(self) -> float | None:
        """Looks once; returns the seconds until the next look, or None when nothing is open."""
        with self._lock:
            resync, calls, late = self._resync, set(self._calls), set(self._late)
        rows = self._journal.unsettled(self._instance.id)
        with self._lock:
            calls.update(self._calls)  # and those that have begun meanwhile
        ended = [row for row in rows if row.mark not in calls]
        if not ended and not late and not resync:
            self._forget_settled(rows)
            return None
        began, seen = time.monotonic(), time.time()
        with self._lock:
            self._looked = began
            self._looks += 1
            resync, self._resync = resync or self._resync, False  # or meanwhile
        try:
            reports = self._instance.list_recent(began + LISTING_SECONDS)
            self._journal.record(self._instance.id, reports, seen)
        except Unsupported:
            if ended:
                log.warning(
                    "instance %s: %d orders cannot be settled: the broker has no listing",
                    self._instance.masked_id,
                    len(ended),
                )
            return None
        except BaseException:
            with self._lock:
                self._resync = self._resync or resync
            raise
        found = {report.mark for report in reports if report.mark and report.order.order_id}
        with self._lock:
            # Not those that have become late since: the next look is for them.
            self._late -= found | (late - {row.mark or "" for row in rows})
            self._news.notify_all()
        left = self._judge([row for row in ended if row.mark not in found], reports, began)
        if resync:
            self._look_up_missing(reports, datetime.fromtimestamp(seen, UTC))
        with self._lock:
            self._news.notify_all()
            return self._next_pause(left) if left or self._late else None

    def _next_pause(self, left: list[JournalOrder]) -> float:
        """Until the next listing: when it can settle something soon, else with growing pauses."""
        now, delay = time.monotonic(), float(self._instance.broker.listing_delay)
        overs = [self._over.get(row.mark or "", now) for row in left]
        moments = [over + delay * times for over in overs for times in (1.0, PATIENCE)]
        telling = min((moment for moment in moments if moment > now), default=None)
        if telling is None and any(self._misses.get(row.mark or "") == 1 for row in left):
            return LEAST_PAUSE  # the next one is the last
        if telling is None or telling > now + delay * PATIENCE:
            return self._pause()
        return max(delay, LEAST_PAUSE, telling - now)

    def _judge(
        self, rows: list[JournalOrder], reports: list[OrderReport], began: float
    ) -> list[JournalOrder]:
        """Settles those of the missing rows that the listing proves not to be there; returns the
        rows that stay open."""
        delay = self._instance.broker.listing_delay
        now = datetime.now(UTC)
        since = self._instance.listed_since(now + CLOCKS_DIFFER)
        shown = {report.mark for report in reports if report.mark}  # some without an id as yet
        if not reports and self._lacks_known(since, began):
            log.warning(
                "instance %s: the broker lists no orders but has some; nothing is settled by that",
                self._instance.masked_id,
            )
            return rows
        left = []
        for row in rows:
            mark = row.mark or ""
            # From after our clock, which was set back: lists that end at `now`, or that tell of the
            # broker's own day only, need not have it.
            if mark in shown or row.created > now + CLOCKS_DIFFER:
                left.append(row)
                continue
            if row.created < since + CLOCKS_DIFFER:
                # Not in `left`: what listings cannot settle is no reason to ask for the next one.
                log.warning(
                    "order %s stays unknown: the broker's lists do not reach back to it",
                    row.client_order_id,
                )
                continue
            with self._lock:
                over = self._over.setdefault(mark, self._over_before(row))
            if began >= over + delay:
                self._misses[mark] = self._misses.get(mark, 0) + 1
            proven = self._misses.get(mark, 0) >= LISTINGS and began >= over + delay * PATIENCE
            if not proven or self._may_be_there(row, reports):
                left.append(row)
                continue
            outcome = Outcome(NOT_PLACED, reason="The broker's lists do not have it.")
            self._journal.settle(row.row_id, outcome).result()
            log.info("order %s: not placed", row.client_order_id)
        self._forget_settled(left)
        return left

    def _lacks_known(self, since: datetime, began: float) -> bool:
        """Whether a list without any order lacks one that works or was filled, and that it reaches
        back to: it is no complete one then. Some brokers write no orders and no answer alike (Tiger
        leaves out the data of both)."""
        late = time.monotonic() - began + self._instance.broker.listing_delay * PATIENCE
        known = self._journal.orders(
            self._instance.id, open_=None, since=since + CLOCKS_DIFFER, limit=100
        )
        before = datetime.now(UTC) - timedelta(seconds=late)
        return any(
            row.created < before and (row.is_open or row.order.filled_qty > 0) for row in known
        )

    def _may_be_there(self, row: JournalOrder, reports: list[OrderReport]) -> bool:
        """Whether the listing has an order that tells no mark and might be this one: of the same
        content, and not known from elsewhere or from before."""
        for report in reports:
            if report.mark or not _like(row, report):
                continue
            known = self._journal.by_order_id(self._instance.id, report.order.order_id)
            explained = known is not None and (known.row_id < row.row_id or known.state == PLACED)
            if not explained:
                log.warning(
                    "order %s stays unknown: the broker lists one like it without a mark",
                    row.client_order_id,
                )
                return True
        return False

    def _forget_settled(self, left: list[JournalOrder]) -> None:
        keep = {row.mark for row in left}
        with self._lock:
            # A call that has just ended has its time noted already, its row not yet read.
            newest = time.monotonic() - LISTING_SECONDS * 2
            self._over = {
                mark: over for mark, over in self._over.items() if mark in keep or over > newest
            }
            self._misses = {mark: count for mark, count in self._misses.items() if mark in keep}

    def _look_up_missing(self, reports: list[OrderReport], seen: datetime) -> None:
        """After a reconnect: what the journal holds open and the listing lacks; what was heard of
        since the listing was asked for, at `seen`, need not be in it."""
        listed = {report.order.order_id for report in reports}
        open_rows = self._journal.orders(self._instance.id, open_=True, since=None, limit=100)
        missing = [row for row in open_rows if row.order_id not in listed and row.updated < seen]
        for row in missing[:LOOK_UP]:
            try:
                self._instance.order(row.order_id, None, time.monotonic() + LISTING_SECONDS)
            except HttpTradingError as error:
                log.info("orders from %s on: not refreshed (%s)", row.order_id, error.code)
                return


def _from_before(row: JournalOrder, moment: datetime | None) -> bool:
    """Surely: a time without a zone may be any."""
    if moment is None or moment.tzinfo is None:
        return False
    return moment < row.created - CLOCKS_DIFFER


def _like(row: JournalOrder, report: OrderReport) -> bool:
    """Whether a report could be of this row's order; what it does not tell, it may be."""
    return (
        report.order.qty in (row.asked_qty, 0)
        and report.contract in (row.contract, None)
        and report.direction in (row.direction, None)
        and report.order_type in (row.order_type, None)
        and not _from_before(row, report.time)
    )
