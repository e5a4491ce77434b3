"""gunicorn's threaded worker, without the ways in which one client can stall all others, and with
threads that stay a moment with a connection they have answered.

Measured on gunicorn 27.0: a client that sent `Connection: close` and does not close its side holds
the worker's main loop for 2 s (`close_graceful` runs there, workers/gthread.py:503), every
connection that sends nothing holds a thread for 5 s (`wait_for_data`, :522), a body that never
comes another 5 s after its answer (`_keepalive_after`, :580), and a request that drips in holds one
without end. All are cheap to send and cost every other client its answer.
"""

from __future__ import annotations

import errno
import resource
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn import util
from gunicorn.http.unreader import SocketUnreader
from gunicorn.workers.gthread import TConn, ThreadWorker

SILENCE = 10
"""Seconds a connection may be silent before its first byte, and a request may take to come in."""

HASTE = 1.0
"""The same while other connections wait for a thread, or no other can be taken."""

LOOK = 0.25
"""Seconds between two looks at whether they do."""

LEFTOVER = 0.05
"""Seconds that a body which nobody has read may still take to come in, after the answer."""

MOST_LEFTOVER = 1024 * 1024
"""Bytes of it that are taken in (gunicorn's own bound is 64 KiB). A connection that ends behind an
answer which kept it alive costs a proxy the next request on it, be it another client's: nginx
passes on bodies of 128 KiB, has sent them whole, and answers that request with 502."""

LINGER = 0.25
"""Seconds for a client to close after the last answer, so that it surely arrives."""

STAY = 0.1
"""Seconds that a thread waits for the next request on the connection it has answered, while no
other connection needs it: a client that polls is spared two changes of thread."""


class Connection(TConn):  # type: ignore[misc]
    """A client's connection; `is_crowded` tells whether others wait for a thread."""

    def __init__(self, *arguments: Any, is_crowded: Callable[[], bool]) -> None:
        super().__init__(*arguments)
        self._is_crowded = is_crowded
        self.expect()

    def init(self) -> None:
        if self.initialized:
            return
        super().init()
        if not self.is_http2:
            self.parser.unreader = Unreader(self)

    def close(self, graceful: bool = False) -> None:
        """At once: what had to linger has done so in its thread, and is closed. (gunicorn's own way
        fails on that, and then counts the connection twice; at less than none, the worker takes any
        number of them, and at its end drops those that are still open.)"""
        super().close()

    def expect(self, seconds: float = SILENCE) -> None:
        """From now on, what comes may take so long."""
        self._began, self._seconds = time.monotonic(), seconds

    def left(self) -> float:
        """The seconds that it may still take."""
        allowed = min(HASTE, self._seconds) if self._is_crowded() else self._seconds
        return self._began + allowed - time.monotonic()


class Unreader(SocketUnreader):  # type: ignore[misc]
    """Reads a request; one that takes too long ends as if the client had hung up. `is_cut` tells
    that one has: where the next request would begin is not known then."""

    def __init__(self, conn: Connection) -> None:
        super().__init__(conn.sock)
        self._conn = conn
        self._poll = select.poll()
        self._poll.register(conn.sock, select.POLLIN)
        self.is_cut = False
        self.unread(conn.parser.unreader.take_buffered())

    def chunk(self, *size_hint: Any) -> bytes:
        while (left := self._conn.left()) > 0:
            pending = isinstance(self.sock, ssl.SSLSocket) and self.sock.pending()
            if pending or self._poll.poll(min(left, LOOK) * 1000):
                found: bytes = super().chunk(*size_hint)
                return found
        self.is_cut = True
        return b""

    def has_more(self) -> bool:
        """Whether the next request has come in already, behind the last one."""
        return bool(self.buf.getbuffer().nbytes)


