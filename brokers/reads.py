"""Answers from memory: identical reads share one broker call, and a young answer serves again.

An answer's age counts from the moment its call *began*, so it is never older than documented.
Whatever changes something at the broker (placing, cancelling, a push) makes all of it stale, also
the reads under way: a client that has just placed an order never sees the world before it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from httptrading.brokers.worker import Call

AGES: Mapping[str, float] = {
    "ping": 1.0,
    "quote": 0.5,
    "market_status": 5.0,
    "cash": 1.0,
    "positions": 1.0,
    "order": 0.5,
    "recent_orders": 2.0,
    "fills": 1.0,
}
"""Seconds for which a read may be answered from memory, unless the broker or the configuration
says otherwise."""


@dataclass
class SharedRead:
    """One broker call and those who wait for it."""

    call: Call
    generation: int
    waiting: int = 1


class ReadMemory:
    """The reads of one instance, by operation and arguments."""

    def __init__(self, ages: Mapping[str, float]) -> None:
        self._ages = {**AGES, **ages}
        self._lock = threading.Lock()
        self._generation = 0
        self._under_way: dict[Hashable, SharedRead] = {}
        self._answers: dict[Hashable, Call] = {}

    def stale(self) -> None:
        with self._lock:
            self._generation += 1
            self._answers.clear()

    def answer(self, operation: str, key: Hashable) -> tuple[bool, Any]:
        """(True, value) when a young answer is known."""
        with self._lock:
            found = self._young(operation, key)
        return (False, None) if found is None else (True, found.result())

    def _young(self, operation: str, key: Hashable) -> Call | None:
        found = self._answers.get(key)
        if found is None or found.began is None:
            return None
        return found if time.monotonic() - found.began < self._ages[operation] else None

    def join(
        self, operation: str, key: Hashable, fresh: bool, make_call: Callable[[], Call]
    ) -> SharedRead:
        """The read under way that may be shared, else a new one; `fresh` never shares.

        What `make_call` raises (no connection, no slot, queue full) passes through.
        """
        with self._lock:
            ended = None if fresh else self._young(operation, key)
            if ended is not None:  # in the moment since the caller looked for an answer
                return SharedRead(ended, self._generation)
            shared = self._under_way.get(key)
            if (
                shared is not None
                and not fresh
                and shared.generation == self._generation
                and shared.waiting  # else its last waiter is just taking it out of the queue
            ):
                shared.waiting += 1
                return shared
            # Under the lock, so that reads that come at the same moment make one call.
            shared = self._under_way[key] = SharedRead(make_call(), self._generation)
        shared.call.add_done_callback(lambda call: self._ended(operation, key, shared))
        return shared

    def leave(self, shared: SharedRead) -> bool:
        """A waiter gives up; True when nobody waits for the call any more."""
        with self._lock:
            shared.waiting -= 1
            return shared.waiting == 0

    def _ended(self, operation: str, key: Hashable, shared: SharedRead) -> None:
        call = shared.call
        with self._lock:
            if self._under_way.get(key) is shared:
                del self._under_way[key]
            young = self._ages[operation] > 0 and shared.generation == self._generation
            if young and call.exception() is None and call.began is not None:
                if len(self._answers) > 1000:
                    self._answers.clear()
                known = self._answers.get(key)
                if known is None or known.began is None or known.began < call.began:
                    self._answers[key] = call
