"""`gunicorn` with gunicorn.conf.py: its start, its refusals, rude clients, and its end."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from httptrading.brokers.base import BaseBroker
from httptrading.brokers.registry import broker_register
from httptrading.model import Cash
from simulators.exchange import keep_port

ROOT = Path(__file__).parent.parent
ID, TOKEN = "kQ4xV8mT1zR6pW9c", "b7Jd-2Ls9Qa0Xe5Ru8Yt"
PATIENCE = 60.0


@broker_register("hanging", "Hanging broker")
class HangingBroker(BaseBroker):
    """Its cash never comes, and nothing can interrupt it."""

    def cash(self) -> Cash:
        (self.data_dir / "asked").touch()
        while True:
            time.sleep(1)


class Service:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = keep_port(self)
        self.config = ""
        self.environ: dict[str, str] = {}

    def start(self, *options: str) -> subprocess.Popen[str]:
        environ = os.environ | {
            "HTTPTRADING_DATA_DIR": str(self.directory / "data"),
            "HTTPTRADING_PORT": str(self.port),
            "PYTHONPATH": str(ROOT / "tests"),
        }
        if self.config:
            path = self.directory / "httptrading.toml"
            path.write_text(self.config)
            path.chmod(0o600)
            environ["HTTPTRADING_CONFIG"] = str(path)
        self.log_path = self.directory / "log"
        with self.log_path.open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *options],
                cwd=ROOT,
                env=environ | self.environ,
                stderr=log,
                text=True,
            )

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        end = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert time.monotonic() < end, self.log
            time.sleep(0.05)
        return found

    def wait_for_log(self, pattern: str) -> str:
        return str(self.wait_for(lambda: re.search(pattern, self.log))[0])

    @contextlib.contextmanager
    def running(self, *options: str) -> Iterator[subprocess.Popen[str]]:
        process = self.start(*options)
        try:
            end = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    self.get("healthz")
                    break
                assert process.poll() is None and time.monotonic() < end, self.log
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            process.wait(PATIENCE)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def get(self, path: str, **headers: str) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/httptrading/{path}",
            headers={"HT-TIMEOUT": "30", **headers},
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return json.load(answer)


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
def hanging(service: Service) -> Service:
    service.config = f"""
