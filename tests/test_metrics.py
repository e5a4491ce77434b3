"""What the service tells of itself: `/metrics` for Prometheus, `instance/state` for its clients."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from prometheus_client.parser import text_string_to_metric_families

from acceptance.kit import wait_for
from httptrading import (
    BaseBroker,
    BrokerUnavailable,
    InstanceSettings,
    Window,
    combine,
    create_app,
)
from httptrading.brokers.base import Combination
from httptrading.model import Cash, Lifecycle, OrderType, TimeInForce

INSTANCE, TOKEN = "metricsInstance01", "metricsInstanceToken1"
DOWN, DOWN_TOKEN = "downInstance00001", "downInstanceToken001"
METRICS_TOKEN = "prometheus-token-1"
HEADERS = {"HT-TOKEN": TOKEN}


class Limited(BaseBroker):
    windows = {"asking": Window(5, 3600)}
    costs = {"cash": ("asking",)}
    ages = {"cash": 0}
    combinations = combine(["US"], [OrderType.Limit], [TimeInForce.DAY], [Lifecycle.RTH])
    quote_regions = frozenset({"US"})

    def cash(self) -> Cash:
        return Cash("USD", 1)


class Down(BaseBroker):
    def connect(self) -> None:
        raise BrokerUnavailable("The cable is out")


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Flask]:
    brokers = [Limited({"account": str(tmp_path)}, INSTANCE, [TOKEN]), Down({}, DOWN, [DOWN_TOKEN])]
    # Room for a machine that stands still for seconds: nothing here is to be late or replaced.
    instances = [InstanceSettings(broker, deadline=30.0, hard_limit=60.0) for broker in brokers]
    app = create_app(brokers=instances, data_dir=tmp_path, metrics_token=METRICS_TOKEN)
    yield app
    app.extensions["httptrading"].close()


def samples(app: Flask) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = app.test_client().get(
        "/httptrading/metrics", headers={"Authorization": f"Bearer {METRICS_TOKEN}"}
    )
    assert answer.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def state(app: Flask, instance_id: str = INSTANCE, token: str = TOKEN) -> Any:
    path = f"/httptrading/api/{instance_id}/instance/state"
    return app.test_client().get(path, headers={"HT-TOKEN": token}).get_json()["state"]


def test_metrics_count_requests_and_show_the_gateway(app: Flask) -> None:
    client = app.test_client()
    for _ in range(2):
        assert (
            client.get(f"/httptrading/api/{INSTANCE}/cash/state", headers=HEADERS).status_code
            == 200
        )
    client.get(f"/httptrading/api/{INSTANCE}/position/state", headers=HEADERS)
    found = samples(app)
    digest = hashlib.sha256(INSTANCE.encode()).hexdigest()[:6]
    at = (("instance", f"{INSTANCE[:4]}…{digest}"),)
    trade = (("connection", "trade"), *at)
    asked = ("httptrading_requests_total", (("outcome", "OK"), ("route", "cash/state")))
    refused = (
        "httptrading_requests_total",
        (("outcome", "UNSUPPORTED"), ("route", "position/state")),
    )
    assert found[asked] == 2
    assert found[refused] == 1
    assert found["httptrading_request_seconds_count", (("route", "cash/state"),)] == 2
    assert found["httptrading_connected", trade] == 1
    assert found["httptrading_queue_depth", trade] == 0
    assert found["httptrading_reconnects_total", trade] == 0
    assert found["httptrading_worker_replacements_total", trade] == 0
    assert found["httptrading_window_slots_left", (*at, ("window", "asking"))] == 3
    assert found["httptrading_unsettled_orders", at] == 0
    assert found["httptrading_oldest_unsettled_seconds", at] == 0


def test_metrics_are_told_without_the_journal(app: Flask, tmp_path: Path) -> None:
    """That is when they are looked at; orders that nobody can count are no 0 then."""
    (tmp_path / "journal.sqlite").write_bytes(b"no database " * 1000)
    path = f"/httptrading/api/{INSTANCE}"
    assert app.test_client().get(f"{path}/cash/state", headers=HEADERS).status_code == 200
    assert app.test_client().get(f"{path}/instance/state", headers=HEADERS).status_code == 503
    names = [name for name, _ in samples(app)]
    assert names.count("httptrading_connected") == 2
    assert names.count("httptrading_window_slots_left") == 1
    assert not [name for name in names if "unsettled" in name]


def test_metrics_need_their_own_token(app: Flask) -> None:
    client = app.test_client()
    for headers in ({}, HEADERS, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}):
        answer = client.get("/httptrading/metrics", headers=headers)
        assert (answer.status_code, answer.text) == (404, "Not Found\n")


def test_metrics_are_off_unless_configured(tmp_path: Path) -> None:
    app = create_app(brokers=[Limited({}, INSTANCE, [TOKEN])], data_dir=tmp_path)
    answer = app.test_client().get("/httptrading/metrics", headers={"Authorization": "Bearer "})
    assert answer.status_code == 404


def test_no_metric_names_an_instance_or_a_token(app: Flask) -> None:
    app.test_client().get(f"/httptrading/api/{INSTANCE}/cash/state", headers=HEADERS)
    told = [value for _, labels in samples(app) for _, value in labels]
    assert any(value.startswith(INSTANCE[:4]) for value in told)
    assert not any(INSTANCE in value or TOKEN in value for value in told)


def test_instance_state_tells_limits_and_what_the_broker_takes(app: Flask) -> None:
    app.test_client().get(f"/httptrading/api/{INSTANCE}/cash/state", headers=HEADERS)
    found = state(app)
    assert found["connections"][0]["connected"] is True
    assert found["connections"][0]["lastError"] == ""
    assert found["limits"] == [
        {
            "type": "limit",
            "name": "asking",
            "limit": 5,
            "seconds": 3600,
            "left": 4,
            "kept": 0,
            "keptForOrders": 0,
        }
    ]
    assert found["operations"] == ["ping", "cash"]
    assert found["quoteRegions"] == ["US"]
    assert found["unsettledOrders"] == 0 and found["oldestUnsettled"] is None
    told = {
        Combination(
            one["region"],
            OrderType[one["orderType"]],
            TimeInForce[one["timeInForce"]],
            Lifecycle[one["lifecycle"]],
        )
        for one in found["orders"]
    }
    assert told == Limited.combinations


def test_instance_state_tells_why_a_broker_is_down(app: Flask) -> None:
    def told() -> str:
        return str(state(app, DOWN, DOWN_TOKEN)["connections"][0]["lastError"])

    assert wait_for(told, "the reason") == "The cable is out"
    assert state(app, DOWN, DOWN_TOKEN)["connections"][0]["connected"] is False
