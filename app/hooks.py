"""What gunicorn calls: the gateway starts, drains and closes with its one worker process.

`gunicorn.conf.py` and `httptrading.run()` use the same hooks.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from gunicorn.workers.gthread import ThreadWorker

from httptrading.app.config_checks import ConfigurationError
from httptrading.app.logs import flush_logs, log_aside, quotes_no_request, secrets_of
from httptrading.brokers.base import masked
from httptrading.brokers.gateway import Gateway

log = logging.getLogger("httptrading.app")

WORKER_CLASS = "httptrading.app.gthread.Worker"

STOP_WITHIN = 4
"""Seconds from SIGTERM until gunicorn's master kills a worker process that has not ended."""

_PREDECESSOR_ENDS_WITHIN = 5.0

_REQUESTS_END_WITHIN = 3
"""Seconds that the worker process waits for its requests; the rest is for closing the brokers."""


def on_starting(server: Any) -> None:
    """Refuses what would break the rule of one process with threads; `server` is the arbiter."""
    if server.cfg.workers != 1:
        raise RuntimeError(
            f"workers = {server.cfg.workers}: httptrading runs as one worker process with threads. "
            "A second process would be a second session at each broker, with its own rate windows "
            "and its own view of the orders. Use threads (in the configuration file) for more "
            "requests at a time, and more instances or another service for more accounts."
        )
    if not issubclass(server.cfg.worker_class, ThreadWorker):
        raise RuntimeError(
            f"worker_class = {server.cfg.worker_class_str}: httptrading needs {WORKER_CLASS} (or "
            "gthread). Requests wait for brokers, so one at a time (sync) or on a patched loop "
            "(gevent) would hang."
        )


def refuse_second_owner(gateway: Gateway) -> None:
    """Ends this start when another process serves one of the instances from the same data
    directory; a service that is just ending is waited for."""
    if "GUNICORN_PID" in os.environ:
        return  # started by the running service itself (USR2), to take over from it
    end = time.monotonic() + _PREDECESSOR_ENDS_WITHIN
    while owners := gateway.owned_elsewhere():
        if time.monotonic() > end:
            listed = ", ".join(f"{masked(name)} by process {pid}" for name, pid in owners.items())
            sys.exit(
                f"httptrading: already served from {gateway.data_dir}: {listed}. One process owns "
                "an instance: stop that one first, or give this one a data directory (data_dir, "
                "HTTPTRADING_DATA_DIR) and accounts of its own."
            )
        time.sleep(0.1)


def refuse_taken_address(server: Any) -> None:
    """Ends a start that could not listen, in one line: gunicorn itself says it in ten."""
    if {"GUNICORN_PID", "LISTEN_FDS"} & os.environ.keys():
        return  # it is given sockets that listen already
    for address in server.cfg.address:
        if isinstance(address, tuple):
            host, port = address
            try:
                with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
                    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    trial.bind(address)
            except OSError as error:
                sys.exit(
                    f"httptrading: cannot listen on {host}, port {port} ({error.strerror}). Stop "
                    "what listens there, or choose another host or port."
                )


def reload_only_what_loads(server: Any, load: Callable[[], object]) -> None:
    """A reload (SIGHUP) of a configuration with mistakes changes nothing. gunicorn itself ends the
    service then; `load` raises ConfigurationError."""
    reload = server.reload

    def reload_if_it_loads() -> None:
        try:
            load()
        except ConfigurationError as error:
            log.error("not reloaded, the service goes on as it was: %s", error)
        else:
            reload()

    server.reload = reload_if_it_loads


def post_worker_init(worker: Any) -> None:
    """Starts the gateway after the fork, and lets it know of SIGTERM at once.

    gunicorn's gthread worker first waits for the requests that are under way and only then calls
    `worker_exit`. Requests wait for brokers, so the gateway must hear of the stop before that: it
    then answers what has not begun. The handler only puts into a SimpleQueue, which is safe inside
    a signal handler; a thread of its own does the work.
    """
    gateway = _gateway(worker)
    log_aside(secrets_of(gateway.settings.values()))
    logging.getLogger("gunicorn.error").addFilter(quotes_no_request)
    gateway.start()
    gc.collect()
    gc.freeze()  # what is loaded now stays: looking at it again would stop all threads for 20 ms
    # This process's own copy of the setting: the master keeps STOP_WITHIN.
    worker.cfg.set("graceful_timeout", min(worker.cfg.graceful_timeout, _REQUESTS_END_WITHIN))
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()

    def drain_when_told() -> None:
        signals.get()
        gateway.drain()

    def on_sigterm(number: int, frame: FrameType | None) -> None:
        signals.put(number)
        worker.handle_exit(number, frame)

    threading.Thread(target=drain_when_told, name="httptrading-stop", daemon=True).start()
    signal.signal(signal.SIGTERM, on_sigterm)
    # As in gunicorn's own init_signals: a system call under way goes on.
    signal.siginterrupt(signal.SIGTERM, False)


def worker_exit(server: Any, worker: Any) -> None:
    """Closes the brokers. `atexit` would be too late: it waits for every non-daemon thread of the
    SDKs, and the master kills the process meanwhile."""
    if hasattr(worker, "wsgi"):  # else the application was never loaded
        _gateway(worker).close()
        flush_logs()


def _gateway(worker: Any) -> Any:
    return worker.wsgi.extensions["httptrading"]
