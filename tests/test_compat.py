"""`compat="1.0"`: the answers of the published httptrading 1.0.8, key for key and kind for kind.

The expected shapes were read off that release's `http_server.py` (envelope, routes, echo of the
body) and `model.py` (the nodes); prices there are Python floats, quantities ints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from acceptance.kit import Answer, wait_for
from httptrading.errors import BrokerUnavailable, OrderNotFound, Rejected
from httptrading.model import Cash, Order, OrderReport
from simulators.scripted import AAPL, LIMIT_ORDER, Stage, stage

CONTRACT = {"type": "contract", "tradeType": "Securities", "region": "US", "symbol": "AAPL"}
OF_1_0 = {**{key: value for key, value in LIMIT_ORDER.items() if key != "ticker"}, "symbol": "AAPL"}


@pytest.fixture(scope="module")
def theater(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    ages = dict.fromkeys(("cash", "positions", "quote", "order", "market_status"), 0.0)
    data_dir = tmp_path_factory.mktemp("data")
    with stage(data_dir, options={"compat": "1.0"}, ages=ages) as running:
        running.ready()
        yield running


@pytest.fixture
def on(theater: Stage) -> Iterator[Stage]:
    theater.script.do.clear()
    theater.script.received.clear()
    yield theater
    theater.script.do.clear()


def reached(stage: Stage) -> list[str]:
    """What requests have asked of the broker; connecting and listing are the gateway's own."""
    background = ("connect", "close", "recent_orders")
    operations = [one.operation for one in list(stage.script.received)]
    return [operation for operation in operations if operation not in background]


def body_of(answer: Answer) -> dict[str, Any]:
    """As a 1.0 client parses it: floats and ints as they are printed."""
    assert answer.status == 200, answer
    found = json.loads(answer.text)
    assert answer.headers["Content-Type"].startswith("application/json")
    assert isinstance(found.pop("time"), str)
    assert found.pop("type") == "apiResponse"
    assert found.pop("instanceId") == "ScriptedBroker0000"
    assert found.pop("broker") == "scripted"
    assert found.pop("brokerDisplay") == "剧本证券"
    assert isinstance(found, dict)
    return found


def same(found: Any, expected: Any) -> None:
    """Equal in keys and values, and a float where a float is expected."""
    assert type(found) is type(expected), (found, expected)
    if isinstance(expected, dict):
        assert set(found) == set(expected)
        for key in expected:
            same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == expected


def with_ticker(node: dict[str, Any]) -> dict[str, Any]:
    """Ours stands beside the old name."""
    return {**node, "ticker": node["symbol"]}


def test_ping(on: Stage) -> None:
    same(body_of(on.trader().ping()), {"ex": None, "pong": True})


def test_cash_is_printed_with_a_fraction(on: Stage) -> None:
    for amount, printed in ((30877, 30877.0), (30877.499, 30877.499), (0, 0.0), (-2, -2.0)):
        on.script.do["cash"] = lambda amount=amount: Cash("USD", amount)
        node = {"type": "cash", "currency": "USD", "amount": printed}
        same(body_of(on.trader().cash()), {"ex": None, "cash": node})
    on.script.do["cash"] = lambda: Cash("USD", 30877)
    assert '"amount": 30877.0}' in on.trader().cash().text


def test_positions(on: Stage) -> None:
    node = {
        "type": "position",
        "broker": "scripted",
        "brokerDisplay": "剧本证券",
        "contract": with_ticker(CONTRACT),
        "unit": "Share",
        "currency": "USD",
        "qty": 2400,
    }
    same(body_of(on.trader().positions()), {"ex": None, "positions": [node]})


def test_quote_by_symbol(on: Stage) -> None:
    answer = on.trader().get("market/quote", tradeType="Securities", region="US", symbol="AAPL")
    node = {
        "type": "quote",
        "contract": with_ticker(CONTRACT),
        "currency": "USD",
        "isTradable": True,
        "latest": 11.53,
        "preClose": 11.49,
        "openPrice": 11.5,
        "highPrice": 11.55,
        "lowPrice": 11.44,
        "timestamp": 1748409918000,
    }
    same(body_of(answer), {"ex": None, "quote": node})
    assert on.script.calls("quote")[0].arguments["contract"] == AAPL


