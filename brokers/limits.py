"""Sliding rate windows of an account or a login: what the broker forbids never reaches it.

A slot is taken when a call begins and is logged when the call has *ended*: the broker sees the
request some time between the two, so this way it never counts one more than it allows, however
slow the network is. The log is our own ten lines: the well-kept libraries (limits, pyrate-limiter)
stamp a call when it begins, cannot hold a slot for a running call, and do not tell how long a call
would wait behind those already queued, which a true `Retry-After` needs.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from httptrading.brokers.base import Window
from httptrading.errors import RateLimited

READ = 2
"""The priority of reads; those of a worker's queue that come still later are the same here."""


class _Slots:
    """One window: when its logged calls ended, the running calls, and those waiting for a slot."""

    def __init__(self, window: Window, key: str = "") -> None:
        """`key` names it among all windows of all accounts."""
        self.window = window
        self.running = 0
        self.queued = [0, 0, 0]  # by priority
        self._ends: deque[float] = deque(maxlen=window.limit)
        self.last = -math.inf  # when a call last began or ended
        self._key = key
        self._notes: Path | None = None
        self._noting = threading.Lock()

    def wait(self, ahead: int, *, priority: int, gaps: bool = True) -> float:
        """Seconds until one more call may begin after `ahead` others."""
        now = time.monotonic()
        window = self.window
        self._forget(now)
        wait = 0.0
        if gaps and window.gap:
            wait = self.last + window.gap * (ahead + 1) - now
        usable = window.usable(priority)
        # Those ahead fill the window again and again before it is this call's turn.
        rounds, ahead = divmod(ahead, usable)
        # So many calls must have left it then: the log's oldest first, the running ones after.
        leaving = len(self._ends) + self.running + ahead + 1 - usable
        if leaving > 0:
            end = self._ends[leaving - 1] if leaving <= len(self._ends) else now
            wait = max(wait, end + window.seconds * (rounds + 1) - now)
        return max(wait, window.seconds * rounds)

    def begin(self) -> None:
        self.running += 1
        self.last = time.monotonic()

    def end(self) -> None:
        self.running -= 1
        self.last = time.monotonic()
        self._ends.append(self.last)

    def keep_in(self, folder: Path) -> None:
        """Goes on from what an earlier process has noted in this folder, and notes there. A call
        that was running when it was killed has ended by now."""
        if self._notes is not None:
            return
        self._notes = folder / hashlib.sha256(self._key.encode()).hexdigest()[:32]
        noted = array("d")
        try:
            noted.frombytes(self._notes.read_bytes())
            running, ended, *moments = map(float, noted)
            # A clock that was set back makes them later than now.
            ages = [max(0.0, time.time() - moment) for moment in moments[: int(ended)]]
            ages += [0.0] * min(int(running), self.window.limit)
        except (OSError, ValueError, OverflowError):  # nothing, or nothing of ours
            return
        now = time.monotonic()
        self._ends.extend(now - age for age in ages)  # the oldest first, as they were noted

    def note(self) -> None:
        """What was written outlives the process, killed or not. A machine that has lost it by a
        power cut takes as long to start as the windows last."""
        if self._notes is None:
            return
        with self._noting:
            with _lock:
                clock = time.time() - time.monotonic()
                moments = [clock + end for end in self._ends]
                noted = array("d", [self.running, len(moments), *moments])
            with suppress(OSError):  # a full disk, say; this life's calls are counted all the same
                # In one write, and nothing is cut off before it: never half a note.
                file = os.open(self._notes, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    os.write(file, noted)
                finally:
                    os.close(file)

    def left(self) -> int:
        self._forget(time.monotonic())
        return self.window.limit - len(self._ends) - self.running

    def _forget(self, now: float) -> None:
        while self._ends and self._ends[0] + self.window.seconds <= now:
            self._ends.popleft()


@dataclass(frozen=True)
class WindowState:
    """What is left of a window, for people and metrics; reads may not use what is kept of it."""

    limit: int
    seconds: float
    left: int
    kept: int
    kept_for_orders: int


_lock = threading.Lock()
"""One for all windows, as some are shared."""


class Windows:
    """All windows of one instance; safe from any thread.

    A call is admitted (queued), begun and ended, or withdrawn before it began.
    """

    def __init__(
        self,
        declared: Mapping[str, Window],
        slots_of: Callable[[str, Window], _Slots] = lambda _, window: _Slots(window),
    ) -> None:
        self._slots = {name: slots_of(name, window) for name, window in declared.items()}

    def admit(self, costs: Iterable[str], *, priority: int, patience: float) -> None:
        """Queues a call; RateLimited when its slots come free only after `patience` seconds. Those
        queued with a later priority are not ahead of it."""
        priority = min(priority, READ)
        wanted = self._wanted(costs)
        with _lock:
            wait = max(
                (
                    slot.wait(sum(slot.queued[: priority + 1]) + number - 1, priority=priority)
                    for slot, number in wanted
                ),
                default=0.0,
            )
            if wait > patience:
                raise _too_often(wait)
            for slot, number in wanted:
                slot.queued[priority] += number

    def begin(self, costs: Iterable[str], *, priority: int) -> float:
        """Takes the slots of a queued call; 0 when it may run now, else the seconds to wait."""
        priority = min(priority, READ)
        wanted = self._wanted(costs)
        with _lock:
            # The gap between two calls of one operation is that operation's own affair.
            wait = max(
                (
                    max(
                        slot.wait(0, priority=priority),
                        slot.wait(number - 1, priority=priority, gaps=False),
                    )
                    for slot, number in wanted
                ),
                default=0.0,
            )
            if wait > 0:
                return wait
            for slot, number in wanted:
                slot.queued[priority] -= number
                for _ in range(number):
                    slot.begin()
            return 0.0

    def _wanted(self, costs: Iterable[str]) -> list[tuple[_Slots, int]]:
        """Each window with the number of slots that a call takes in it."""
        return [(self._slots[name], number) for name, number in Counter(costs).items()]

    def withdraw(self, costs: Iterable[str], *, priority: int) -> None:
        """A queued call will never run."""
        with _lock:
            for name in costs:
                self._slots[name].queued[min(priority, READ)] -= 1

    def end(self, costs: Iterable[str]) -> None:
        """A call that had begun has ended."""
        with _lock:
            for name in costs:
                self._slots[name].end()

    def take(self, name: str, *, priority: int = READ, own: float = -math.inf) -> None:
        """Begins one call outside the queue, to be ended like any; RateLimited when there is no
        slot right now. What is kept for cancellations is not for those beside them.

        The gap to an earlier call of the operation that makes this one is that operation's own
        affair: `own` is when (monotonic) it last began one. Others' calls may have come since.
        """
        with _lock:
            slot = self._slots[name]
            priority = min(max(1, priority), READ)
            wait = slot.wait(0, priority=priority, gaps=slot.last > own)
            if wait > 0:
                raise _too_often(wait)
            slot.begin()

    def keep_in(self, folder: Path) -> None:
        """What an earlier process has sent still counts, if it was noted in this folder; so is what
        this one sends from now on."""
        if self._slots:
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _lock:
            for slot in self._slots.values():
                slot.keep_in(folder)

    def note(self, costs: Iterable[str]) -> None:
        """After a call has begun, before it is sent, and after it has ended; may wait for a slow
        disk, and holds nobody else up then."""
        for name in set(costs):
            self._slots[name].note()

    def state(self) -> dict[str, WindowState]:
        with _lock:
            return {
                name: WindowState(
                    slot.window.limit,
                    slot.window.seconds,
                    slot.left(),
                    slot.window.kept,
                    slot.window.kept_for_orders,
                )
                for name, slot in self._slots.items()
            }


def _too_often(wait: float) -> RateLimited:
    seconds = max(1, math.ceil(wait))
    return RateLimited(
        f"The broker's rate limit is used up; nothing was sent. Try again in {seconds} s.",
        retry_after=wait,
    )


_shared: dict[str, _Slots] = {}


def shared_windows(key_of: Callable[[str], str], declared: Mapping[str, Window]) -> Windows:
    """Windows of which those with the same `key_of(name)` and name are one, for all instances."""
    with _lock:
        return Windows(
            declared,
            lambda name, window: _shared.setdefault(
                key := f"{key_of(name)} {name}", _Slots(window, key)
            ),
        )
