"""The service behind a real nginx with the shipped sample (`make deploy-test`)."""

from __future__ import annotations

import socket
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from deployment import (
    METRICS_TOKEN,
    PAPER,
    SLOW,
    TOKEN,
    Answer,
    Site,
    accepts,
    nginx_files,
    running_nginx,
    running_service,
    wait_until,
)

ORDER = {
    "tradeType": "Securities",
    "ticker": "AAPL",
    "region": "US",
    "qty": 2,
    "orderType": "Market",
    "timeInForce": "DAY",
    "lifecycle": "RTH",
    "direction": "BUY",
}


@pytest.fixture(scope="module")
def slow_answer(site: Site) -> Future[Answer]:
    """A request that takes almost the longest time there is; it runs beside the other tests."""
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(
        site.ask,
        "GET",
        f"/httptrading/api/{SLOW}/cash/state",
        HT_TOKEN=f"{TOKEN}-slow",
        HT_TIMEOUT="30",
    )
    pool.shutdown(wait=False)
    return answer


def test_nginx_accepts_the_sample(tmp_path: Path) -> None:
    frame = nginx_files(tmp_path, 1, "127.0.0.1:8080")
    done = subprocess.run(
        ["nginx", "-t", "-c", str(frame), "-e", str(tmp_path / "error.log")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


def test_an_order_goes_through(site: Site, slow_answer: Future[Answer]) -> None:
    placed = site.api("POST", "order/place", ORDER | {"clientOrderId": "deploy-1"})
    assert placed.status == 200 and placed.json["ex"] is None
    again = site.api("POST", "order/place", ORDER | {"clientOrderId": "deploy-1"})
    assert again.json["orderId"] == placed.json["orderId"]
    assert again.headers["Idempotent-Replayed"] == "true"
    wait_until(lambda: site.api("GET", "position/state").json["positions"])
    (position,) = site.api("GET", "position/state", Cache_Control="no-cache").json["positions"]
    assert position["contract"]["ticker"] == "AAPL"


def test_a_wrong_token_meets_the_same_404_as_a_wrong_instance(site: Site) -> None:
    wrong_token = site.api("GET", "cash/state", HT_TOKEN="wrong-token-0123456")
    wrong_id = site.ask("GET", "/httptrading/api/nobodyNobody1234/cash/state", HT_TOKEN=TOKEN)
    varying = ("Date", "X-Request-ID")
    assert wrong_token.status == wrong_id.status == 404
    assert wrong_token.body == wrong_id.body
    assert {k: v for k, v in wrong_token.headers.items() if k not in varying} == {
        k: v for k, v in wrong_id.headers.items() if k not in varying
    }


def test_the_gateway_itself_answers_a_body_that_is_too_large(site: Site) -> None:
    answer = site.api("POST", "order/place", {"x": "y" * 70_000})
    assert answer.status == 413
    assert answer.json["error"]["code"] == "INVALID_REQUEST"


def test_nginx_stops_what_is_much_too_large(site: Site) -> None:
    answer = site.api("POST", "order/place", {"x": "y" * 200_000})
    assert (answer.status, answer.headers["Content-Type"]) == (413, "text/html")  # as README says


def test_only_the_service_is_there(site: Site) -> None:
    assert site.ask("GET", "/").status == 404
    assert site.ask("GET", "/httptrading/openapi.json").json["openapi"].startswith("3.1")
    bearer = f"Bearer {METRICS_TOKEN}"
    metrics = site.ask("GET", "/httptrading/metrics", Authorization=bearer)
    assert metrics.status == 200 and b"httptrading" in metrics.body


def test_the_access_log_masks_instance_ids(site: Site) -> None:
    answer = site.api("GET", "cash/state?currency=HKD", X_Request_ID="deploy-test-42")
    assert answer.headers["X-Request-ID"] == "deploy-test-42"
    site.ask("GET", f"/httptrading//api/{PAPER}/../{PAPER}/cash")
    site.ask("GET", f"/HTTPTRADING/api/{PAPER}/cash/state")
    site.ask("GET", "/done")
    wait_until(lambda: "deploy-test-42" in site.log() and '"GET (other)"' in site.log())
    log = site.log()
    assert '"GET /httptrading/api/kQ4x.../cash/state" 200' in log
    assert "currency" not in log
    written = "".join(
        path.read_text() for path in site.directory.glob("*.log") if path.name != "error.log"
    )
    for secret in (PAPER, TOKEN, SLOW):
        assert secret not in written


def test_nothing_is_sent_twice_when_the_service_dies_in_between(tmp_path: Path) -> None:
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept_and_cut() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    accepted.append(client.recv(65536))

        threading.Thread(target=accept_and_cut, daemon=True).start()
        with running_nginx(tmp_path, f"127.0.0.1:{listener.getsockname()[1]}") as site:
            assert site.api("POST", "order/place", ORDER).status == 502
            assert site.api("GET", "cash/state").status == 502
        listener.shutdown(socket.SHUT_RDWR)
    assert [bytes(request).split(b" ")[0] for request in accepted] == [b"POST", b"GET"]


def test_a_unix_socket_serves_as_well(tmp_path: Path) -> None:
    path = str(tmp_path / "http.sock")
    with running_service(tmp_path, "--bind", f"unix:{path}") as process:
        wait_until(lambda: process.poll() is not None or accepts(path))
        with running_nginx(tmp_path, f"unix:{path}") as site:
            wait_until(lambda: site.ask("GET", "/httptrading/healthz").status == 200)
            assert site.api("GET", "cash/state").json["cash"]["currency"] == "USD"


def test_a_request_may_take_as_long_as_it_asked_for(slow_answer: Future[Answer]) -> None:
    answer = slow_answer.result(timeout=60)
    assert (answer.status, answer.json["cash"]["amount"]) == (200, 1)
