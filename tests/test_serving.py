"""The three ways to serve it, as real processes: `run()`, gunicorn with our files, a host's app.

Stops, second owners and preloading are about processes, so nothing here is in-process.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from acceptance.kit import wait_for
from acceptance.seed import SAMPLE
from httptrading.app import bulkhead, hooks
from httptrading.brokers.gateway import DRAIN_SECONDS
from httptrading.errors import Busy
from simulators.exchange import keep_port

ROOT = Path(__file__).parent.parent
ID, OTHER_ID = "servedInstance001", "servedInstance002"
TOKEN, OTHER_TOKEN = "servedToken0000001", "servedToken0000002"
STOPS_WITHIN = 20.0
"""Seconds: much more than it takes, for a machine that stands still; less than `PATIENT_MASTER`."""
PATIENT_MASTER = 45
"""Seconds after which gunicorn's master kills, so that the worker process ends by itself or fails
the test; 4 s, as shipped, pass while a machine stands still."""
API = f"/httptrading/api/{ID}"
ORDER = {
    "tradeType": "Securities",
    "ticker": "GOOD",
    "region": "US",
    "price": 12.5,
    "qty": 12,
    "orderType": "Limit",
    "timeInForce": "DAY",
    "lifecycle": "RTH",
    "direction": "BUY",
}
RUN = f"""
    import sys
    from httptrading import InstanceSettings, Paper, run
    from httptrading.app import hooks
    from simulators.isolated import IsolatedBroker

    hooks.STOP_WITHIN = {PATIENT_MASTER}
    port, isolation = int(sys.argv[1]), sys.argv[2]
    run(
        host="127.0.0.1",
        port=port,
        brokers=[
            InstanceSettings(
                IsolatedBroker({{"ledger": "ledger"}}, "{ID}", ["{TOKEN}"]),
                isolation=isolation,
                connect_timeout=60.0,
            ),
            Paper({{}}, "{OTHER_ID}", ["{OTHER_TOKEN}"]),
        ],
        data_dir="data",
    )
