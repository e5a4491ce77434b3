"""Structured logs of the service: one JSON object a line on stderr, with secrets blotted out.

Only for a service of our own (`run()`, gunicorn.conf.py); a host application keeps its logging.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from httptrading.brokers.settings import InstanceSettings

_FIELDS = ("request_id", "instance", "status", "outcome", "milliseconds")
_SHORTEST_SECRET = 6


class JsonLines(logging.Formatter):
    """`secrets` never leave, wherever in a record they stand."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        self._secrets = sorted({s for s in secrets if len(s) >= _SHORTEST_SECRET}, key=len)[::-1]

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
        text = json.dumps(line, ensure_ascii=False)
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


def log_to_stderr(secrets: Iterable[str] = ()) -> None:
    """`HTTPTRADING_LOG_LEVEL` (default INFO) decides how much."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(secrets))
    logger = logging.getLogger("httptrading")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(os.environ.get("HTTPTRADING_LOG_LEVEL", "INFO").upper())
