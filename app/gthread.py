"""gunicorn's threaded worker, without the ways in which one client can stall all others, and with
threads that stay a moment with a connection they have answered.

Measured on gunicorn 27.0: a client that sent `Connection: close` and does not close its side holds
the worker's main loop for 2 s (`close_graceful` runs there, workers/gthread.py:503), and every
connection that sends nothing holds a thread for 5 s (`wait_for_data`, :522). Both are cheap to send
and cost every other client its answer.
"""

from __future__ import annotations

import errno
import select
import socket
import struct
import threading
import time
from contextlib import suppress
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import TConn, ThreadWorker

SILENCE = 10
"""Seconds a connection may be silent: before its first byte, or in the middle of a request."""

LINGER = 0.25
"""Seconds for a client to close after the last answer, so that it surely arrives."""

STAY = 0.1
"""Seconds that a thread waits for the next request on the connection it has answered, while no
other connection needs it: a client that polls is spared two changes of thread."""


class Worker(ThreadWorker):  # type: ignore[misc]
    """The main loop only ever waits for events; a thread is taken when a request is there."""

    _stopped = 0.0

    def init_process(self) -> None:
        self._tally = threading.Lock()
        self._jobs = 0  # connections that have a thread or wait for one
        self._staying = 0  # those of them whose thread waits for their next request
        # A byte in here calls one staying thread back.
        self._recall, self._recalled = socket.socketpair()
        for end in (self._recall, self._recalled):
            end.setblocking(False)
        super().init_process()

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
        conn = TConn(self.cfg, client, address, listener.getsockname())
        conn.timeout = time.monotonic() + SILENCE
        self.nr_conns += 1
        self.pending_conns.append(conn)
        self.poller.register(client, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def handle(self, conn: Any) -> Any:
        """Serves what comes at once on the connection; lingers after the last answer in this
        thread, so that what the main loop does then is quick."""
        try:
            keep = super().handle(conn)
            while keep is True and self._next_comes(conn):
                keep = super().handle(conn)
            if not keep:
                util.close_graceful(conn.sock, timeout=LINGER)
            return keep
        finally:
            with self._tally:
                self._jobs -= 1

    def _next_comes(self, conn: Any) -> bool:
        """Waits a moment for the connection's next request, unless another one waits for a thread;
        False: the main loop is to watch it."""
        with self._tally:
            if self._jobs > self.cfg.threads:
                return False
            self._staying += 1
        try:
            return self.alive and self._readable(conn.sock)
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
        """A worker that stops waits a moment only for connections that have not asked anything."""
        if not self.alive:
            self._stopped = self._stopped or time.monotonic()
            for conn in self.pending_conns:
                conn.timeout = min(conn.timeout, self._stopped + LINGER)
        super().murder_pending()