"""


class Service:
    """A process that listens, and a client of it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self._log = log

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        token: str | None = TOKEN,
        headers: Mapping[str, str] = {},
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"HT-TIMEOUT": "30", **headers}
        if token is not None:
            sent["HT-TOKEN"] = token
        data = body
        if isinstance(body, dict):
            sent["Content-Type"], data = "application/json", json.dumps(body)
        try:
            connection.request(method, path, data, sent, encode_chunked=not isinstance(data, str))
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, *arguments: Any, **more: Any) -> tuple[int, Any]:
        status, _, content = self.ask(method, path, *arguments, **more)
        return status, json.loads(content)

    def stop(self) -> float:
        """SIGTERM; the seconds until the process has ended."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return time.monotonic() - began

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for one in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if one.status() != psutil.STATUS_ZOMBIE:  # perhaps nobody reaps an orphan here
                found.append(one)
    return found


def free_port() -> int:
    """Nobody else is given it as long as these tests run."""
    return keep_port(free_port)


def environment(**more: str) -> dict[str, str]:
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HTTPTRADING_")}
    return {**kept, "PYTHONPATH": paths, **more}


@contextlib.contextmanager
def started(
    folder: Path, port: int, *command: str, host: str = "127.0.0.1", **environ: str
) -> Iterator[Service]:
    """Runs until the block ends; whatever is left then is killed."""
    log = folder / f"log-{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            stdout=output,
            stderr=output,
            env=environment(**environ),
        )
    service = Service(process, port, log)
    family: list[psutil.Process] = []

    def listens() -> bool:
        assert process.poll() is None, service.log
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), 1).close()
            return True
        return False

    try:
        wait_for(listens, "the service to listen")
        yield service
    finally:
        if process.poll() is None:
            family = service.children()
        process.kill()
        process.wait()
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def script(folder: Path, text: str, name: str = "start.py") -> str:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return str(path)


def serving(folder: Path, isolation: str = "thread") -> contextlib.AbstractContextManager[Service]:
    port = free_port()
    return started(folder, port, script(folder, RUN), str(port), isolation)


def until_served(service: Service, path: str = f"{API}/cash/state", token: str = TOKEN) -> None:
    wait_for(lambda: service.ask("GET", path, token=token)[0] == 200, "the broker to be served")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("service")) as running:
        until_served(running)
        yield running


# --- run() ------------------------------------------------------------------------------------
def test_run_serves_with_one_process(service: Service) -> None:
    status, body = service.json("POST", f"{API}/order/place", ORDER)
    assert (status, body["ex"], body["args"]["price"]) == (200, None, 12.5)
    paper = f"/httptrading/api/{OTHER_ID}/ping/state"
    assert service.json("GET", paper, token=OTHER_TOKEN)[1]["pong"] is True
    assert len(service.children()) == 1  # gunicorn's one worker process


def test_strangers_get_the_same_bytes_over_the_wire(service: Service) -> None:
    seen = set()
    for route in ("cash/state", "order/place", "no/such/route"):
        for instance_id, token in (
            (ID, None),
            (ID, ""),
            (ID, "wrongToken00000000"),
            (ID, OTHER_TOKEN),
            (ID, TOKEN + "x"),
            (OTHER_ID, TOKEN),
            ("noSuchInstance000", TOKEN),
            ("noSuchInstance000", None),
        ):
            path = f"/httptrading/api/{instance_id}/{route}"
            for method, body in (("GET", None), ("POST", ORDER), ("PUT", ORDER), ("OPTIONS", None)):
                status, headers, content = service.ask(method, path, body, token)
                kept = tuple((key, value) for key, value in headers if key != "Date")
                seen.add((status, kept, content))
    assert len(seen) == 1
    ((status, headers, content),) = seen
    assert (status, content) == (404, b"Not Found\n")
    ours = [key for key, _ in headers if key not in ("Server", "Connection")]
    assert ours == ["Content-Type", "Cache-Control", "Content-Length"]


def test_bodies_over_the_wire(service: Service) -> None:
    path, kind = f"{API}/order/place", {"Content-Type": "application/json"}
    body = json.dumps(ORDER).encode()

    def chunks(data: bytes, size: int = 1000) -> Iterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    assert service.ask("POST", path, chunks(body), headers=kind)[0] == 200
    assert service.ask("POST", path, chunks(body[:-5]), headers=kind)[0] == 400
    assert service.ask("POST", path, chunks(body + b" " * 70_000), headers=kind)[0] == 413
    assert service.ask("POST", path, b" " * 70_000, headers=kind)[0] == 413
    assert service.ask("POST", path, body, headers={"Content-Type": "text/plain"})[0] == 415
    assert service.ask("GET", f"{API}/cash/state")[0] == 200


def test_a_large_body_that_is_refused_unread_ends_no_connection(service: Service) -> None:
    """A proxy sends other clients' requests on it: nginx answered 502 to every tenth of them."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.connect()
    connection.auto_open = 0
    with contextlib.closing(connection):
        for token, status in (("x", 404), (TOKEN, 413)):
            headers = {"HT-TOKEN": token, "Content-Type": "application/json"}
            connection.request("POST", f"{API}/order/place", b" " * 120_000, headers)
            response = connection.getresponse()
            assert (response.status, response.read() != b"") == (status, True)
            connection.request("GET", f"{API}/cash/state", headers={"HT-TOKEN": TOKEN})
            response = connection.getresponse()
            assert (response.status, response.read() != b"") == (200, True)


def raw(port: int, text: bytes) -> bytes:
    """What comes back for these bytes, until the service closes."""
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        connection.sendall(text)
        with suppress(OSError):  # the service may have closed at the first byte
            connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").read()


