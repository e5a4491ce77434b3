"""Workers: a bounded queue in front of the one thread that owns a broker connection.

    request thread ── submit ──▶ queue ──▶ lane (thread with an asyncio loop) ── broker
          ▲                                  │
          └──────── Call.result ◀────────────┘

A *call* is a Future with an operation, a deadline and a priority. `Worker.withdraw()` succeeding
is the proof that nothing was sent. A *lane* is one life of the connection: its thread connects,
runs one call at a time, reconnects with growing pauses, and closes. A lane stuck beyond its limit
is abandoned for a fresh one; its late result still reaches the call's `finish`.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from httptrading.brokers.base import CHANGES, Link
from httptrading.brokers.checked import NonsenseAnswer, checked
from httptrading.brokers.limits import Windows
from httptrading.errors import (
    BrokerUnavailable,
    Busy,
    HttpTradingError,
    InternalError,
    RateLimited,
    TimedOut,
)
from httptrading.model import Contract, Fill, OrderReport, Quote

log = logging.getLogger("httptrading.worker")

BACK_OFF = (0.5, 1.0, 2.0, 3.0)
"""Pauses between attempts to connect, in seconds: short enough to be back within 5 s."""

STEADY = 5.0
"""Seconds a connection must have lived for its loss to be answered by an attempt at once."""

REPLACE_GRACE = 0.25
"""Seconds a call may run past its limit before its lane is given up."""

RECONNECTS_WITHIN = 3.0
"""Seconds that a new connection and the order after it are given: so long before its deadline, an
order or cancellation is worth more than a read that runs beyond its limit."""

STUCK_LOOKS = 3
"""Looks in a row that must find a lane beyond its limit: after a standstill of the whole process (a
suspended machine) every limit has passed at the first look, and no broker is to blame."""

MOST_ABANDONED = 8
"""Stuck threads per worker; beyond, no more are made until one of them ends."""

PRIORITIES = {"cancel_order": 0, "place_order": 1, "recent_orders": 2}
"""Cancels go ahead of places, places ahead of reads (3); in rate windows as well (`Window`)."""


class Backend(Protocol):
    """What a lane runs its calls on: a broker in this thread, or one in a child process."""

    async def open(self, seconds: float) -> None: ...

    async def run(self, operation: str, arguments: Mapping[str, Any], seconds: float) -> Any: ...

    async def close(self) -> None: ...

    def interrupt(self) -> None: ...

    def ended(self) -> str:
        """Why it can be asked nothing more, found out without asking; "" if there is no reason."""

    @property
    def pid(self) -> int | None: ...


class Ended(BrokerUnavailable):
    """The backend ended while it was asked."""


DYING_SECONDS = 0.25
"""A killed process takes some milliseconds to end. A read that it gets meanwhile is asked again;
one that ran for longer may be what it died of."""


class Listener(Protocol):
    """Whom a worker tells what it learns; called from any thread, must not wait."""

    def on_reports(self, reports: Iterable[OrderReport]) -> None: ...

    def on_fills(self, fills: Iterable[Fill]) -> None: ...

    def on_stale(self) -> None: ...

    def on_connected(self, worker: Worker) -> None: ...

    def on_restored(self) -> None: ...

    def quote_of(self, instance_id: str, contract: Contract) -> Quote: ...


asked_by: ContextVar[str] = ContextVar("asked_by", default="")
"""The id of the request that this thread serves; for the log."""


class Call(Future[Any]):
    """One operation to run. `deadline` is in `time.monotonic()` seconds."""

    def __init__(
        self,
        operation: str,
        arguments: Mapping[str, Any],
        deadline: float,
        *,
        costs: tuple[str, ...] = (),
        begin: Callable[[], None] | None = None,
        finish: Callable[[Any, HttpTradingError | None], None] | None = None,
        ready: bool = True,
    ) -> None:
        """`begin` runs on the lane right before the operation and vetoes it by raising; `finish`
        runs on the lane with the result or the error, however late, before any waiter wakes. A
        call that is not `ready` keeps its place in the queue but is not run before its `release`.
        """
        super().__init__()
        self.operation = operation
        self.arguments = arguments
        self.deadline = deadline
        self.costs = costs
        self.priority = PRIORITIES.get(operation, 3)
        self.begin = begin
        self.finish = finish
        self.ready = ready
        self.began: float | None = None  # when the lane took it up, monotonic
        self.asked_by = asked_by.get()
        self.is_second_try = False


@dataclass
class WorkerState:
    """For people and metrics; times are `time.time()` seconds."""

    connected: bool = False
    since: float = field(default_factory=time.time)
    last_error: str = ""
    reconnects: int = 0
    replacements: int = 0


class Worker:
    """The queue of one broker connection, and the lane that serves it."""

    def __init__(
        self,
        name: str,
        make_backend: Callable[[Link], Backend],
        windows: Windows,
        costs: Mapping[str, tuple[str, ...]],
        listener: Listener,
        *,
        queue_size: int,
        hard_limit: float,
        connect_timeout: float,
    ) -> None:
        self.name = name
        self.state = WorkerState()
        self._make_backend = make_backend
        self._windows = windows
        self._costs = costs
        self._listener = listener
        self._queue_size = queue_size
        self._hard_limit = hard_limit
        self._connect_timeout = connect_timeout
        self._lock = threading.Lock()
        self._queue: list[tuple[int, int, Call]] = []
        self._numbers = itertools.count()
        self._lane: _Lane | None = None
        self._abandoned: list[_Lane] = []
        self._closing = False
        self._pausing = False  # an attempt to connect has failed, the next is due at:
        self._retry_at = 0.0

    # --- for request threads ----------------------------------------------------------------
    def submit(self, call: Call) -> Call:
        """Queues a call; Busy, RateLimited or BrokerUnavailable at once when it cannot be served.

        A call that would only find a connection that has just failed is refused at once (a ping
        ends the pause before the next attempt); while a connection is being made, it waits within
        its deadline.
        """
        now = time.monotonic()
        call.costs = self._costs.get(call.operation, ())
        with self._lock:
            if self._closing:
                raise Busy("The service is shutting down; nothing was sent.", retry_after=5)
            lane = self._lane
            attempts_at_once = call.operation == "ping" and lane is not None and lane.rested(now)
            if self._pausing and not attempts_at_once:
                raise self._unavailable(now)
            if len(self._queue) >= self._queue_size:
                raise Busy("Too many requests are waiting; nothing was sent.", retry_after=1)
            if call.deadline <= now:
                raise not_sent_in_time()
            self._windows.admit(call.costs, priority=call.priority, patience=call.deadline - now)
            bisect.insort(self._queue, (call.priority, next(self._numbers), call))
        if lane is not None and call.ready:
            lane.wake(at_once=attempts_at_once)
        return call

    def release(self, call: Call) -> bool:
        """Makes a queued call ready. False: it has left the queue unrun; nothing was sent."""
        with self._lock:
            if all(entry[2] is not call for entry in self._queue):
                return False
            call.ready = True
            lane = self._lane
        if lane is not None:
            lane.wake()
        return True

    def withdraw(self, call: Call) -> bool:
        """Takes a call out of the queue. True: it never ran and never will; nothing was sent."""
        with self._lock:
            for entry in self._queue:
                if entry[2] is call:
                    self._queue.remove(entry)
                    self._windows.withdraw(call.costs, priority=call.priority)
                    return True
        return False

    def unavailable(self) -> BrokerUnavailable | None:
        """Why nothing could be sent, when there is no connection."""
        with self._lock:
            return None if self.state.connected else self._unavailable(time.monotonic())

    def queued(self) -> int:
        return len(self._queue)

    def child_memory(self) -> int | None:
        """Resident bytes of the child process; None in a thread, or where /proc does not tell."""
        lane = self._lane
        return lane.child_memory() if lane else None

    def _unavailable(self, now: float) -> BrokerUnavailable:
        why = self.state.last_error or "The connection to the broker is being made"
        why = why.removesuffix("; nothing was sent")  # as an operation that found it broken said
        return BrokerUnavailable(
            f"{why}; nothing was sent.", retry_after=max(0.5, self._retry_at - now)
        )

    # --- life ---------------------------------------------------------------------------------
    def start(self) -> None:
        with self._lock:
            if self._lane is None and not self._closing:
                self._new_lane()

    def drain(self) -> None:
        """Takes no new calls and answers the queued ones at once."""
        with self._lock:
            self._closing = True
            waiting = [call for _, _, call in self._queue]
            self._queue.clear()
        for call in waiting:
            self._windows.withdraw(call.costs, priority=call.priority)
            call.set_exception(
                Busy("The service is shutting down; nothing was sent.", retry_after=5)
            )

    def close(self, seconds: float) -> None:
        """Drains, closes the connection, and gives up on what has not ended in time."""
        self.drain()
        lane = self._lane
        if lane is None:
            return
        lane.stop()
        lane.join(seconds)
        if lane.is_alive():
            lane.give_up()
            log.warning("worker %s: still busy at exit", self.name)
            if lane.pid is not None:
                lane.join(0.5)  # its child is killed, so it ends now, and nothing is stuck

    @property
    def is_stuck(self) -> bool:
        """Whether a call is running that may still change something at the broker."""
        with self._lock:
            lanes = [*self._abandoned, *([self._lane] if self._lane else [])]
        running = [lane.current for lane in lanes if lane.is_alive()]
        return any(call is not None and call.operation in CHANGES for call in running)

    def check(self) -> None:
        """Replaces a stuck lane. Called a few times a second by the supervisor."""
        now = time.monotonic()
        with self._lock:
            self._abandoned = [lane for lane in self._abandoned if lane.is_alive()]
            lane = self._lane
            if lane is None or self._closing:
                return
            reason = lane.stuck(now) or self._held_up(lane, now)
            lane.looks_beyond = lane.looks_beyond + 1 if reason else 0
            if lane.looks_beyond < STUCK_LOOKS or len(self._abandoned) >= MOST_ABANDONED:
                return
            try:
                self._new_lane(_pause(len(self._abandoned)))
            except (OSError, RuntimeError) as error:  # no file descriptor, or no thread, is left
                lane.looks_beyond = 0
                log.error("worker %s: %s; not replaced yet (%s)", self.name, reason, error)
                return
            self.state.replacements += 1
            self._disconnected_locked(reason)
            self._abandoned.append(lane)
        log.warning("worker %s: %s; replaced", self.name, reason)
        lane.give_up()

    def _held_up(self, lane: _Lane, now: float) -> str:
        """Why a lane must be replaced though its read has time left (a listing has 20 s), or ""."""
        if not lane.reads_for_long(now):
            return ""
        pressing = (
            call.ready and call.operation in CHANGES and call.deadline < now + RECONNECTS_WITHIN
            for _, _, call in self._queue
        )
        return "The broker does not answer, and an order waits" if any(pressing) else ""

    def _new_lane(self, pause: float = 0.0) -> None:
        """Leaves everything as it is when that fails."""
        lane = _Lane(self, pause)
        try:
            lane.start()  # it waits for the lock
        except RuntimeError:
            lane.never_started()
            raise
        self._pausing = pause > 0
        self._retry_at = time.monotonic() + pause
        self._lane = lane

    # --- for the lane -------------------------------------------------------------------------
    def next_call(self, lane: _Lane) -> tuple[Call | None, float | None]:
        """The call to run now; else the seconds until one may run, or None when none waits."""
        wait: float | None = None
        expired: list[Call] = []
        found: Call | None = None
        with self._lock:
            if lane is not self._lane:
                return None, None
            now = time.monotonic()
            for entry in list(self._queue):
                call = entry[2]
                if call.deadline <= now:
                    self._queue.remove(entry)
                    self._windows.withdraw(call.costs, priority=call.priority)
                    expired.append(call)
                    continue
                if not call.ready:
                    continue
                pause = self._windows.begin(call.costs, priority=call.priority)
                if pause <= 0:
                    self._queue.remove(entry)
                    found = call
                    break
                wait = pause if wait is None else min(wait, pause)
        for call in expired:
            call.set_exception(not_sent_in_time())
        return found, wait

    def note(self, call: Call) -> None:
        self._windows.note(call.costs)

    def ended(self, call: Call) -> None:
        self._windows.end(call.costs)

    def asks_again(self, call: Call) -> bool:
        """Queues a read for the next connection, once; the slots of its first try stay used."""
        call.costs = self._costs.get(call.operation, ())
        with self._lock:
            now = time.monotonic()
            lately = call.began is not None and now < call.began + DYING_SECONDS
            if self._closing or call.operation in CHANGES or call.is_second_try or not lately:
                return False
            patience = call.deadline - now
            try:
                self._windows.admit(call.costs, priority=call.priority, patience=patience)
            except RateLimited:
                return False
            call.is_second_try, call.began = True, None
            bisect.insort(self._queue, (call.priority, next(self._numbers), call))
        return True

    def connecting(self, lane: _Lane) -> None:
        with self._lock:
            if lane is self._lane:
                self._pausing = False

    def connected(self, lane: _Lane) -> None:
        with self._lock:
            if lane is not self._lane:
                return
            self.state.connected = True
            self.state.since = time.time()
            self.state.last_error = ""
        log.info("worker %s: connected", self.name)
        self._listener.on_connected(self)

    def disconnected(self, lane: _Lane, reason: str, pause: float, *, failed: bool) -> None:
        """The connection was lost, or an attempt `failed`; the next one comes after `pause`. Who
        asks meanwhile waits for it, unless the last one has just failed."""
        with self._lock:
            if lane is not self._lane:
                return
            repeated = self.state.last_error == reason
            self._pausing = failed and pause > 0
            self._retry_at = time.monotonic() + pause
            self._disconnected_locked(reason)
            refused = self._queue if self._pausing else []
            self._queue = [] if self._pausing else self._queue
            error = self._unavailable(time.monotonic())
        if not repeated:
            log.warning("worker %s: %s", self.name, reason)
        self._listener.on_stale()
        for _, _, call in refused:  # nobody waits for a broker that has just been found down
            self._windows.withdraw(call.costs, priority=call.priority)
            call.set_exception(error)

    def _disconnected_locked(self, reason: str) -> None:
        if self.state.connected:
            self.state.reconnects += 1
            self.state.since = time.time()
        self.state.connected = False
        self.state.last_error = reason


class NotSentInTime(TimedOut):
    """The deadline passed before the operation began: a worker's own word, never a broker's."""


def not_sent_in_time() -> NotSentInTime:
    return NotSentInTime("The deadline passed before the broker could be asked; nothing was sent.")


def _pause(attempt: int) -> float:
    """None before the first attempt, then growing, with jitter."""
    if attempt <= 0:
        return 0.0
    return BACK_OFF[min(attempt, len(BACK_OFF)) - 1] * random.uniform(0.7, 1.0)


class _Lane(threading.Thread):
    """One life of a worker's thread, with its loop and its backend."""

    def __init__(self, worker: Worker, pause: float) -> None:
        super().__init__(name=f"httptrading-{worker.name}", daemon=True)
        self.current: Call | None = None
        self.looks_beyond = 0  # in a row that have found it stuck
        self._worker = worker
        self._pause = pause
        self._loop = asyncio.new_event_loop()
        self._wake = asyncio.Event()
        self._attempted = float("-inf")  # when the last attempt to connect began, monotonic
        self._stopping = False
        self._given_up = False
        self._lost = ""
        self._connecting_since: float | None = None
        self._running_until: float | None = None  # when the running call is stuck, monotonic
        self._wake_sent: float | None = None  # when the loop was asked to look at the queue
        self._link = _LaneLink(self, worker)
        self._backend: Backend = worker._make_backend(self._link)

    # --- from other threads -------------------------------------------------------------------
    def wake(self, *, at_once: bool = False) -> None:
        """Looks at the queue; `at_once` also ends a pause before the next attempt to connect."""
        if self._wake_sent is None:
            self._wake_sent = time.monotonic()
        self._post(self._on_wake, at_once)

    def never_started(self) -> None:
        self._loop.close()

    def rested(self, now: float) -> bool:
        """Whether the last attempt to connect is so long ago that one may be asked for."""
        return now > self._attempted + BACK_OFF[0]

    def stop(self) -> None:
        self._post(self._on_stop)

    def lose(self, reason: str, link: _LaneLink) -> None:
        self._post(self._on_broken, reason, link)

    def give_up(self) -> None:
        """Leaves the thread to itself: it runs no further call and ends when it can."""
        self._given_up = True
        self._post(self._on_stop)
        threading.Thread(target=self._backend.interrupt, daemon=True).start()

    def stuck(self, now: float) -> str:
        """Why this lane must be replaced, or ""."""
        if not self.is_alive():
            return "The connection's thread ended"
        if self._connecting_since is not None:
            limit = self._worker._connect_timeout + REPLACE_GRACE
            return "Connecting takes too long" if now > self._connecting_since + limit else ""
        if self._running_until is not None:
            return "The broker does not answer" if now > self._running_until else ""
        if self._wake_sent is not None and now > self._wake_sent + self._worker._hard_limit:
            return "The connection's thread is blocked"
        return ""

    def reads_for_long(self, now: float) -> bool:
        """Whether what runs beyond the limit is a read: giving it up changes nothing."""
        call = self.current
        if self._running_until is None or call is None or call.began is None:
            return False
        return call.operation not in CHANGES and now > call.began + self._worker._hard_limit

    @property
    def pid(self) -> int | None:
        """The child process of the connection; None when it lives in this thread."""
        return self._backend.pid

    def child_memory(self) -> int | None:
        pid = self.pid
        if pid is None:
            return None
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _post(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            pass  # the loop is closed: nothing waits for it any more

    # --- on the loop --------------------------------------------------------------------------
    def _on_wake(self, at_once: bool) -> None:
        self._wake_sent = None
        if at_once:
            self._pause = 0.0
        self._wake.set()

    def _on_stop(self) -> None:
        self._stopping = True
        self._wake.set()

    def _on_broken(self, reason: str, link: _LaneLink) -> None:
        if link is self._link:  # bad news of a copy that is gone says nothing of the next one
            self._on_lost(reason)

    def _on_lost(self, reason: str) -> None:
        self._lost = self._lost or reason
        self._wake.set()

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._live())
        except BaseException:
            log.exception("worker %s: the connection's thread failed", self._worker.name)
        finally:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0))
            self._loop.close()

    async def _live(self) -> None:
        attempt = 0
        await self._wait(self._pause)
        while not self._stopping:
            attempt += 1
            self._attempted = time.monotonic()
            reason = await self._connect()
            failed = bool(reason)
            if not failed:
                self._worker.connected(self)
                while not (self._stopping or self._lost):
                    await self._serve()
                reason = self._lost
                if time.monotonic() > self._attempted + STEADY:
                    attempt = 0
            self._running_until = time.monotonic() + self._worker._hard_limit + REPLACE_GRACE
            await self._backend.close()
            self._running_until = None
            self._lost = ""
            if self._stopping:
                return
            pause = _pause(attempt)
            self._worker.disconnected(self, reason, pause, failed=failed)
            self._link = _LaneLink(self, self._worker)
            self._backend = self._worker._make_backend(self._link)
            await self._wait(pause)

    async def _connect(self) -> str:
        """Why it failed, or ""."""
        self._worker.connecting(self)
        self._connecting_since = time.monotonic()
        try:
            await self._backend.open(self._worker._connect_timeout)
        except HttpTradingError as error:
            return error.text.rstrip(".")
        except Exception:
            log.exception("worker %s: connecting failed", self._worker.name)
            return "Connecting failed unexpectedly; the log has the details"
        finally:
            self._wake_sent = None
            self._connecting_since = None
        return ""

    async def _wait(self, seconds: float) -> None:
        """Pauses, unless stopped or asked for an attempt at once."""
        end = time.monotonic() + seconds
        self._pause = seconds
        while not self._stopping and self._pause and (left := end - time.monotonic()) > 0:
            self._wake.clear()
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _serve(self) -> None:
        """Runs the next call, or waits for one, for a slot, or for bad news."""
        self._wake.clear()
        self._wake_sent = None
        if ended := self._backend.ended():
            self._on_lost(ended)
            return
        call, wait = self._worker.next_call(self)
        if call is not None:
            await self._run(call)
            # A call may run without giving the loop its turn. What the broker has told meanwhile
            # comes before the next one: a connection that it has given up sends nothing more.
            await asyncio.sleep(0)
            return
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), wait)

    async def _run(self, call: Call) -> None:
        call.began = started = time.monotonic()
        self.current = call
        self._running_until = max(call.deadline, started + self._worker._hard_limit) + REPLACE_GRACE
        result: Any = None
        error: HttpTradingError | None = None
        try:
            self._worker.note(call)
            if call.begin is not None:
                call.begin()
            if self._given_up or time.monotonic() >= call.deadline:
                raise not_sent_in_time()  # a slow disk has used the time up
            # The waiter leaves at its deadline; the operation gets a little less, so that it can
            # say itself what became of it.
            result = await self._backend.run(
                call.operation, call.arguments, max(0.05, call.deadline - time.monotonic())
            )
        except HttpTradingError as raised:
            error = raised
            if isinstance(raised, InternalError):  # in a thread or a child process, which knows
                log.error(  # nothing of requests
                    "worker %s: %s failed, as said right before",
                    self._worker.name,
                    call.operation,
                    extra={"request_id": call.asked_by},
                )
        except BaseException:
            log.exception("worker %s: %s failed", self._worker.name, call.operation)
            error = InternalError("An unexpected error; the log has the details")
        finally:
            self._worker.ended(call)
            if self._wake_sent is not None:
                self._wake_sent = time.monotonic()  # who came meanwhile has waited for the call
            self._running_until = None
        try:
            if call.finish is not None:
                call.finish(result, error)
        except Exception:
            log.exception("worker %s: recording %s failed", self._worker.name, call.operation)
        self.current = None
        if isinstance(error, BrokerUnavailable):
            self._on_lost(error.text.rstrip("."))
        if isinstance(error, Ended) and self._worker.asks_again(call):
            return
        if error is not None:
            call.set_exception(error)
        else:
            call.set_result(result)
        self._worker.note(call)


