"""Shares the server's threads out, so that requests waiting for one broker never take them all.

Half of the threads is kept in equal parts for the instances, the other half is for whoever comes,
and some more are for orders and cancellations alone: hanging quotes refuse and delay no cancel.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from httptrading.errors import Busy

SPARE = 4
"""Threads for changes alone, if there are enough; the service's own server has so many beyond those
that are configured."""

BRIEF = 0.25
"""Seconds within which a broker that is not hanging answers; a read waits so long for a place."""

LIVELY = 1.0
"""Seconds for which a brief answer shows that it is not hanging; it has so long for the first."""


class Bulkhead:
    """Counts the requests under way."""

    def __init__(self, threads: int, instance_ids: Iterable[str]) -> None:
        self._spare = min(SPARE, threads // 3)
        threads -= self._spare
        self._under_way = dict.fromkeys(instance_ids, 0)
        self._kept = threads // 2 // max(1, len(self._under_way))
        self._common = threads - self._kept * len(self._under_way)
        self._is_alone = len(self._under_way) == 1
        self._begun: list[float] = []
        self._brief = float("-inf")  # when the last brief request ended
        self._freed = threading.Condition()

    @contextmanager
    def place(self, instance_id: str, *, changes: bool) -> Iterator[None]:
        """One request of the instance; Busy when there is no thread for it. `changes`: it may place
        or cancel an order."""
        began = time.monotonic()
        with self._freed:
            # Where there is no neighbour to be held up, a crowd whose requests are brief queues.
            if self._is_alone and not changes and self._is_lively(began):
                self._freed.wait_for(lambda: self._has_room(instance_id), BRIEF)
            spare = not self._has_room(instance_id)
            if spare and not (changes and self._spare):
                raise Busy(
                    "Too many requests for this instance are under way; nothing was sent.",
                    retry_after=1,
                )
            if spare:
                self._spare -= 1
            else:
                self._common -= self._under_way[instance_id] >= self._kept
                self._under_way[instance_id] += 1
            self._begun.append(began)
        try:
            yield
        finally:
            now = time.monotonic()
            with self._freed:
                self._begun.remove(began)
                if now - began < BRIEF:
                    self._brief = now
                if spare:
                    self._spare += 1
                else:
                    self._under_way[instance_id] -= 1
                    # Whichever of its requests ends first, those beyond the kept ones hold the
                    # common.
                    self._common += self._under_way[instance_id] >= self._kept
                self._freed.notify()

    def _is_lively(self, now: float) -> bool:
        return max(self._brief, min(self._begun, default=now)) > now - LIVELY

    def _has_room(self, instance_id: str) -> bool:
        return self._under_way[instance_id] < self._kept or self._common > 0