def test_an_order_whose_body_was_cut_is_not_placed(service: Service) -> None:
    """All of the JSON has come, but not all that was announced: the client gave up in between."""
    head = f"POST {API}/order/place HTTP/1.1\r\nHost: x\r\nHT-TOKEN: {TOKEN}\r\n"
    head += "Content-Type: application/json\r\n"
    for number, announced in enumerate(("Content-Length: {more}", "Transfer-Encoding: chunked")):
        name = f"cut-{number}"
        body = json.dumps(ORDER | {"clientOrderId": name})
        chunk = "" if number == 0 else f"{len(body):x}\r\n"
        text = f"{head}{announced.format(more=len(body) + 2)}\r\n\r\n{chunk}{body}"
        answer = raw(service.port, text.encode())
        assert answer.startswith(b"HTTP/1.1 400 "), answer
        assert b"could not be read to its end" in answer
        query = f"{API}/order/state?clientOrderId={name}"
        assert service.ask("GET", query)[0] == 404


def test_nonsense_on_the_wire_stops_nothing(service: Service) -> None:
    head = f"POST {API}/order/place HTTP/1.1\r\nHost: x\r\nHT-TOKEN: {TOKEN}\r\n".encode()
    json_head = head + b"Content-Type: application/json\r\n"
    for text in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        json_head + b"Content-Length: 100\r\n\r\n{",
        json_head + b"Content-Length: -1\r\n\r\n{}",
        json_head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n",
        json_head + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
        head + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        f"GET {API}/cash/state?{'x' * 100_000} HTTP/1.1\r\n\r\n".encode(),
    ):
        answer = raw(service.port, text)
        assert b" 500 " not in answer.partition(b"\r\n")[0], (text[:80], answer)
        assert TOKEN.encode() not in answer
        assert service.ask("GET", f"{API}/cash/state")[0] == 200


def whole_lines(log: str) -> list[str]:
    """Without one that is being written."""
    return log.split("\n")[:-1]


def test_the_log_is_json_without_secrets(service: Service) -> None:
    service.ask("GET", f"{API}/cash/state", headers={"X-Request-ID": "in-the-log-1"})
    line = wait_for(
        lambda: next((one for one in whole_lines(service.log) if "in-the-log-1" in one), None),
        "the request's line",
    )
    found = json.loads(line)
    assert (found["event"], found["status"], found["outcome"]) == ("GET cash/state", 200, "OK")
    for secret in (ID, OTHER_ID, TOKEN, OTHER_TOKEN):
        assert secret not in service.log


def test_gunicorns_log_quotes_no_request(service: Service) -> None:
    """A path that is not encoded, and headers that are none; the client is told what is wrong."""
    before = service.log.count("Invalid request from")
    for text, told in (
        (f"GET {API}/market/quote?ticker=腾讯 HTTP/1.1\r\n\r\n", b"Invalid Request Line"),
        (f"GET {API}/market/quote?ticker=BRK B HTTP/1.1\r\n\r\n", b"Invalid HTTP Version"),
        (f"GET / HTTP/1.1\r\nHT-TOKEN {TOKEN}\r\n\r\n", b"Invalid HTTP Header"),
        (f"GET / HTTP/1.1\r\nHT-TOKEN={TOKEN}: it's\r\n\r\n", b"Invalid HTTP header name"),
    ):
        answer = raw(service.port, text.encode())
        assert answer.startswith(b"HTTP/1.1 400 ") and told in answer
    wait_for(lambda: service.log.count("Invalid request from") == before + 4, "the warnings")
    assert ID not in service.log and TOKEN not in service.log


