"""Finds out what became of orders whose outcome is unknown; never by sending, only by looking.

After a start, after each reconnect and after every unknown outcome the broker is asked for a
complete listing. An order found by its mark is `placed`. One that is missing from two listings,
both begun later than the broker needs to show an accepted order, and with no call of it still
running, is `not placed`. Until then it stays unknown, and every answer says so.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from httptrading.brokers.journal import UNSETTLED, Journal, JournalOrder
from httptrading.errors import BrokerUnavailable, HttpTradingError, Unsupported
from httptrading.model import OrderReport

if TYPE_CHECKING:
    from httptrading.brokers.instance import Instance

log = logging.getLogger("httptrading.settlement")

LISTING_SECONDS = 20.0
"""How long one listing may take."""

LISTINGS = 2
"""In how many listings an order must be missing before it counts as not placed."""

LOOK_UP = 10
"""Open orders missing from the listing after a reconnect that are asked for one by one."""


class Settlement:
    """One instance's thread; it sleeps while there is nothing to settle."""

    def __init__(self, instance: Instance, journal: Journal) -> None:
        self._instance = instance
        self._journal = journal
        self._changed = threading.Condition()
        self._running: set[int] = set()  # rows whose SDK call has not ended
        self._since: dict[int, float] = {}  # row → since when its call is over, monotonic
        self._misses: dict[int, int] = {}
        self._resync = False
        self._due = False
        self._stopped = False
        self._thread = threading.Thread(
            target=self._run, name=f"httptrading-settle-{instance.masked_id}", daemon=True
        )

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # --- told by the instance -----------------------------------------------------------------
    def call_began(self, row_id: int) -> None:
        with self._changed:
            self._running.add(row_id)

    def call_ended(self, row_id: int) -> None:
        with self._changed:
            self._running.discard(row_id)
            self._since[row_id] = time.monotonic()
            self._due = True
            self._changed.notify_all()

    def connected(self) -> None:
        with self._changed:
            self._resync = True
            self._changed.notify_all()

    def news(self) -> None:
        """Something was recorded that may have settled a row."""
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, row_id: int, deadline: float) -> bool:
        """Waits until the row is settled; False when it is not by the deadline."""
        with self._changed:
            self._due = True
            self._changed.notify_all()
        while True:
            row = self._journal.by_row_id(row_id)
            if row is None or row.state not in UNSETTLED:
                return True
            with self._changed:
                left = deadline - time.monotonic()
                if left <= 0 or self._stopped:
                    return False
                self._changed.wait(min(left, 0.25))

    # --- the thread ---------------------------------------------------------------------------
    def _run(self) -> None:
        pause: float | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._resync or self._due, pause)
                if self._stopped:
                    return
                self._due = False
            try:
                pause = self._settle()
            except Exception:
                log.exception("settling failed")
                pause = 10.0

    def _settle(self) -> float | None:
        """Looks once; returns the seconds until the next look, or None when nothing is open."""
        rows = self._journal.unsettled(self._instance.id)
        with self._changed:
            rows = [row for row in rows if row.row_id not in self._running]
            resync = self._resync
            now = time.monotonic()
            for row in rows:
                self._since.setdefault(row.row_id, now)
        if not rows and not resync:
            self._forget_settled(rows)
            return None
        delay = self._instance.broker.listing_delay
        began = time.monotonic()
        try:
            reports = self._instance.list_recent(began + LISTING_SECONDS)
        except Unsupported:
            with self._changed:
                self._resync = False
            if rows:
                log.warning(
                    "instance %s: %d orders cannot be settled: the broker has no listing",
                    self._instance.masked_id,
                    len(rows),
                )
            return None
        except BrokerUnavailable as error:
            return max(1.0, error.retry_after or 0.0)
        except HttpTradingError as error:
            return max(1.0, min(error.retry_after or 2.0, 30.0))
        self._journal.record(self._instance.id, reports)
        with self._changed:
            self._resync = False
        left = self._judge(rows, reports, began, delay)
        if resync:
            self._look_up_missing(reports)
        with self._changed:
            self._changed.notify_all()
        return max(delay, 0.2) if left else None

    def _judge(
        self, rows: list[JournalOrder], reports: list[OrderReport], began: float, delay: float
    ) -> list[JournalOrder]:
        """Settles what the listing proves; returns the rows that stay open."""
        found = {report.mark for report in reports if report.mark}
        left = []
        for row in rows:
            if row.mark in found:
                log.info("order %s: placed after all", row.client_order_id)
                continue
            if began >= self._since[row.row_id] + delay:
                self._misses[row.row_id] = self._misses.get(row.row_id, 0) + 1
            if self._misses.get(row.row_id, 0) >= LISTINGS:
                self._journal.not_placed(row.row_id, "The broker's lists do not have it")
                log.info("order %s: not placed", row.client_order_id)
            else:
                left.append(row)
        self._forget_settled(left)
        return left

    def _forget_settled(self, left: list[JournalOrder]) -> None:
        keep = {row.row_id for row in left}
        with self._changed:
            keep |= self._running
            # A call that ended this moment has its time noted already, its row not yet read.
            newest = time.monotonic() - 60
            self._since = {
                row: since for row, since in self._since.items() if row in keep or since > newest
            }
            self._misses = {row: count for row, count in self._misses.items() if row in keep}

    def _look_up_missing(self, reports: list[OrderReport]) -> None:
        """After a reconnect: what the journal holds open and the listing lacks."""
        listed = {report.order.order_id for report in reports}
        open_rows = self._journal.orders(self._instance.id, open_=True, since=None, limit=100)
        missing = [row for row in open_rows if row.order_id not in listed]
        for row in missing[:LOOK_UP]:
            try:
                self._instance.order(row.order_id, None, time.monotonic() + LISTING_SECONDS)
            except HttpTradingError as error:
                log.info("order %s: not refreshed (%s)", row.order_id, error.code)