[[instance]]
broker = "test_gunicorn:HangingBroker"
id = "{ID}"
tokens = ["{TOKEN}"]
"""
    return service


def test_without_configuration_the_printed_curl_line_works(service: Service) -> None:
    service.environ["HTTPTRADING_SHOW_TOKEN"] = "1"
    with service.running():
        line = service.wait_for_log(r"curl -H 'HT-TOKEN: \S+' \S+")
        done = re.fullmatch(r"curl -H 'HT-TOKEN: (\S+)' (\S+)", line)
        assert done
        headers = {"HT-TOKEN": done[1], "HT-TIMEOUT": "30"}
        request = urllib.request.Request(done[2], headers=headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert json.load(answer)["cash"]["currency"] == "USD"


def test_the_token_is_shown_by_make_run_only(service: Service) -> None:
    with service.running():
        service.wait_for_log("one paper account runs")
    tokens = re.findall(
        r'tokens = \["(\S+)"\]', next(service.directory.rglob("*.toml")).read_text()
    )
    assert len(tokens) == 1 and tokens[0] not in service.log


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("-w", "2"), "workers = 2: httptrading runs as one worker process with threads"),
        (("-k", "sync", "--threads", "1"), "worker_class = sync: httptrading needs"),
    ],
)
def test_what_would_break_the_rule_of_one_process_is_refused(
    service: Service, options: tuple[str, ...], reason: str
) -> None:
    assert service.start(*options).wait(180) == 1
    assert reason in service.log


def test_a_wrong_configuration_ends_the_start_with_a_list(service: Service) -> None:
    service.config = f'prot = 1\n[[instance]]\nbroker = "Futuu"\nid = "x"\ntokens = ["{TOKEN}"]\n'
    assert service.start().wait(180) == 1
    assert "the configuration has 3 mistakes" in service.log
    assert "Traceback" not in service.log
    assert TOKEN not in service.log


def test_a_port_in_use_ends_the_start_in_one_line(service: Service) -> None:
    with socket.create_server(("127.0.0.1", service.port)):
        assert service.start().wait(180) == 1
    [line] = [line for line in service.log.splitlines() if "listen" in line]
    assert f"cannot listen on 127.0.0.1, port {service.port} (Address already in use)" in line
    assert "Traceback" not in service.log


def test_sigterm_ends_a_service_whose_broker_hangs(hanging: Service) -> None:
    # A master with patience: 4 s, as shipped, pass while a machine stands still.
    patient = ("--graceful-timeout", "45")
    with hanging.running(*patient) as process, hanging.connect() as client:
        client.sendall(
            f"GET /httptrading/api/{ID}/cash/state HTTP/1.1\r\nHost: x\r\n"
            f"HT-TOKEN: {TOKEN}\r\nHT-TIMEOUT: 30\r\n\r\n".encode()
        )
        hanging.wait_for(lambda: list(hanging.directory.rglob("asked")))
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert client.recv(65536).startswith(b"HTTP/1.1 50")
        process.wait(PATIENCE)
        assert time.monotonic() - began < 20


def test_clients_that_never_close_do_not_stall_the_others(service: Service) -> None:
    """Each of them would hold plain gthread's main loop for 2 s: 40 s in all."""
    with service.running(), contextlib.ExitStack() as stack:
        began = time.monotonic()
        for _ in range(20):
            client = stack.enter_context(service.connect())
            client.sendall(b"GET /httptrading/healthz HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        assert service.get("healthz") == {"status": "ok"}
        assert time.monotonic() - began < 20


def test_silent_connections_take_no_thread(service: Service) -> None:
    """Each of them would hold one of the 32 threads for 5 s: 30 s in all."""
    with service.running(), contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(service.connect())
        began = time.monotonic()
        assert service.get("healthz") == {"status": "ok"}
        assert time.monotonic() - began < 15


def test_more_connections_than_files_may_be_open_end_nothing(service: Service) -> None:
    path = service.directory / "few.conf.py"
    path.write_text(
        f"exec(open({str(ROOT / 'gunicorn.conf.py')!r}).read())\n"
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))\n"
        "from httptrading.app import gthread\n"
        "gthread.SILENCE = 1\n"
    )
    with service.running("-c", str(path)), contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(service.connect())
        assert service.get("healthz") == {"status": "ok"}
        assert "Too many open files" not in service.log


def patient(service: Service) -> str:
    """A configuration file with which threads wait an hour for their clients' next requests."""
    path = service.directory / "patient.conf.py"
    path.write_text(
        f"exec(open({str(ROOT / 'gunicorn.conf.py')!r}).read())\n"
        "from httptrading.app import gthread\n"
        "gthread.STAY = 3600\n"
    )
    return str(path)


def test_a_thread_that_stays_with_its_client_is_called_back(service: Service) -> None:
    """Both threads wait for their clients' next requests, and a third client comes."""
    with (
        service.running("-c", patient(service), "--threads", "2"),
        contextlib.ExitStack() as stack,
    ):
        clients = [
            stack.enter_context(
                contextlib.closing(
                    http.client.HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
                )
            )
            for _ in range(6)
        ]
        for client in (*clients, *reversed(clients), *clients):
            client.request("GET", "/httptrading/healthz")
            assert json.load(client.getresponse()) == {"status": "ok"}