def test_a_second_process_for_the_same_accounts_is_refused(service: Service) -> None:
    folder = Path(service._log.parent)
    port = free_port()
    refused = subprocess.run(
        [sys.executable, script(folder, RUN), str(port), "thread"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(),
    )
    assert refused.returncode == 1
    worker = service.children()[0].pid
    assert "already served" in refused.stderr and f"process {worker}" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert ID not in refused.stderr and TOKEN not in refused.stderr
    assert service.ask("GET", f"{API}/cash/state")[0] == 200


CROWDED = RUN.replace('data_dir="data",', 'data_dir="data", threads=8,')


def test_a_crowd_at_a_hanging_broker_leaves_threads_for_the_others(tmp_path: Path) -> None:
    port = free_port()
    start = script(tmp_path, CROWDED)
    with started(tmp_path, port, start, str(port), "thread") as service:
        until_served(service)
        paper = f"/httptrading/api/{OTHER_ID}/ping/state"
        until_served(service, paper, OTHER_TOKEN)
        query = "tradeType=Securities&region=US&ticker=HELD"
        answers: list[int] = []

        def wait() -> None:
            answers.append(service.ask("GET", f"{API}/market/quote?{query}")[0])

        crowd = [threading.Thread(target=wait) for _ in range(12)]
        for one in crowd:
            one.start()
        # Of 8 threads 2 are kept for each account, so 6 at most can wait for this one.
        wait_for(lambda: len(answers) >= 6, "the refusals")
        status, body = service.json("GET", paper, token=OTHER_TOKEN)
        assert (status, body["pong"]) == (200, True)
        assert answers == [503] * 6  # and the others wait still
        (tmp_path / "ledger.free").touch()
        for one in crowd:
            one.join(60)
        assert answers == [503] * 6 + [200] * 6
        until_served(service)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside another"])
def test_a_crowd_at_hanging_quotes_holds_no_order_up(tmp_path: Path, alone: bool) -> None:
    text = CROWDED.replace("IsolatedBroker", "IsolatedQuotes")
    if alone:
        text = "".join(line for line in text.splitlines(True) if "Paper({" not in line)
    port = free_port()
    with started(tmp_path, port, script(tmp_path, text), str(port), "thread") as service:
        until_served(service)
        query = "tradeType=Securities&region=US&ticker=HELD"
        answers: list[int] = []

        def wait() -> None:
            answers.append(service.ask("GET", f"{API}/market/quote?{query}")[0])

        crowd = [threading.Thread(target=wait) for _ in range(12)]
        for one in crowd:
            one.start()
        waiting = 8 if alone else 6
        wait_for(lambda: len(answers) >= 12 - waiting, "the refusals")
        status, placed = service.json("POST", f"{API}/order/place", ORDER)
        assert status == 200
        named = {"orderId": placed["orderId"]}
        assert service.ask("POST", f"{API}/order/cancel", named)[0] == 200
        assert answers == [503] * (12 - waiting)  # and the others wait still
        (tmp_path / "ledger.free").touch()
        for one in crowd:
            one.join(60)
        assert answers == [503] * (12 - waiting) + [200] * waiting


def test_a_crowd_at_the_only_account_queues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing hangs, and there is no neighbour: nobody is refused."""
    monkeypatch.setattr(bulkhead, "BRIEF", 60.0)
    monkeypatch.setattr(bulkhead, "LIVELY", 60.0)
    places = bulkhead.Bulkhead(12, [ID])
    served = threading.Event()

    def come() -> None:
        with places.place(ID, changes=False):
            served.set()

    with contextlib.ExitStack() as crowd:
        first = crowd.enter_context(contextlib.ExitStack())
        first.enter_context(places.place(ID, changes=False))
        for _ in range(7):
            crowd.enter_context(places.place(ID, changes=False))
        late = threading.Thread(target=come)
        late.start()
        for _ in range(4):
            crowd.enter_context(places.place(ID, changes=True))
        assert not served.is_set()
        first.close()
        assert served.wait(60)
        late.join()


def test_a_crowd_at_one_account_of_several_is_refused_at_once() -> None:
    places = bulkhead.Bulkhead(12, [ID, OTHER_ID])
    with contextlib.ExitStack() as crowd:
        for _ in range(6):
            crowd.enter_context(places.place(ID, changes=False))
        for name, changes in ((ID, True), (ID, True), (ID, True), (ID, True), (OTHER_ID, False)):
            with pytest.raises(Busy), places.place(ID, changes=False):
                pass
            crowd.enter_context(places.place(name, changes=changes))
        with pytest.raises(Busy), places.place(ID, changes=True):
            pass
    for _ in range(2):  # each place has come back to where it was taken from
        with contextlib.ExitStack() as crowd:
            for _ in range(6):
                crowd.enter_context(places.place(ID, changes=True))


# --- stopping -----------------------------------------------------------------------------------
def test_running_calls_are_answered_before_they_are_killed() -> None:
    assert DRAIN_SECONDS < hooks._REQUESTS_END_WITHIN < hooks.STOP_WITHIN


def test_an_idle_service_ends_cleanly(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        until_served(service)
        family = service.children()
        assert service.stop() < STOPS_WITHIN
        assert service.process.returncode == 0
        wait_for(lambda: not alive(family), "the children's end")
        assert "Traceback" not in service.log


@pytest.mark.parametrize(("isolation", "ticker"), [("thread", "HANG"), ("process", "GIL")])
def test_sigterm_ends_a_service_whose_broker_hangs(
    tmp_path: Path, isolation: str, ticker: str
) -> None:
    """What was running is told as unknown, and settled at the next start."""
    answers: list[tuple[int, Any]] = []
    with serving(tmp_path, isolation) as service:
        until_served(service)

        def place() -> None:
            body = {**ORDER, "ticker": ticker, "clientOrderId": "running"}
            answers.append(
                service.json("POST", f"{API}/order/place", body, headers={"HT-TIMEOUT": "30"})
            )

        client = threading.Thread(target=place)
        client.start()
        ledger = tmp_path / "ledger"
        wait_for(lambda: ledger.exists() and ledger.read_text(), "the order to reach the broker")
        family = service.children()
        assert service.stop() < STOPS_WITHIN
        client.join(60)
        wait_for(lambda: not alive(family), "the children's end")
    ((status, body),) = answers
    assert (status, body["error"]["code"]) == (504, "OUTCOME_UNKNOWN")
    assert body["error"]["clientOrderId"] == "running"
    with serving(tmp_path, isolation) as service:
        path = f"{API}/order/state?clientOrderId=running"
        wait_for(lambda: service.ask("GET", path)[0] == 200, "the order to be settled")
        again = {**ORDER, "ticker": ticker, "clientOrderId": "running"}
        status, headers, _ = service.ask("POST", f"{API}/order/place", again)
        assert (status, dict(headers)["Idempotent-Replayed"]) == (200, "true")
        assert len(ledger.read_text().splitlines()) == 1


# --- gunicorn with our files --------------------------------------------------------------------
@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    """wsgi.py and gunicorn.conf.py as they lie in the repository, with a configuration."""
    for name in ("wsgi.py", "gunicorn.conf.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "httptrading.toml").write_text(
        f'data_dir = "data"\n[[instance]]\nbroker = "Paper"\nid = "{ID}"\ntokens = ["{TOKEN}"]\n'
        f'[[instance]]\nbroker = "simulators.isolated:IsolatedBroker"\nid = "{OTHER_ID}"\n'
        f'tokens = ["{OTHER_TOKEN}"]\nargs = {{ ledger = "ledger" }}\n'
    )
    (tmp_path / "httptrading.toml").chmod(0o600)
    return tmp_path


def gunicorn(folder: Path, *options: str) -> contextlib.AbstractContextManager[Service]:
    port = free_port()
    return started(
        folder,
        port,
        "-m",
        "gunicorn",
        *options,
        HTTPTRADING_CONFIG="httptrading.toml",
        HTTPTRADING_PORT=str(port),
    )


@pytest.mark.parametrize("options", [(), ("--preload",)], ids=["", "preload"])
def test_gunicorn_alone_serves_the_configuration(
    deployment: Path, options: tuple[str, ...]
) -> None:
    with gunicorn(deployment, *options) as service:
        until_served(service)
        until_served(service, f"/httptrading/api/{OTHER_ID}/cash/state", OTHER_TOKEN)
        status, body = service.json("GET", f"{API}/ping/state")
        assert (status, body["broker"], body["pong"]) == (200, "paper", True)
        old = service.children()
        service.process.send_signal(signal.SIGHUP)  # a new worker process takes the accounts over
        wait_for(lambda: not alive(old), "the old worker to end")
        until_served(service)
        assert service.stop() < STOPS_WITHIN
        assert service.process.returncode == 0


@pytest.mark.parametrize("host", ["::1", "::"])
def test_gunicorn_listens_on_ipv6_and_prints_a_curl_line_that_works(
    deployment: Path, host: str
) -> None:
    environ = {
        "HTTPTRADING_DATA_DIR": str(deployment / "new"),
        "HTTPTRADING_HOST": host,
        "HTTPTRADING_PORT": str(port := free_port()),
        "HTTPTRADING_SHOW_TOKEN": "1",
    }
    with started(deployment, port, "-m", "gunicorn", host="::1", **environ) as service:
        line = r"curl -H 'HT-TOKEN: (\S+)' (http://\[::1\]:\S+)"
        found = wait_for(lambda: re.search(line, service.log), "the curl line")
        headers = {"HT-TOKEN": found[1], "HT-TIMEOUT": "30"}
        with urllib.request.urlopen(urllib.request.Request(found[2], headers=headers)) as answer:
            assert json.load(answer)["cash"]["currency"] == "USD"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workers", "2"), "one worker process"),
        (("--worker-class", "sync", "--threads", "1"), "gthread"),
    ],
    ids=["workers", "class"],
)
def test_gunicorn_refuses_what_would_break_it(
    deployment: Path, options: tuple[str, ...], words: str
) -> None:
    port = free_port()
    refused = subprocess.run(
        [sys.executable, "-m", "gunicorn", *options],
        cwd=deployment,
        capture_output=True,
        text=True,
        timeout=180,
        env=environment(HTTPTRADING_CONFIG="httptrading.toml", HTTPTRADING_PORT=str(port)),
    )
    assert refused.returncode != 0
    assert words in refused.stderr


# --- in somebody's own application ---------------------------------------------------------------
HOST = f"""
    from flask import Flask, jsonify

    import app
    import schemas
    from app.greeting import GREETING
    from httptrading import create_blueprint
    from simulators.isolated import IsolatedBroker

    application = Flask("host")
    application.json.sort_keys = True

    @application.get("/")
    def index():
        return jsonify(greeting=GREETING, app=app.__file__, kind=schemas.KIND)

    @application.errorhandler(404)
    def mine(error):
        return "the host's own 404", 404

    application.register_blueprint(
        create_blueprint(
            [IsolatedBroker({{"ledger": "ledger"}}, "{ID}", ["{TOKEN}"])],
            url_prefix="/trade",
            data_dir="data",
        )
    )
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """An application with packages of its own that are called `app` and `schemas`."""
    script(tmp_path, HOST, "host.py")
    for package in ("app", "schemas"):
        (tmp_path / package).mkdir()
    (tmp_path / "app/__init__.py").write_text("")
    (tmp_path / "app/greeting.py").write_text('GREETING = "hello"\n')
    (tmp_path / "schemas/__init__.py").write_text('KIND = "the host\'s"\n')
    # As installed: nothing of ours is on top, beside the host's own packages.
    package = tmp_path / "site" / "httptrading"
    package.mkdir(parents=True)
    for path in (ROOT / "httptrading").glob("*.py"):
        (package / path.name).symlink_to(path)
    for name in ("app", "brokers", "schemas"):
        shutil.copytree(ROOT / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "site" / "simulators").symlink_to(ROOT / "tests" / "simulators")
    return tmp_path


def hosted(folder: Path, *options: str) -> contextlib.AbstractContextManager[Service]:
    port = free_port()
    return started(
        folder,
        port,
        *("-m", "gunicorn", "--threads", "8", "--bind", f"127.0.0.1:{port}", *options),
        *("--no-control-socket", "--graceful-timeout", "3", "host:application"),
        PYTHONPATH=str(folder / "site"),
    )


TRADE = f"/trade/api/{ID}"


def test_a_blueprint_beside_packages_of_the_same_names(host: Path) -> None:
    with hosted(host, "--preload") as service:
        until_served(service, f"{TRADE}/cash/state")
        status, body = service.json("GET", "/")
        assert status == 200 and body["greeting"] == "hello" and body["kind"] == "the host's"
        assert body["app"] == str(host / "app" / "__init__.py")
        assert service.ask("GET", "/nowhere")[2] == b"the host's own 404"
        assert service.ask("GET", f"{TRADE}/cash/state", token="wrong")[2] == b"Not Found\n"
        status, body = service.json("POST", f"{TRADE}/order/place", ORDER)
        assert status == 200 and list(body)[:2] == ["type", "instanceId"]  # our order, not sorted
        assert service.json("GET", "/trade/openapi.json")[1]["openapi"] == "3.1.0"
        assert service.stop() < STOPS_WITHIN


def test_two_processes_of_a_host_have_one_owner(host: Path) -> None:
    with hosted(host, "--workers", "2") as service:
        until_served(service, f"{TRADE}/cash/state")
        seen: dict[int, Any] = {}

        def both() -> bool:
            status, body = service.json("GET", f"{TRADE}/cash/state")
            seen[status] = body
            return set(seen) == {200, 503}

        wait_for(both, "answers of both processes")
        body = seen[503]
        assert body["error"]["code"] == "BROKER_UNAVAILABLE"
        workers = {one.pid for one in service.children()}
        assert any(f"({pid})" in body["ex"] for pid in workers)
        for _ in range(20):
            service.ask("POST", f"{TRADE}/order/place", ORDER)
        assert service.log.count("leaves it alone") == 1


# --- the seed's samples --------------------------------------------------------------------------
def test_the_sample_broker_and_a_futu_that_nobody_answers(tmp_path: Path) -> None:
    """Both samples in one service: it starts, listens, and says what is not there."""
    port = free_port()
    start = f"""
{SAMPLE}

run(
    host='127.0.0.1',
    port={port},
    brokers=[
        MyTradingApi({{}}, instance_id='{OTHER_ID}', tokens=['{OTHER_TOKEN}', ]),
        Futu(
            broker_args={{
                'host': '127.0.0.1',
                'port': {free_port()},
                'trade_env': 'SIMULATE',
            }},
            instance_id='{ID}',
            tokens=['{TOKEN}', ],
        ),
    ],
)
"""
    (tmp_path / "start.py").write_text(start)
    data = {"HTTPTRADING_DATA_DIR": str(tmp_path / "data")}
    with started(tmp_path, port, "start.py", **data) as service:
        mine = f"/httptrading/api/{OTHER_ID}"
        status, body = service.json("GET", f"{mine}/ping/state", token=OTHER_TOKEN)
        assert (status, body["broker"], body["brokerDisplay"]) == (200, "myApi", "XX证券")
        assert body["pong"] is True
        for method, route, more in (
            ("GET", "cash/state", None),
            ("GET", "position/state", None),
            ("GET", "market/state", None),
            ("GET", "order/state?orderId=1", None),
            ("POST", "order/place", ORDER),
            ("POST", "order/cancel", {"orderId": "1"}),
        ):
            status, body = service.json(method, f"{mine}/{route}", more, token=OTHER_TOKEN)
            assert (status, body["error"]["code"]) == (422, "UNSUPPORTED"), body
            assert "XX证券" in body["ex"]
        status, body = service.json("GET", f"{API}/ping/state")
        assert (status, body["broker"], body["pong"]) == (200, "futu", False)
        status, headers, content = service.ask("GET", f"{API}/cash/state")
        assert (status, json.loads(content)["error"]["code"]) == (503, "BROKER_UNAVAILABLE")
        assert int(dict(headers)["Retry-After"]) >= 1
        assert service.stop() < STOPS_WITHIN
