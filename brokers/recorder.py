"""Writes what pushes say to the journal, off the threads that must not wait.

A push storm becomes few transactions: whatever has come in since the last one is written together.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

from httptrading.brokers.journal import Journal
from httptrading.errors import Busy
from httptrading.model import Fill, OrderReport

log = logging.getLogger("httptrading.journal")

BATCH = 500
MOST_WAITING = 100_000
"""Beyond (a journal that cannot be written for long), news is dropped: the broker still has it."""


@dataclass
class _News:
    instance_id: str
    reports: tuple[OrderReport, ...] = ()
    fills: tuple[Fill, ...] = ()
    written: Callable[[], None] | None = None


class Recorder:
    """One thread and its queue."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._queue: queue.SimpleQueue[_News | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="httptrading-recorder", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Writes what has come in so far, then ends."""
        self._queue.put(None)
        self._thread.join(seconds)

    def reports(
        self, instance_id: str, reports: tuple[OrderReport, ...], written: Callable[[], None]
    ) -> None:
        """`written` is called once they are in the journal."""
        self._put(_News(instance_id, reports=reports, written=written))

    def fills(self, instance_id: str, fills: tuple[Fill, ...]) -> None:
        self._put(_News(instance_id, fills=fills))

    def _put(self, news: _News) -> None:
        if self._queue.qsize() < MOST_WAITING:
            self._queue.put(news)

    def _run(self) -> None:
        stopping = False
        while not stopping:
            batch: list[_News] = []
            item = self._queue.get()
            while True:
                if item is None:
                    stopping = True
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
            try:
                self._journal.record(
                    instance_id, [report for news in mine for report in news.reports]
                )
                self._journal.record_fills(
                    instance_id, [fill for news in mine for fill in news.fills]
                )
            except Busy:
                log.error("%d pushes could not be recorded", len(mine))
            except Exception:
                log.exception("recording pushes failed")
            for news in mine:
                if news.written is not None:
                    news.written()