def test_a_request_that_drips_in_holds_nobody_up(service: Service) -> None:
    """Two threads, and four clients whose headers never end."""
    stop = threading.Event()

    def drip(client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            client.sendall(b"GET /httptrading/healthz HTTP/1.1\r\nX-Slow: ")
            while not stop.wait(0.2):
                client.sendall(b"x")

    with service.running("--threads", "2"), contextlib.ExitStack() as stack:
        threads = [
            threading.Thread(target=drip, args=(stack.enter_context(service.connect()),))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        try:
            assert service.get("healthz") == {"status": "ok"}
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_body_that_never_comes_is_not_waited_for(service: Service) -> None:
    """gunicorn waits 5 s for each of them, after its answer: 75 s in all with two threads."""
    request = b"POST /httptrading/api/nobody/order/place HTTP/1.1\r\nHost: x\r\n"
    with service.running("--threads", "2"), contextlib.ExitStack() as stack:
        for _ in range(30):
            client = stack.enter_context(service.connect())
            client.sendall(request + b"Content-Length: 100\r\n\r\n")
        assert service.get("healthz") == {"status": "ok"}


def test_a_body_that_comes_too_late_is_no_request(service: Service) -> None:
    """Else its answer would be taken for that of the next one, behind a proxy another client's."""
    service.config = f'[[instance]]\nbroker = "Paper"\nid = "{ID}"\ntokens = ["{TOKEN}"]\n'
    path = service.directory / "hasty.conf.py"
    path.write_text(
        f"exec(open({str(ROOT / 'gunicorn.conf.py')!r}).read())\n"
        "from httptrading.app import gthread\n"
        "gthread.Connection.expect.__defaults__ = (0.5,)\n"
    )
    late = b"GET /httptrading/healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    head = f"POST /httptrading/api/{ID}/order/place HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(late)}\r\n"
    with service.running("-c", str(path)):
        for token, status in (("nobody's", b" 404 "), (TOKEN, b" 400 ")):
            with service.connect() as client, client.makefile("rb") as answers:
                client.sendall(f"{head}HT-TOKEN: {token}\r\n\r\n".encode())
                assert status in answers.readline()
                while answers.readline() != b"\r\n":
                    pass
                assert answers.readline().endswith(b"\n")
                assert answers.read() == b""  # it is closed


def test_requests_sent_together_are_answered_together(service: Service) -> None:
    """The thread would wait an hour for the socket, while the next request is in its buffer."""
    with service.running("-c", patient(service)), service.connect() as client:
        client.sendall(b"GET /httptrading/healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        answers = b""
        while answers.count(b'{"status": "ok"}') < 3:
            answers += client.recv(65536)


def test_half_a_request_is_given_up(service: Service) -> None:
    with service.running(), service.connect() as client:
        client.sendall(b"GET /httptrading/healthz HTTP/1.1\r\nX-Slow: ")
        assert client.recv(1) == b""


def test_a_service_that_stops_still_answers_on_kept_connections(service: Service) -> None:
    """Until it has said that it closes them, however many connections have ended before; and who
    comes anew is refused meanwhile, not taken in and cut off at the end."""

    def refuses() -> bool:
        try:
            service.connect().close()
        except ConnectionRefusedError:
            return True
        return False

    path = service.directory / "lingering.conf.py"
    path.write_text(
        f"exec(open({str(ROOT / 'gunicorn.conf.py')!r}).read())\n"
        "import gunicorn.workers.gthread\n"
        "from httptrading.app import gthread, hooks\n"
        "gthread.STAY = 0\n"
        "gunicorn.workers.gthread.STOP_KEEPALIVE_LINGER = hooks._REQUESTS_END_WITHIN = 60\n"
        "graceful_timeout = 60\n"
    )
    with service.running("-c", str(path)) as process:
        for _ in range(3):
            service.get("healthz")
        kept = http.client.HTTPConnection("127.0.0.1", service.port, timeout=PATIENCE)
        with contextlib.closing(kept):
            for number in itertools.count():
                kept.request("GET", "/httptrading/healthz")
                answer = kept.getresponse()
                assert json.load(answer) == {"status": "ok"}
                if answer.will_close:
                    break
                if number == 0:
                    kept.auto_open = 0
                    process.terminate()
                    service.wait_for(refuses)


def test_sighup_reloads_the_configuration(service: Service) -> None:
    service.config = f'[[instance]]\nbroker = "Paper"\nid = "{ID}"\ntokens = ["{TOKEN}"]\n'
    with service.running() as process:
        state = f"api/{ID}/cash/state"
        headers = {"HT-TOKEN": TOKEN}
        assert service.get(state, **headers)["cash"]["amount"] == 100000
        path = service.directory / "httptrading.toml"
        # With a mistake in it: the service goes on, and says why.
        path.write_text(service.config.replace("Paper", "Papre"))
        process.send_signal(signal.SIGHUP)
        assert "instance 1" in service.wait_for_log("not reloaded.*Papre.*")
        assert TOKEN not in service.log
        assert service.get(state, **headers)["cash"]["amount"] == 100000
        path.write_text(service.config.replace(TOKEN, TOKEN[::-1]))
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                found = service.get(state, **{"HT-TOKEN": TOKEN[::-1]})
                break
            assert time.monotonic() < end, service.log
            time.sleep(0.1)
        assert found["cash"]["amount"] == 100000