def test_market_states(on: Stage) -> None:
    def node(region: str) -> dict[str, Any]:
        return {
            "type": "marketStatus",
            "region": region,
            "originStatus": "AFTERNOON",
            "unifiedStatus": "RTH",
        }

    status = {"type": "marketStatusMap", "securities": {"US": node("US"), "HK": node("HK")}}
    same(body_of(on.trader().market()), {"ex": None, "marketStatus": status})


def test_an_order_from_placing_to_its_cancellation(on: Stage) -> None:
    body = {**OF_1_0, "price": 200, "side": "BUY", "remark": {"a": [1, 2.5, None]}}
    placed = body_of(on.trader().post("order/place", body))
    order_id = placed["orderId"]
    same(placed, {"ex": None, "orderId": order_id, "args": body})  # the body as it came
    arguments = on.script.calls("place_order")[0].arguments
    assert arguments["price"] == 200.0 and arguments["qty"] == 12

    node = {
        "type": "order",
        "orderId": order_id,
        "currency": "USD",
        "qty": 12,
        "filledQty": 0,
        "avgPrice": 0.0,
        "errorReason": "",
        "isCanceled": False,
        "isFilled": False,
        "isCompleted": False,
        "isCancelable": True,
    }
    same(body_of(on.trader().state(order_id)), {"ex": None, "order": node})
    report = on.script.orders[-1]
    on.script.orders[-1] = OrderReport(
        Order(order_id, "USD", 12, 5, 199.5, is_pending_cancel=True), report.mark
    )
    node |= {"filledQty": 5, "avgPrice": 199.5, "isCancelable": False}
    same(body_of(on.trader().state(order_id)), {"ex": None, "order": node})
    same(body_of(on.trader().cancel(order_id)), {"ex": None, "canceled": True})
    assert on.script.calls("cancel_order")[0].arguments == {"order_id": order_id}


@pytest.mark.parametrize(
    ("changes", "price"),
    [
        ({"price": "200.50"}, 200.5),
        ({"price": 200.5}, 200.5),
        ({"orderType": "Market", "price": 0}, None),
        ({"orderType": "Market", "price": 200.5}, None),
        ({"orderType": "Market", "price": None}, None),
        ({"orderType": "Market", "price": ""}, None),
    ],
    ids=str,
)
def test_prices_as_1_0_took_them(on: Stage, changes: dict[str, Any], price: float | None) -> None:
    body = OF_1_0 | changes
    answer = body_of(on.trader().post("order/place", body))
    assert answer["ex"] is None and answer["args"] == body
    assert on.script.calls("place_order")[0].arguments["price"] == price


def test_an_order_id_may_be_a_number(on: Stage) -> None:
    answer = on.trader().request("POST", "order/cancel", text='{"orderId": 69788888, "x": 1}')
    same(body_of(answer), {"ex": None, "canceled": True})
    assert on.script.calls("cancel_order")[0].arguments == {"order_id": "69788888"}


@pytest.mark.parametrize("kind", ["", "text/plain; charset=utf-8", "application/octet-stream"])
def test_a_body_is_json_whatever_its_content_type_says(on: Stage, kind: str) -> None:
    """`requests.post(url, data=json.dumps(body))` names none, for one."""
    trader, headers = on.trader(), {"Content-Type": kind}
    text = json.dumps(OF_1_0)
    answer = body_of(trader.request("POST", "order/place", text=text, headers=headers))
    assert answer["ex"] is None and answer["args"] == OF_1_0
    text = json.dumps({"orderId": answer["orderId"]})
    answer = body_of(
        trader.request("POST", "order/cancel", query={"_": "1"}, text=text, headers=headers)
    )
    same(answer, {"ex": None, "canceled": True})


