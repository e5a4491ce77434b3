"""gunicorn's threaded worker, without the ways in which one client can stall all others.

Measured on gunicorn 27.0: a client that sent `Connection: close` and does not close its side holds
the worker's main loop for 2 s (`close_graceful` runs there, workers/gthread.py:503), and every
connection that sends nothing holds a thread for 5 s (`wait_for_data`, :522). Both are cheap to send
and cost every other client its answer.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn import util
from gunicorn.workers.gthread import TConn, ThreadWorker

SILENCE = 10
"""Seconds a connection may be silent: before its first byte, or in the middle of a request."""

LINGER = 0.25
"""Seconds for a client to close after the last answer, so that it surely arrives."""


class Worker(ThreadWorker):  # type: ignore[misc]
    """The main loop only ever waits for events; a thread is taken when a request is there."""

    _stopped = 0.0

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
        """Lingers in the request's own thread; what the main loop does after it is then quick."""
        keep = super().handle(conn)
        if not keep:
            util.close_graceful(conn.sock, timeout=LINGER)
        return keep

    def murder_pending(self) -> None:
        """A worker that stops waits a moment only for connections that have not asked anything."""
        if not self.alive:
            self._stopped = self._stopped or time.monotonic()
            for conn in self.pending_conns:
                conn.timeout = min(conn.timeout, self._stopped + LINGER)
        super().murder_pending()
