"""The examples run as they stand, in a directory of their own, and answer over real HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from simulators.exchange import keep_port

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
API = "httptrading/api/WyLqtMhDvAnBb6a3"
TOKEN = "Vt5UCW2sLBvgPXjR"


def free_port() -> int:
    """Nobody else is given it as long as these tests run."""
    return keep_port(free_port)


def ask(port: int, path: str, token: str = TOKEN) -> tuple[int, str]:
    headers = {"HT-TOKEN": token, "HT-TIMEOUT": "30"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def on_port(source: str, port: int, to: Path) -> Path:
    """The example with another port, on loopback: 8080 may be taken here."""
    changed, ports = re.subn(r"port=8080", f"port={port}", source)
    changed = changed.replace("host='0.0.0.0'", "host='127.0.0.1'")
    assert ports == 1
    written = to / "start.py"
    written.write_text(changed)
    return written


@contextlib.contextmanager
def started(directory: Path, port: int, *command: str) -> Iterator[None]:
    """The command as a service; SIGTERM ends it."""
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=directory,
            stdout=log,
            stderr=log,
            env=os.environ
            | {"PYTHONPATH": str(ROOT), "HTTPTRADING_DATA_DIR": str(directory / "data")},
        )
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                assert process.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < end
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()
    assert process.returncode == 0, (directory / "log").read_text()


def test_the_start_script_serves_futu(tmp_path: Path) -> None:
    port = free_port()
    script = on_port((EXAMPLES / "run_futu.py").read_text("utf-8"), port, tmp_path)
    with started(tmp_path, port, str(script)):
        status, text = ask(port, f"{API}/market/state")
        body = json.loads(text)
        # No OpenD here: the service is up all the same, and says what is missing.
        assert (status, body["error"]["code"]) == (503, "BROKER_UNAVAILABLE")
        assert (body["broker"], body["brokerDisplay"]) == ("futu", "富途证券")
        assert ask(port, f"{API}/market/state", "wrong-token-0123456")[0] == 404
    log = (tmp_path / "log").read_text()
    assert "copied from a document" in log
    assert TOKEN not in log


def test_a_custom_broker_is_served(tmp_path: Path) -> None:
    port = free_port()
    script = on_port((EXAMPLES / "custom_broker.py").read_text("utf-8"), port, tmp_path)
    with started(tmp_path, port, str(script)):
        body: Any = json.loads(ask(port, f"{API}/cash/state")[1])
        assert body["brokerDisplay"] == "存钱罐"
        assert body["cash"] == {"type": "cash", "currency": "USD", "amount": 308.5}
        assert json.loads(ask(port, f"{API}/ping/state")[1])["pong"] is True
        status, text = ask(port, f"{API}/position/state")
        assert (status, json.loads(text)["error"]["code"]) == (422, "UNSUPPORTED")


@pytest.mark.parametrize("preload", [(), ("--preload",)], ids=["fork first", "preload"])
def test_an_existing_application_serves_it_beside_its_own_pages(
    tmp_path: Path, preload: tuple[str, ...]
) -> None:
    port = free_port()
    (tmp_path / "host.py").write_text((EXAMPLES / "embed_in_existing_app.py").read_text())
    gunicorn = ("-m", "gunicorn", "--threads", "8", "--bind", f"127.0.0.1:{port}", *preload)
    with started(tmp_path, port, *gunicorn, "--no-control-socket", "host:app"):
        assert ask(port, "") == (200, "the application's own page")
        assert json.loads(ask(port, f"{API}/cash/state")[1])["cash"]["currency"] == "USD"
        assert ask(port, "nowhere")[1] != ask(port, f"{API}/nowhere", "wrong-token-0123456")[1]