BAD: list[dict[str, Any]] = [
    {"qty": 0},
    {"qty": "12"},
    {"qty": True},
    {"price": 0},
    {"price": "NaN"},
    {"price": "sNaN"},
    {"price": "Infinity"},
    {"price": "1e999999999"},
    {"price": "many"},
    {"price": True},
    {"price": [1]},
    {"orderType": "Stop"},
    {"symbol": 1},
    {"region": None},
]


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_bad_input_is_told_with_200_and_reaches_no_broker(
    on: Stage, changes: dict[str, Any]
) -> None:
    answer = body_of(on.trader().post("order/place", OF_1_0 | changes))
    assert set(answer) == {"ex"}
    assert next(iter(changes)) in answer["ex"] or "ticker" in answer["ex"]
    assert not reached(on)


BAD_TEXTS = [
    "",
    "[]",
    "{",
    '{"price": NaN}',
    '{"a": 1e999999999}',
    '{"a": "\\ud800"}',
    '{"a": ' + "[" * 900 + "]" * 900 + "}",
]


@pytest.mark.parametrize("text", BAD_TEXTS, ids=lambda text: text[:20])
def test_bad_bodies(on: Stage, text: str) -> None:
    for route in ("order/place", "order/cancel"):
        answer = body_of(on.trader().request("POST", route, text=text))
        assert set(answer) == {"ex"} and answer["ex"]
    assert not reached(on)


def test_an_echo_never_breaks_an_order_that_was_placed(on: Stage) -> None:
    """Unknown keys are ignored, whatever they hold, and come back as JSON."""
    extra = (
        '"a": 1e999999999, "b": NaN, "c": 1e-999999999, "d": [[[[1]]]], "e": -0.0, "f": 1e22, '
        '"g": "é\\u0000", "h": ' + "9" * 300
    )
    text = json.dumps(OF_1_0)[:-1] + f", {extra}}}"
    answer = on.trader().request("POST", "order/place", text=text)
    found = body_of(answer)
    assert found["ex"] is None and found["orderId"]
    assert found["args"]["a"] is None and found["args"]["b"] is None
    assert found["args"]["c"] == 0 and found["args"]["f"] == 1e22
    assert found["args"]["g"] == "é\x00" and found["args"]["d"] == [[[[1]]]]
    assert len(answer.text) < 3000
    assert len(on.script.calls("place_order")) == 1


def test_every_error_is_200_with_ex_alone(on: Stage) -> None:
    def raising(error: Exception) -> Any:
        def run(**arguments: Any) -> None:
            raise error

        return run

    trader = on.trader()
    for error in (Rejected("not enough cash"), OrderNotFound("gone"), ValueError("s3cr3t")):
        on.script.do["cash"] = on.script.do["place_order"] = raising(error)
        for answer in (trader.cash(), trader.post("order/place", OF_1_0)):
            found = body_of(answer)
            assert set(found) == {"ex"} and found["ex"] and "s3cr3t" not in found["ex"]
    assert set(body_of(trader.request("PUT", "cash/state"))) == {"ex"}
    assert set(body_of(trader.request("POST", "order/place", headers={}))) == {"ex"}
    assert set(body_of(trader.get("market/quote", region="US"))) == {"ex"}
    on.script.do["connect"] = on.script.do["cash"] = raising(BrokerUnavailable("is away"))
    wait_for(lambda: "is away" in trader.cash().text, "an answer that it is down")
    same(body_of(trader.ping()), {"ex": None, "pong": False})
    on.script.do.clear()
    wait_for(lambda: '"ex": null' in trader.cash().text, "the broker to be back")


def test_before_authentication_it_is_404(on: Stage) -> None:
    client = on.app.test_client()
    path = "/httptrading/api/ScriptedBroker0000/cash/state"
    for headers in ({}, {"HT-TOKEN": "wrongToken00000000"}):
        response = client.get(path, headers=headers)
        assert (response.status_code, response.data) == (404, b"Not Found\n")