class _LaneLink:
    """A lane's broker telling its worker; silent once the lane is given up."""

    def __init__(self, lane: _Lane, worker: Worker) -> None:
        self._lane = lane
        self._worker = worker
        self._taken = 0.0  # when an operation last took a slot, monotonic

    def report(self, reports: Iterable[OrderReport]) -> None:
        self._worker._listener.on_reports(self._sound("recent_orders", reports))

    def fill(self, fills: Iterable[Fill]) -> None:
        self._worker._listener.on_fills(self._sound("fills", fills))

    def _sound(self, operation: str, pushed: Iterable[Any]) -> tuple[Any, ...]:
        """What makes sense of a push: the same as in an answer to this operation."""
        sound: list[Any] = []
        for one in pushed:
            try:
                sound += checked(operation, [one])
            except NonsenseAnswer as error:
                log.error("worker %s: a push has %s", self._worker.name, error)
        return tuple(sound)

    def stale(self) -> None:
        self._worker._listener.on_stale()

    def lost(self, reason: str) -> None:
        self._lane.lose(reason.rstrip("."), self)

    def restored(self) -> None:
        if not self._lane._given_up:
            self._worker._listener.on_restored()

    def take(self, window: str) -> None:
        """The slot is given back with those of the running call, which ends later than the call
        that it is for; outside of one, at once."""
        windows, call = self._worker._windows, self._lane.current
        if call is None:
            windows.take(window)
            windows.end((window,))
        else:
            own = max(call.began or 0.0, self._taken)
            windows.take(window, priority=call.priority, own=own)
            self._taken = time.monotonic()
            call.costs = (*call.costs, window)
        windows.note((window,))

    def quote_of(self, instance_id: str, contract: Contract) -> Quote:
        return self._worker._listener.quote_of(instance_id, contract)
