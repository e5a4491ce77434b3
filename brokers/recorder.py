"""Writes to the journal off the threads that must not wait: pushes, and what failed to be written.

A push storm becomes few transactions: whatever has come in since the last one is written together.
While the journal cannot be written (disk full), everything is kept and tried again.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from httptrading.brokers.journal import Journal
from httptrading.errors import Busy
from httptrading.model import Fill, OrderReport

log = logging.getLogger("httptrading.journal")

BATCH = 500
MOST_WAITING = 100_000
"""Beyond (a journal that cannot be written for long), pushes are dropped: the broker still has what
they said."""

GATHER = 0.02
"""Seconds in which more may come: an order's first pushes arrive with its answer, whose record is
what the client waits for."""

RETRY = 0.5
"""Seconds between two attempts to write."""


@dataclass
class _News:
    instance_id: str
    seen: float
    reports: tuple[OrderReport, ...] = ()
    fills: tuple[Fill, ...] = ()
    write: Callable[[], None] | None = None
    written: Callable[[], None] | None = None
    dropped: Callable[[], None] | None = None


class Recorder:
    """One thread and its queue."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._queue: queue.SimpleQueue[_News | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="httptrading-recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Writes what has come in so far, then ends."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join(seconds)

    def reports(
        self,
        instance_id: str,
        reports: tuple[OrderReport, ...],
        seen: float,
        written: Callable[[], None],
    ) -> None:
        """`seen`: when the push came in (`time.time()`); `written` is called once it is in the
        journal."""
        self._put(_News(instance_id, seen, reports=reports, written=written))

    def fills(self, instance_id: str, fills: tuple[Fill, ...]) -> None:
        self._put(_News(instance_id, time.time(), fills=fills))

    def outcome(
        self,
        instance_id: str,
        write: Callable[[], None],
        written: Callable[[], None],
        dropped: Callable[[], None],
    ) -> None:
        """What became of a sent order, which could not be written just now. `dropped` is called
        when the journal takes everything else, but not this."""
        self._queue.put(
            _News(instance_id, time.time(), write=write, written=written, dropped=dropped)
        )

    def _put(self, news: _News) -> None:
        if self._queue.qsize() < MOST_WAITING:
            self._queue.put(news)

    def _run(self) -> None:
        ended = False
        while not ended:
            batch: list[_News] = []
            item = self._queue.get()
            self._stopping.wait(GATHER)
            while True:
                if item is None:
                    ended = True
                    break
                batch.append(item)
                if len(batch) >= BATCH:
                    break
                try:
                    item = self._queue.get_nowait()
                except queue.Empty:
                    break
            self._write(batch)

    def _write(self, batch: list[_News]) -> None:
        for instance_id in dict.fromkeys(news.instance_id for news in batch):
            mine = [news for news in batch if news.instance_id == instance_id]
            if self._written(mine):
                continue
            for news in mine:  # one of them is odd; the others are not to be lost with it
                recorded = len(mine) > 1 and self._written([news])
                if not recorded and news.dropped is not None:
                    news.dropped()

    def _written(self, mine: list[_News]) -> bool:
        """False for something that cannot be recorded. Waits while the journal cannot be written,
        unless the service is stopping."""
        while True:
            try:
                self._record(mine)
            except Busy as error:
                if error.retry_after is None:  # it is not the journal's state, but what is written
                    return False
                if not self._stopping.wait(RETRY):
                    continue
                log.error("the journal could not be written until the end; pushes are lost")
            except Exception:
                log.exception("recording %d pushes failed", len(mine))
                return False
            return True

    def _record(self, mine: list[_News]) -> None:
        instance_id = mine[0].instance_id
        for news in mine:
            if news.write is not None:
                news.write()
        reports = [report for news in mine for report in news.reports]
        self._journal.record(instance_id, reports, min(news.seen for news in mine))
        fills = [fill for news in mine for fill in news.fills]
        self._journal.record_fills(instance_id, fills)
        for news in mine:
            if news.written is not None:
                news.written()
