"""The service's log: JSON lines without secrets, written by a thread that holds nobody up."""

from __future__ import annotations

import io
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from acceptance.kit import wait_for
from httptrading.app.config_checks import ConfigurationError
from httptrading.app.logs import MOST_WAITING, JsonLines, WrittenAside, log_to_stderr


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.Logger("httptrading.test")
    yield logger
    logger.handlers.clear()


def aside(logger: logging.Logger, stream: TextIO) -> WrittenAside:
    handler = WrittenAside(stream)
    handler.setFormatter(JsonLines(["a-long-secret"]))
    logger.addHandler(handler)
    return handler


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def written(handler: WrittenAside, stream: io.StringIO, count: int) -> list[dict[str, Any]]:
    """The lines when there are so many; one `flush` waits for a second at most."""

    def look() -> bool:
        handler.flush()
        return len(stream.getvalue().splitlines()) >= count

    wait_for(look, f"{count} lines")
    return lines(stream.getvalue())


def test_lines_in_their_order_and_without_secrets(logger: logging.Logger) -> None:
    stream = io.StringIO()
    handler = aside(logger, stream)
    for number in range(100):
        logger.info("event %d of a-long-secret", number, extra={"status": number})
    found = written(handler, stream, 100)
    assert [line["event"] for line in found] == [f"event {n} of ***" for n in range(100)]
    assert [line["status"] for line in found] == list(range(100))


@pytest.mark.parametrize(
    "secret", ['pass"word', "back\\slash", "-----BEGIN KEY-----\nMIIEvQ\n", "密码密码密码"]
)
def test_secrets_are_found_as_json_spells_them(logger: logging.Logger, secret: str) -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines([secret]))
    logger.addHandler(handler)
    logger.info("before %s after", secret)
    assert [line["event"] for line in lines(stream.getvalue())] == ["before *** after"]


def test_a_record_that_makes_no_sense_ends_nothing(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = io.StringIO()
    handler = aside(logger, stream)
    logger.info("%d", "not a number")
    logger.info("after it")
    assert [line["event"] for line in written(handler, stream, 1)] == ["after it"]
    assert "Logging error" in capsys.readouterr().err


def test_a_log_that_nobody_reads_stops_and_swells_nothing(logger: logging.Logger) -> None:
    end, start = os.pipe()  # takes 64 KiB, then whoever writes waits
    with open(end) as reader:
        rest = threading.Thread(target=reader.read)
        with open(start, "w") as stream:
            handler = aside(logger, stream)
            for _ in range(MOST_WAITING * 3):
                logger.info("x" * 100)
            assert handler._waiting.qsize() <= MOST_WAITING
            assert json.loads(reader.readline())["event"] == "x" * 100
            rest.start()
            while handler._waiting.qsize():
                handler.flush()
            handler.flush()  # the last batch as well
        rest.join()


def test_a_closed_log_is_no_error(logger: logging.Logger, tmp_path: Path) -> None:
    stream = (tmp_path / "log").open("w")
    handler = aside(logger, stream)
    stream.close()
    logger.info("to nobody")
    handler.flush()


def test_a_level_that_is_none_is_named(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPTRADING_LOG_LEVEL", "loud")
    with pytest.raises(ConfigurationError, match="HTTPTRADING_LOG_LEVEL must be DEBUG, INFO"):
        log_to_stderr()
