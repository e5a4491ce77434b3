"""Shares the server's threads out, so that requests waiting for one broker never take them all.

Half of the threads is kept in equal parts for the instances, the other half is for whoever comes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from httptrading.errors import Busy


class Bulkhead:
    """Counts the requests under way."""

    def __init__(self, threads: int, instance_ids: Iterable[str]) -> None:
        self._under_way = dict.fromkeys(instance_ids, 0)
        self._kept = threads // 2 // max(1, len(self._under_way))
        self._common = threads - self._kept * len(self._under_way)
        self._lock = threading.Lock()

    @contextmanager
    def place(self, instance_id: str) -> Iterator[None]:
        """One request of the instance; Busy when there is no thread for it."""
        with self._lock:
            common = self._under_way[instance_id] >= self._kept
            if common and self._common == 0:
                raise Busy(
                    "Too many requests for this instance are under way; nothing was sent.",
                    retry_after=1,
                )
            self._common -= common
            self._under_way[instance_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._under_way[instance_id] -= 1
                # Whichever of its requests ends first, those beyond the kept ones hold the common.
                self._common += self._under_way[instance_id] >= self._kept