class Worker(ThreadWorker):  # type: ignore[misc]
    """The main loop only ever waits for events; a thread is taken when a request is there."""

    _stopped = 0.0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = int(self.cfg.worker_connections)
        # One connection more than files may be open ends the process: half of them are for brokers.
        self.worker_connections = most if files == resource.RLIM_INFINITY else min(most, files // 2)
        self.max_keepalived = self.worker_connections - int(self.cfg.threads)

    def init_process(self) -> None:
        self._tally = threading.Lock()
        self._jobs = 0  # connections that have a thread or wait for one
        self._staying = 0  # those of them whose thread waits for their next request
        # A byte in here calls one staying thread back.
        self._recall, self._recalled = socket.socketpair()
        for end in (self._recall, self._recalled):
            end.setblocking(False)
        super().init_process()

    def set_accept_enabled(self, enabled: bool) -> None:
        """At the end who comes anew is refused, and knows that nothing was sent; the kernel would
        take him in, and cut him off when the last request has ended. (A reload leaves the master's
        and the next worker's own ends of these sockets open.)"""
        super().set_accept_enabled(enabled)
        if not enabled and not self.alive:
            for listener in self.sockets:
                listener.close()

    def enqueue_req(self, conn: Any) -> None:
        """The connection has something to read."""
        with self._tally:
            self._jobs += 1
            recall = self._jobs > self.cfg.threads and self._staying > 0
        if recall:
            with suppress(BlockingIOError):  # so many are called back already
                self._recall.send(b"!")
        super().enqueue_req(conn)

    def accept(self, listener: Any) -> None:
        """A new connection waits in the poller, as a kept-alive one does."""
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                raise
            return
        # Half a request, or an answer that is not taken: a read or write in a thread ends too.
        span = struct.pack("ll", SILENCE, 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, span)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, span)
        conn = Connection(
            self.cfg, client, address, listener.getsockname(), is_crowded=self._is_crowded
        )
        conn.timeout = time.monotonic() + SILENCE
        self.nr_conns += 1
        self.pending_conns.append(conn)
        self.poller.register(client, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle(self, conn: Any) -> Any:
        """Serves what comes at once on the connection; lingers after the last answer in this
        thread, so that what the main loop does then is quick."""
        try:
            keep = self._handle_one(conn)
            while keep is True and self._next_comes(conn):
                keep = self._handle_one(conn)
            if not keep:
                util.close_graceful(conn.sock, timeout=LINGER)
            return keep
        finally:
            with self._tally:
                self._jobs -= 1

    def _handle_one(self, conn: Any) -> Any:
        conn.expect()
        return super().handle(conn)

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        """A body that is not there is not waited for; the connection ends instead. (gunicorn takes
        one that was given up for read to its end, and what comes late for the next request. Its own
        deadline is not used: where there is no body, it ends connections after a moment's stall.)
        """
        conn.expect(LEFTOVER)
        if not keepalive or not conn.parser.finish_body(max_bytes=MOST_LEFTOVER):
            return False
        return not conn.parser.unreader.is_cut

    def _is_crowded(self) -> bool:
        is_full = bool(self.nr_conns >= self.worker_connections)
        return is_full or self._jobs > int(self.cfg.threads)

    def _next_comes(self, conn: Any) -> bool:
        """Waits a moment for the connection's next request, unless another one waits for a thread;
        False: the main loop is to watch it."""
        with self._tally:
            if self._jobs > self.cfg.threads:
                return False
            self._staying += 1
        try:
            has_more = not conn.is_http2 and conn.parser.unreader.has_more()
            return self.alive and (has_more or self._readable(conn.sock))
        finally:
            with self._tally:
                self._staying -= 1

    def _readable(self, client: socket.socket) -> bool:
        """Whether the client sends something soon, and before this thread is called back."""
        poll = select.poll()
        poll.register(client, select.POLLIN)
        poll.register(self._recalled, select.POLLIN)
        end = time.monotonic() + STAY
        while (left := end - time.monotonic()) > 0:
            found = dict(poll.poll(left * 1000))
            if client.fileno() in found:
                return True
            if found:
                with suppress(BlockingIOError):  # else another thread was called back
                    self._recalled.recv(1)
                    return False
        return False

    def murder_pending(self) -> None:
        """A worker that stops waits a moment only for connections that have not asked anything, and
        where no other can be taken, they make room."""
        if self._is_crowded():
            for conn in self.pending_conns:
                conn.timeout = min(conn.timeout, time.monotonic() + conn.left())
        if not self.alive:
            self._stopped = self._stopped or time.monotonic()
            for conn in self.pending_conns:
                conn.timeout = min(conn.timeout, self._stopped + LINGER)
        super().murder_pending()
