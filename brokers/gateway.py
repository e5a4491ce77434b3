"""All instances of one process: their start after the fork, their supervision, their end.

One process owns an instance: a lock file in the data directory refuses a second one.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from httptrading.brokers.base import masked
from httptrading.brokers.instance import Instance
from httptrading.brokers.journal import Journal
from httptrading.brokers.recorder import Recorder
from httptrading.brokers.settings import InstanceSettings
from httptrading.errors import BrokerUnavailable, Busy
from httptrading.model import Contract, Quote

log = logging.getLogger("httptrading.gateway")

SUPERVISION = 0.1
"""Seconds between two looks at the workers."""

DRAIN_SECONDS = 2.0
"""How long running calls are waited for once the service is told to stop."""

LEAST_CLOSING = 0.5
"""Seconds that a connection has for closing, even when a drain has used up the time before."""

QUOTE_FROM_SECONDS = 5.0
"""How long Paper may wait for another instance's quote."""


class InstanceLock:
    """`flock` on a file of the instance; the kernel frees it however the process ends."""

    def __init__(self, data_dir: Path, instance_id: str) -> None:
        name = hashlib.sha256(instance_id.encode()).hexdigest()[:16]
        self._path = data_dir / "instances" / f"{name}.lock"
        self._file: int | None = None

    def take(self) -> bool:
        """True when this process owns the instance now."""
        if self._file is None:
            file = self._open()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                return False
            self._file = file
            with suppress(OSError):  # a full disk: the lock holds without the note as well
                os.truncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
        return True

    def _open(self) -> int:
        """To write the owner down; else as it is: on a disk that is read-only now, the account can
        be looked at, and its orders cancelled."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(self._path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError:
            with suppress(OSError):
                return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            raise

    def is_taken(self) -> bool:
        """Whether another process holds it; leaves no trace in the data directory."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False  # there was never an owner, or nothing to be learned
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(file)
        return False

    def owner(self) -> str:
        """The process id the owner wrote down."""
        try:
            return self._path.read_text().strip() or "?"
        except OSError:
            return "?"

    def release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Gateway:
    """Made before a fork, started after it: no thread, no connection and no lock until then."""

    def __init__(
        self,
        instances: Sequence[InstanceSettings],
        data_dir: Path,
        journal_url: str | None = None,
    ) -> None:
        self.settings = {one.broker.instance_id: one for one in instances}
        self.data_dir = data_dir
        self._journal_url = journal_url or f"sqlite:///{data_dir / 'journal.sqlite'}"
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._instances: dict[str, Instance] = {}
        self._locks: dict[str, InstanceLock] = {}
        self._running: set[str] = set()
        self._foreign: dict[str, str] = {}  # instances that another process serves, and which
        self._stopping = threading.Event()
        self._drained_at = 0.0  # monotonic
        self._journal: Journal | None = None
        self._recorder: Recorder | None = None

    def owned_elsewhere(self) -> dict[str, str]:
        """Instance id → process id, for instances that another process serves right now."""
        found = {}
        for instance_id in self.settings:
            lock = InstanceLock(self.data_dir, instance_id)
            if lock.is_taken():
                found[instance_id] = lock.owner()
        return found

    def start(self) -> None:
        """Starts every instance that no other process owns; cheap when already started."""
        if self._pid == os.getpid():
            return
        with self._lock:
            if self._pid == os.getpid():
                return
            if self._stopping.is_set():
                raise Busy("The service is shutting down; nothing was sent.", retry_after=5)
            journal = Journal(self._journal_url)
            recorder = Recorder(journal)
            recorder.start()
            self._journal, self._recorder = journal, recorder
            self._instances = {
                instance_id: Instance(settings, journal, recorder, self.data_dir, self._quote_of)
                for instance_id, settings in self.settings.items()
            }
            self._locks = {
                instance_id: InstanceLock(self.data_dir, instance_id)
                for instance_id in self.settings
            }
            self._running = set()
            for instance_id in self.settings:
                with suppress(BrokerUnavailable):  # it is tried again with each request
                    self._start_instance(instance_id)
            threading.Thread(
                target=self._supervise, name="httptrading-supervisor", daemon=True
            ).start()
            self._pid = os.getpid()

    def _start_instance(self, instance_id: str) -> bool:
        if instance_id in self._running:
            return True
        lock = self._locks[instance_id]
        try:
            taken = lock.take()
        except OSError as error:
            text = f"The data directory cannot be used: {error.strerror}"
            log.error("instance %s: %s", masked(instance_id), text)
            raise BrokerUnavailable(f"{text}; nothing was sent.", retry_after=2) from None
        if not taken:
            owner = lock.owner()
            if self._foreign.get(instance_id) != owner:  # said once, not at each request
                self._foreign[instance_id] = owner
                log.error(
                    "instance %s is served by process %s; this process leaves it alone",
                    masked(instance_id),
                    owner,
                )
            return False
        self._foreign.pop(instance_id, None)
        self._instances[instance_id].start()
        self._running.add(instance_id)
        return True

    def instance(self, instance_id: str) -> Instance:
        """The running instance; BrokerUnavailable when another process owns it."""
        self.start()
        if instance_id not in self._running:
            with self._lock:
                if not self._start_instance(instance_id):
                    owner = self._locks[instance_id].owner()
                    raise BrokerUnavailable(
                        f"Another process ({owner}) serves this instance from the same data "
                        "directory; this request sent nothing. Repeat it if the service is just "
                        "being reloaded; else run one service process per data directory.",
                        retry_after=2,
                    )
        return self._instances[instance_id]

    def instances(self) -> Mapping[str, Instance]:
        """Those that this process runs."""
        return {name: self._instances[name] for name in self._running}

    def _quote_of(self, instance_id: str, contract: Contract) -> Quote:
        if instance_id not in self.settings:
            raise BrokerUnavailable("quotes_from names an instance that is not configured")
        return self.instance(instance_id).quote(contract, time.monotonic() + QUOTE_FROM_SECONDS)

    def _supervise(self) -> None:
        while not self._stopping.wait(SUPERVISION):
            for instance in list(self._instances.values()):
                try:
                    instance.check()
                except Exception:
                    log.exception("supervising instance %s failed", instance.masked_id)

    def drain(self) -> None:
        """Takes nothing new; queued calls are answered at once, running ones soon."""
        if not self._stopping.is_set():
            self._drained_at = time.monotonic()
            self._stopping.set()
        for instance in self.instances().values():
            instance.drain(DRAIN_SECONDS)

    def close(self, seconds: float = 2.0) -> None:
        """Ends everything this process started, `seconds` after the drain began or soon after.

        Twice is harmless.
        """
        if self._pid != os.getpid():
            return
        self.drain()
        seconds = max(LEAST_CLOSING, seconds - (time.monotonic() - self._drained_at))
        closing = [
            threading.Thread(target=instance.close, args=(seconds,), daemon=True)
            for instance in self.instances().values()
        ]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(seconds + 0.5)
        if self._recorder is not None:
            self._recorder.stop(1.0)
        if self._journal is not None:
            self._journal.close()
        for instance_id, lock in self._locks.items():
            # A call that is stuck in this process may still reach the broker; until the process
            # ends, nobody else may conclude that it has not.
            if not self._instances[instance_id].is_stuck:
                lock.release()
        self._pid = None
