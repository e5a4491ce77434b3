"""Structured logs of the service: one JSON object a line on stderr, with secrets blotted out.

Only for a service of our own (`run()`, gunicorn.conf.py); a host application keeps its logging.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TextIO

from httptrading.app.config_checks import ConfigurationError
from httptrading.brokers.settings import InstanceSettings

_FIELDS = ("request_id", "instance", "status", "outcome", "milliseconds")
_SHORTEST_SECRET = 6
_to_json = json.JSONEncoder(ensure_ascii=False).encode

GATHER = 0.02
"""Seconds in which lines come together, to be written at once and not amidst their requests."""

MOST_WAITING = 10_000
"""Lines beyond are dropped: a log that nobody reads neither stops nor swells the service."""


class JsonLines(logging.Formatter):
    """`secrets` never leave, wherever in a record they stand."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        # As they stand in JSON text, in which they are looked for: a quote has a backslash there.
        spelled = {_to_json(s)[1:-1] for s in secrets if len(s) >= _SHORTEST_SECRET}
        self._secrets = sorted(spelled, key=len)[::-1]

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "event": record.getMessage(),
        }
        for name in _FIELDS:
            if hasattr(record, name):
                line[name] = getattr(record, name)
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        text = _to_json(line)
        for secret in self._secrets:
            if secret in text:
                text = text.replace(secret, "***")
        return text


def secrets_of(instances: Iterable[InstanceSettings]) -> set[str]:
    """Ids, tokens and every text argument of the brokers (not short ones like REAL or a port)."""
    found: set[str] = set()
    for instance in instances:
        broker = instance.broker
        found |= {broker.instance_id, *broker.tokens}
        found |= {value for value in broker.broker_args.values() if isinstance(value, str)}
    return {text for text in found if not os.path.isabs(text) and text not in _COMMON}


_COMMON = {"127.0.0.1", "localhost", "SIMULATE"}


class WrittenAside(logging.StreamHandler[TextIO]):
    """Formats and writes on a thread of its own: no request waits for its line in the log."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._waiting: queue.SimpleQueue[logging.LogRecord | threading.Event] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="httptrading-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put(record)

    def flush(self) -> None:
        """Returns when what has been logged so far is written, or after a second."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(1.0)

    def _run(self) -> None:
        while True:
            batch = [self._waiting.get()]
            if isinstance(batch[0], logging.LogRecord):
                time.sleep(GATHER)
            with suppress(queue.Empty):
                while len(batch) < MOST_WAITING:
                    batch.append(self._waiting.get_nowait())
            lines = [self._line(one) for one in batch if isinstance(one, logging.LogRecord)]
            with suppress(OSError, ValueError):  # stderr is closed: there is nowhere to say so
                self.stream.write("".join(lines))
                self.stream.flush()
            for one in batch:
                if isinstance(one, threading.Event):
                    one.set()

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record) + "\n"
        except Exception:  # the record's text and its arguments do not fit
            self.handleError(record)
            return ""


def log_to_stderr(secrets: Iterable[str] = ()) -> None:
    """`HTTPTRADING_LOG_LEVEL` (default INFO) decides how much; ConfigurationError for no level."""
    _log_with(logging.StreamHandler(sys.stderr), secrets)


def log_aside(secrets: Iterable[str] = ()) -> None:
    """The same by a thread of its own; after the fork, therefore."""
    _log_with(WrittenAside(sys.stderr), secrets)


def _log_with(handler: logging.Handler, secrets: Iterable[str]) -> None:
    logger = logging.getLogger("httptrading")
    try:
        logger.setLevel(os.environ.get("HTTPTRADING_LOG_LEVEL", "INFO").upper())
    except ValueError:
        known = "DEBUG, INFO, WARNING, ERROR or CRITICAL"
        raise ConfigurationError([f"HTTPTRADING_LOG_LEVEL must be {known}"]) from None
    handler.setFormatter(JsonLines(secrets))
    logger.handlers[:] = [handler]
    logger.propagate = False


def quotes_no_request(record: logging.LogRecord) -> bool:
    """A filter for gunicorn's log: what it warns of, it quotes, and a malformed request line has
    the instance id, a header without its colon the token. The client is still told."""
    text = str(record.msg)
    if text.startswith("Invalid request from "):
        record.msg = re.sub("['\"].*", "…", text, flags=re.DOTALL)
    return True


def flush_logs() -> None:
    """Writes what has been logged so far; for the end of a process, which may come suddenly."""
    for handler in logging.getLogger("httptrading").handlers:
        handler.flush()
