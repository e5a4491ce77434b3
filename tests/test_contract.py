"""The HTTP contract: exact bodies, every row of the error table, and input that must go nowhere."""

from __future__ import annotations

import asyncio
import enum
import io
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder, run_wsgi_app

from acceptance.kit import Answer, in_time, wait_for
from httptrading.brokers.base import Window, combine
from httptrading.brokers.checked import checked
from httptrading.errors import (
    BrokerUnavailable,
    InvalidRequest,
    OrderNotFound,
    OutcomeUnknown,
    RateLimited,
    Rejected,
    Unsupported,
)
from httptrading.model import (
    Cash,
    Contract,
    Fill,
    Lifecycle,
    MarketStatus,
    Order,
    OrderReport,
    OrderType,
    Position,
    Quote,
    TimeInForce,
    TradeType,
    UnifiedStatus,
    Unit,
)
from simulators.scripted import (
    AAPL,
    LIMIT_ORDER,
    QUOTE_TIME,
    ScriptedBroker,
    Stage,
    stage,
)

SECRET = "s3cr3t-signature-8f1c"
QUOTE = {"tradeType": "Securities", "region": "US", "ticker": "AAPL"}
ENVELOPE = ["type", "instanceId", "broker", "brokerDisplay", "time", "ex"]


class ChoosyBroker(ScriptedBroker):
    """Takes only day orders, and has a window for quotes."""

    combinations = combine(["US", "HK", "CN"], OrderType, [TimeInForce.DAY], Lifecycle)
    quote_regions = frozenset({"US", "HK", "CN"})
    windows = {"slow": Window(1, 3600.0)}
    costs = {"market_status": ("slow",)}
    ages = dict.fromkeys(("ping", "quote", "market_status", "cash", "positions", "order"), 0.0)


@pytest.fixture(scope="module")
def theater(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    data_dir = tmp_path_factory.mktemp("data")
    with stage(data_dir, count=2, kind=ChoosyBroker, hard_limit=60.0) as running:
        running.ready()
        yield running


@pytest.fixture
def on(theater: Stage) -> Iterator[Stage]:
    for script in theater.scripts:
        script.do.clear()
        script.received.clear()
    yield theater
    theater.script.do.clear()


def asked(on: Stage) -> list[str]:
    """What reached the broker, but for what the gateway itself asks at any time: listings, about
    orders whose outcome a test before has left open, and orders that it has placed."""
    placed = {report.order.order_id for report in on.script.orders}
    return [
        one.operation
        for one in list(on.script.received)
        if one.operation != "recent_orders"
        and not (one.operation == "order" and one.arguments["order_id"] in placed)
    ]


def place(on: Stage, **changes: Any) -> Answer:
    body = {key: value for key, value in (LIMIT_ORDER | changes).items() if value is not ...}
    return on.trader().post("order/place", body)


def text_of(**changes: Any) -> str:
    """The body with raw JSON put in for some fields."""
    body = json.dumps({key: f"<{key}>" if key in changes else v for key, v in LIMIT_ORDER.items()})
    for key, raw in changes.items():
        if f'"<{key}>"' in body:
            body = body.replace(f'"<{key}>"', raw)
        else:
            body = body[:-1] + f', "{key}": {raw}}}'
    return body


def raw(on: Stage, path: str, method: str = "GET", headers: Any = None, data: Any = None) -> Any:
    return on.app.test_client().open(path, method=method, headers=headers, data=data)


def url(on: Stage, route: str, number: int = 0) -> str:
    return f"/httptrading/api/{on.brokers[number].instance_id}/{route}"


def token(on: Stage, number: int = 0) -> dict[str, str]:
    return {"HT-TOKEN": on.brokers[number].tokens[0]}


# --- success bodies ------------------------------------------------------------------------------
def exact_text(answer: Answer) -> str:
    """The body with its time replaced, which must be one."""
    text, count = re.subn(
        r'"time": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00"',
        '"time": "T"',
        answer.text,
        count=1,
    )
    assert count == 1, answer
    return text


HEAD = (
    '{"type": "apiResponse", "instanceId": "ScriptedBroker0000", "broker": "scripted", '
    '"brokerDisplay": "剧本证券", "time": "T", "ex": null'
)
CONTRACT = (
    '"contract": {"type": "contract", "tradeType": "Securities", "region": "US", "ticker": "AAPL"}'
)
BODIES = {
    "ping/state": ', "pong": true}\n',
    "market/quote?tradeType=Securities&region=US&ticker=AAPL": ', "quote": {"type": "quote", '
    + CONTRACT
    + ', "currency": "USD", "isTradable": true, "latest": 11.53, "preClose": 11.49, '
    '"highPrice": 11.55, "lowPrice": 11.44, "openPrice": 11.5, "timestamp": 1748409918000}}\n',
    "cash/state": ', "cash": {"type": "cash", "currency": "USD", "amount": 30877.499}}\n',
    "position/state": ', "positions": [{"type": "position", "broker": "scripted", '
    '"brokerDisplay": "剧本证券", ' + CONTRACT + ', "unit": "Share", "currency": "USD", '
    '"qty": 2400}]}\n',
}


@pytest.mark.parametrize("route", BODIES)
def test_the_documented_bodies_to_the_letter(on: Stage, route: str) -> None:
    path, _, query = route.partition("?")
    pairs = dict(pair.split("=") for pair in query.split("&") if pair)
    answer = on.trader().get(path, **pairs)
    assert answer.status == 200
    assert exact_text(answer) == HEAD + BODIES[route]
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"


def test_the_market_states_to_the_letter(tmp_path: Any) -> None:
    with stage(tmp_path) as running:
        running.ready()
        state = '"originStatus": "AFTERNOON", "unifiedStatus": "RTH"}'
        assert exact_text(running.trader().get("market/state")) == (
            HEAD + ', "marketStatus": {"type": "marketStatusMap", "securities": {'
            f'"US": {{"type": "marketStatus", "region": "US", {state}, '
            f'"HK": {{"type": "marketStatus", "region": "HK", {state}}}}}}}\n'
        )


def test_an_orders_bodies_to_the_letter(on: Stage) -> None:
    answer = place(on, price=Decimal("200.00"), lifecycle="ETH")
    order_id = answer["orderId"]
    assert exact_text(answer) == (
        HEAD + f', "orderId": "{order_id}", "args": {{"tradeType": "Securities", '
        '"ticker": "AAPL", "region": "US", "price": 200, "qty": 12, "orderType": "Limit", '
        '"timeInForce": "DAY", "lifecycle": "ETH", "direction": "BUY"}, '
        f'"clientOrderId": "{answer["clientOrderId"]}"}}\n'
    )
    assert exact_text(on.trader().state(order_id)) == (
        HEAD + f', "order": {{"type": "order", "orderId": "{order_id}", "currency": "USD", '
        '"qty": 12, "filledQty": 0, "avgPrice": 0, "errorReason": "", "isCanceled": false, '
        '"isFilled": false, "isCompleted": false}}\n'
    )
    assert exact_text(on.trader().cancel(order_id)) == HEAD + "}\n"
    listed = on.trader().orders(limit=1)["orders"][0]
    assert list(listed)[-8:] == [
        "clientOrderId",
        "contract",
        "price",
        "orderType",
        "timeInForce",
        "lifecycle",
        "direction",
        "created",
    ]
    assert on.trader().fills(order_id)["fills"] == []


def test_a_market_order_is_echoed_without_a_price(on: Stage) -> None:
    answer = place(on, orderType="Market", price=...)
    assert "price" not in answer["args"]
    assert on.script.calls("place_order")[0].arguments["price"] is None
    assert place(on, orderType="Market", price=None).ok


def test_a_custom_broker_gets_what_is_documented(on: Stage) -> None:
    assert place(on, clientOrderId="my-1").ok
    (call,) = on.script.calls("place_order")
    given_ = call.arguments
    assert given_["contract"] == AAPL
    assert given_["order_type"] is OrderType.Limit
    assert given_["time_in_force"] is TimeInForce.DAY
    assert given_["lifecycle"] is Lifecycle.RTH
    assert given_["direction"] == "BUY"
    assert type(given_["qty"]) is int and given_["qty"] == 12
    assert type(given_["price"]) is float and given_["price"] == 200.01
    assert given_["client_order_id"] == "my-1"
    assert given_["mark"].isascii() and 0 < len(given_["mark"]) <= 24


def test_healthz_tells_nothing_but_life(on: Stage) -> None:
    response = raw(on, "/httptrading/healthz")
    assert (response.status_code, response.json) == (200, {"status": "ok"})


# --- who is let in -------------------------------------------------------------------------------
def strangers(on: Stage) -> list[tuple[str, dict[str, str]]]:
    """Instance ids and headers of people who have no business here."""
    mine, other = on.brokers
    return [
        (mine.instance_id, {}),
        (mine.instance_id, {"HT-TOKEN": ""}),
        (mine.instance_id, {"HT-TOKEN": "wrongToken00000000"}),
        (mine.instance_id, {"HT-TOKEN": other.tokens[0]}),
        (mine.instance_id, {"HT-TOKEN": mine.tokens[0].lower()}),
        (mine.instance_id, {"HT-TOKEN": mine.tokens[0] + "\xe9"}),
        (mine.instance_id, {"Authorization": f"Bearer {mine.tokens[0]}"}),
        ("WrongInstance0000", {"HT-TOKEN": mine.tokens[0]}),
        (mine.instance_id.lower(), {"HT-TOKEN": mine.tokens[0]}),
        ("%FF%00" + mine.instance_id, {"HT-TOKEN": mine.tokens[0]}),
        ("x" * 300, {"HT-TOKEN": mine.tokens[0]}),
        ("", {"HT-TOKEN": mine.tokens[0]}),
        (mine.instance_id + "/", {"HT-TOKEN": mine.tokens[0]}),  # before a second slash
    ]


ROUTES = ["ping/state", "order/place", "order/cancel-all", "no/such/route", "cash"]


@pytest.mark.parametrize(
    "method", ["GET", "POST", "PUT", "OPTIONS", "TRACE", "DELETE", "PROPFIND", "NOSUCH"]
)
def test_strangers_all_get_the_same_answer(on: Stage, method: str) -> None:
    seen = set()
    for route in ROUTES:
        for instance_id, headers in strangers(on):
            path = f"/httptrading/api/{instance_id}/{route}"
            response = raw(on, path, method, {**headers, "X-Request-ID": "abc"}, b"{}")
            seen.add((response.status, tuple(response.headers), response.data))
    headers = (
        ("Content-Type", "text/plain"),
        ("Cache-Control", "no-store"),  # a shared cache would hand it to whoever has the token
        ("Content-Length", "10"),
    )
    assert seen == {("404 NOT FOUND", headers, b"Not Found\n")}
    assert raw(on, url(on, "no/such"), method, token(on)).data == b"Not Found\n"
    assert not asked(on)


def test_a_stranger_learns_no_method_from_405(on: Stage) -> None:
    for method in ("OPTIONS", "PUT", "TRACE", "PROPFIND", "NOSUCH"):
        mine = raw(on, url(on, "cash/state"), method, token(on))
        assert mine.status_code == 405
        assert mine.headers["Allow"] == "GET"
        assert mine.json["error"]["code"] == "INVALID_REQUEST"


def test_head_is_a_get_without_a_body(on: Stage) -> None:
    response = raw(on, url(on, "cash/state"), "HEAD", token(on))
    assert response.status_code == 200
    assert response.data == b""
    assert int(response.headers["Content-Length"]) > 100
    assert raw(on, url(on, "order/place"), "HEAD", token(on)).status_code == 405
    assert raw(on, url(on, "order/place"), "GET", token(on)).headers["Allow"] == "POST"


# --- the error table -----------------------------------------------------------------------------
def check_error(
    answer: Answer, status: int, code: str, *, outcome: str = "none", retryable: bool = False
) -> None:
    assert answer.status == status, answer
    assert list(answer.body) == [*ENVELOPE, "error"], answer
    assert isinstance(answer["ex"], str) and answer["ex"].strip()
    error = answer.error
    known = ["code", "retryable", "outcome", "fields", "clientOrderId", "requestId"]
    assert list(error) == [name for name in known if name in error]
    assert (error["code"], error["outcome"], error["retryable"]) == (code, outcome, retryable)
    for name, texts in error.get("fields", {}).items():
        for text in texts:  # a predicate: `ex` reads "<name> <text>"
            assert re.match("(must|is|needs|differs|cannot) ", text), (name, text)
    assert error["requestId"] == answer.headers["X-Request-ID"]
    assert ("Retry-After" in answer.headers) == (status in (429, 503)), answer.headers
    if status in (429, 503):
        assert int(answer.headers["Retry-After"]) >= 1


def test_invalid_request(on: Stage) -> None:
    answer = place(on, qty=0, region="XX", ticker=...)
    check_error(answer, 400, "INVALID_REQUEST")
    assert set(answer.error["fields"]) == {"qty", "region", "ticker"}
    assert "US, HK, CN" in answer.error["fields"]["region"][0]
    assert answer.error["fields"]["ticker"] == ["is missing"]


def test_order_not_found(on: Stage) -> None:
    check_error(on.trader().state("404404"), 404, "ORDER_NOT_FOUND")
    check_error(on.trader().state(key="never-used"), 404, "ORDER_NOT_FOUND")

    def unknown(order_id: str) -> None:
        raise OrderNotFound("No such order.")

    on.script.do["cancel_order"] = unknown
    check_error(on.trader().cancel("404404"), 404, "ORDER_NOT_FOUND")


def test_body_too_large_wrong_type_wrong_method(on: Stage) -> None:
    large = text_of(ticker='"' + "A" * 70_000 + '"')
    check_error(on.trader().request("POST", "order/place", text=large), 413, "INVALID_REQUEST")
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        answer = on.trader().request(
            "POST", "order/place", text=text_of(), headers={"Content-Type": kind}
        )
        check_error(answer, 415, "INVALID_REQUEST")
    check_error(on.trader().request("GET", "order/place"), 405, "INVALID_REQUEST")
    check_error(on.trader().request("POST", "cash/state", text="{}"), 405, "INVALID_REQUEST")
    assert not asked(on)


def test_idempotency_conflict(on: Stage) -> None:
    first = place(on, clientOrderId="same-key")
    again = place(on, clientOrderId="same-key")
    assert again["orderId"] == first["orderId"] and again.replayed and not first.replayed
    assert again["time"] == first["time"] or again.replayed
    answer = place(on, clientOrderId="same-key", qty=13)
    check_error(answer, 422, "IDEMPOTENCY_CONFLICT")
    assert answer.error["clientOrderId"] == "same-key"
    assert len(on.script.calls("place_order")) == 1


def test_the_header_is_the_same_key(on: Stage) -> None:
    first = on.trader().place(LIMIT_ORDER, headers={"Idempotency-Key": "by-header"})
    assert first["clientOrderId"] == "by-header"
    assert place(on, clientOrderId="by-header").replayed
    both = on.trader().place(LIMIT_ORDER, key="one", headers={"Idempotency-Key": "two"})
    check_error(both, 400, "INVALID_REQUEST")
    for bad in ("", "with space", "x" * 65, "ключ"):
        builder = {"Idempotency-Key": bad.encode("utf-8").decode("latin-1")}
        check_error(on.trader().place(LIMIT_ORDER, headers=builder), 400, "INVALID_REQUEST")


def test_unsupported_says_what_is_there(on: Stage) -> None:
    answer = place(on, timeInForce="GTC")
    check_error(answer, 422, "UNSUPPORTED")
    assert "US Limit DAY RTH" in answer["ex"]
    check_error(on.trader().cash("HKD"), 422, "UNSUPPORTED")
    assert not on.script.calls("place_order")


def test_broker_rejected(on: Stage) -> None:
    def refuse(**arguments: Any) -> None:
        raise Rejected("Not enough buying power")

    on.script.do["place_order"] = refuse
    answer = place(on, clientOrderId="refused-1")
    check_error(answer, 422, "BROKER_REJECTED")
    assert answer["ex"] == "Not enough buying power"


def test_rate_limited(on: Stage) -> None:
    assert on.trader().market().ok
    answer = on.trader().market()
    check_error(answer, 429, "RATE_LIMITED", retryable=True)
    assert 3000 < int(answer.headers["Retry-After"]) <= 3600

    def limited() -> None:
        raise RateLimited("Too often", retry_after=7.2)

    on.script.do["cash"] = limited
    answer = on.trader().cash()
    check_error(answer, 429, "RATE_LIMITED", retryable=True)
    assert answer.headers["Retry-After"] == "8"


def test_busy(tmp_path: Any) -> None:
    """One call hangs, two wait in the queue; the next is refused at once."""
    answers: list[Answer] = []
    with stage(tmp_path, queue_size=2, hard_limit=60.0) as on:
        on.ready()
        with on.script.hold("cash"):
            threads = [threading.Thread(target=lambda: answers.append(on.trader().cash()))]
            threads[0].start()
            on.script.arrived("cash")
            worker = next(iter(on.gateway.instance(on.brokers[0].instance_id).workers.values()))
            for number in range(2):
                threads.append(threading.Thread(target=lambda: answers.append(on.trader().cash())))
                threads[-1].start()
                wait_for(lambda number=number: worker.queued() > number, "a queued call")
            check_error(place(on), 503, "BUSY", retryable=True)
            assert not on.script.calls("place_order")
        for thread in threads:
            thread.join(60)
    assert [answer.status for answer in answers] == [200, 200, 200]


def test_broker_unavailable(tmp_path: Any) -> None:
    def down(**arguments: Any) -> None:
        raise BrokerUnavailable("XX is not reachable; check the network")

    with stage(tmp_path, hard_limit=60.0) as on:
        on.ready()
        on.script.do["connect"] = on.script.do["cash"] = down
        check_error(on.trader().cash(), 503, "BROKER_UNAVAILABLE", retryable=True)
        wait_for(lambda: place(on).code == "BROKER_UNAVAILABLE", "an answer that it is down")
        answer = place(on)
        check_error(answer, 503, "BROKER_UNAVAILABLE", retryable=True)
        assert "not reachable" in answer["ex"]
        assert on.trader().ping()["pong"] is False
        assert not on.script.calls("place_order")
        on.script.do.clear()
        wait_for(lambda: on.trader().cash().ok, "the broker to be back")


def test_timeout_and_outcome_unknown(tmp_path: Any) -> None:
    with stage(tmp_path, hard_limit=60.0) as running:
        running.ready()
        with running.script.hold("cash", "place_order", "cancel_order"):
            answer = running.trader().cash(timeout=1)
            check_error(answer, 504, "TIMEOUT", retryable=True)
        wait_for(lambda: running.trader().cash().ok, "a worker that serves again")
        with running.script.hold("place_order"):
            answer = in_time(
                lambda seconds: running.trader().place(LIMIT_ORDER, key="late-1", timeout=seconds),
                lambda answer: running.script.calls("place_order"),
            )
            check_error(answer, 504, "OUTCOME_UNKNOWN", outcome="unknown")
            assert answer.error["clientOrderId"] == "late-1" and "late-1" in answer["ex"]
        wait_for(lambda: running.trader().state(key="late-1").ok, "the late result in the journal")
        order_id = running.trader().order(key="late-1")["orderId"]
        with running.script.hold("cancel_order"):
            answer = in_time(
                lambda seconds: running.trader().cancel(order_id, timeout=seconds),
                lambda answer: running.script.calls("cancel_order"),
            )
            check_error(answer, 504, "OUTCOME_UNKNOWN", outcome="unknown")
        assert len(running.script.calls("place_order")) == 1


def test_the_table_is_complete() -> None:
    """Each code of the error tree has been provoked above, or is our own bug (below)."""
    from httptrading.errors import ERRORS

    with open(__file__, encoding="utf-8") as file:
        source = file.read()
    assert not [code for code in ERRORS if f'"{code}"' not in source]


# --- limits of a request -------------------------------------------------------------------------
@pytest.mark.parametrize("seconds", ["1", "30", "1.5", "29.999999", "9.547058091167775", "01"])
def test_ht_timeout_within_bounds(on: Stage, seconds: str) -> None:
    headers = {"HT-TIMEOUT": seconds}
    assert on.trader().request("GET", "instance/state", headers=headers).ok
    answer = on.trader().request("GET", "cash/state", headers=headers)
    # A machine that stands still may use the time up, but not less than that.
    assert answer.ok or (answer.code == "TIMEOUT" and answer.seconds >= float(seconds)), answer


@pytest.mark.parametrize(
    "seconds", ["0", "0.999999", "30.000001", "31", "-5", "abc", "", "1e1", "NaN", "inf", "１"]
)
def test_ht_timeout_out_of_bounds(on: Stage, seconds: str) -> None:
    headers = {"HT-TIMEOUT": seconds.encode().decode("latin-1")}
    answer = on.trader().request("GET", "cash/state", headers=headers)
    check_error(answer, 400, "INVALID_REQUEST")
    assert set(answer.error["fields"]) == {"HT-TIMEOUT"}
    assert not asked(on)


def test_request_ids(on: Stage) -> None:
    answer = on.trader().request("GET", "cash/state", headers={"X-Request-ID": "mine-1:a.b_c"})
    assert answer.headers["X-Request-ID"] == "mine-1:a.b_c"
    ours = set()
    for bad in ("", "two words", "x" * 65, "<script>", "a\xe9"):
        answer = on.trader().request("GET", "cash/state", headers={"X-Request-ID": bad})
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["X-Request-ID"])
        ours.add(answer.headers["X-Request-ID"])
    assert len(ours) == 5


def test_symbol_is_another_name_of_ticker(on: Stage) -> None:
    answer = place(on, ticker=..., symbol="brk/b")
    assert answer["args"]["ticker"] == "BRK.B" and "symbol" not in answer["args"]
    assert place(on, symbol="AAPL").ok
    answer = place(on, symbol="MSFT")
    assert set(answer.error["fields"]) == {"symbol"}
    quote = on.trader().get("market/quote", tradeType="Securities", region="HK", symbol="700")
    assert quote["quote"]["contract"]["ticker"] == "00700"
    assert on.script.calls("quote")[-1].arguments["contract"].ticker == "00700"


def test_query_parameters(on: Stage) -> None:
    more = Contract(TradeType.Securities, "00700", "HK")
    on.script.do["positions"] = lambda: [
        Position("scripted", "剧本证券", one, Unit.Share, "USD", 1) for one in (AAPL, more)
    ]
    trader = on.trader()

    def held(**query: str) -> list[str]:
        answer = trader.get("position/state", **query)
        return [node["contract"]["ticker"] for node in answer["positions"]]

    assert held() == ["AAPL", "00700"]
    assert held(region="HK") == ["00700"]
    assert held(region="HK", ticker="700", tradeType="Securities") == ["00700"]
    assert held(region="US", symbol="aapl") == ["AAPL"]
    assert held(region="CN", ticker="000001") == []
    assert held(region="US", symbol="AAPL", ticker="AAPL") == ["AAPL"]
    for bad in (
        {"ticker": "AAPL"},
        {"region": "XX"},
        {"tradeType": "Crypto"},
        {"region": "US", "ticker": "AAPL", "symbol": "MSFT"},
    ):
        check_error(trader.get("position/state", **bad), 400, "INVALID_REQUEST")
    for currency in ("usd", "US", "USDX", ""):
        check_error(trader.cash(currency), 400, "INVALID_REQUEST")
    assert trader.cash("USD").ok
    assert trader.get("cash/state", nonsense="1").ok
    for query in (
        {},
        {"orderId": ""},
        {"orderId": "a", "clientOrderId": "b"},
        {"orderId": "x" * 65},
        {"orderId": "a b"},
        {"clientOrderId": "ä"},
    ):
        check_error(trader.get("order/state", **query), 400, "INVALID_REQUEST")
    for query in (
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "-1"},
        {"limit": "1.5"},
        {"limit": "9" * 5000},
        {"limit": "１"},
        {"limit": " 1"},
        {"limit": "+1"},
        {"status": "OPEN"},
        {"since": "yesterday"},
        {"since": "2025-13-01T00:00:00Z"},
    ):
        answer = trader.orders(**query)
        check_error(answer, 400, "INVALID_REQUEST")
        assert set(answer.error["fields"]) == set(query)
    for query in (
        {"limit": "1000"},
        {"status": "open"},
        {"since": "2025-05-28T00:00:00+08:00"},
        {"since": "0001-01-01T00:00:00+14:00"},
        {"since": "9999-12-31T23:59:59-14:00"},
    ):
        assert trader.orders(**query).ok, query


# --- numbers -------------------------------------------------------------------------------------
QUICK = settings(
    max_examples=60,
    # too_slow: a machine that stands still is no defect.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MANTISSAS = st.integers(1, 10**15 - 1)


def price_texts() -> st.SearchStrategy[str]:
    """Prices of at most 15 significant digits as people and programs type them."""

    def typed(mantissa: int, places: int, zeros: int, scientific: bool) -> str:
        if scientific:
            return f"{mantissa}e-{places}"
        digits = str(mantissa).rjust(places + 1, "0")
        whole, fraction = digits[: len(digits) - places], digits[len(digits) - places :]
        fraction += "0" * zeros
        return f"{whole}.{fraction}" if fraction else whole

    return st.builds(typed, MANTISSAS, st.integers(0, 14), st.integers(0, 6), st.booleans()).filter(
        lambda text: 0 < Decimal(text) <= 10**9
    )


@QUICK
@given(text=price_texts())
def test_a_price_reaches_the_broker_as_typed(on: Stage, text: str) -> None:
    on.script.received.clear()
    answer = on.trader().request("POST", "order/place", text=text_of(price=text))
    assert answer.ok, answer
    (call,) = on.script.calls("place_order")
    assert Decimal(repr(call.arguments["price"])) == Decimal(text)
    assert Decimal(str(answer["args"]["price"])) == Decimal(text)


@QUICK
@given(
    text=st.builds(
        lambda digits, places: f"{digits[: len(digits) - places] or '0'}.{digits[-places:]}",
        st.text("0123456789", min_size=16, max_size=60).filter(
            lambda text: text[0] != "0" and text[-1] != "0"
        ),
        st.integers(1, 15),
    )
)
def test_more_digits_are_refused(on: Stage, text: str) -> None:
    answer = on.trader().request("POST", "order/place", text=text_of(price=text))
    check_error(answer, 400, "INVALID_REQUEST")
    assert set(answer.error["fields"]) == {"price"}
    assert not on.script.calls("place_order")


NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30),
    st.floats(allow_nan=False, allow_infinity=False),
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**20), max_value=10**20),
)


@QUICK
@given(number=NUMBERS)
def test_numbers_are_printed_plain_and_exactly(on: Stage, number: Any) -> None:
    on.script.do["cash"] = lambda: Cash("USD", number)
    answer = on.trader().cash()
    printed = re.search(r'"amount": ([^}]*)}', answer.text)
    assert printed is not None
    text = printed[1]
    assert re.fullmatch(r"-?(0|[1-9][0-9]*)(\.[0-9]*[1-9])?", text), text
    exact = number if isinstance(number, Decimal) else Decimal(repr(number))
    assert Decimal(text) == exact
    assert text != "-0"


BAD_QTY = (
    'true false null "12" "" 1.5 0 0.0 -1 -0 1e30 1e999 1e99999999999999999999 '
    "1e-99999999999999999999 NaN Infinity -Infinity [] {} [12] 1000000001 12.000001 "
    "0.99999999999999999999999999999 " + "9" * 5000
).split()
BAD_PRICE = (
    'true false "200" "" 0 0.00 -0 -200.5 1e30 1e999 1e99999999999999999999 '
    "1e-99999999999999999999 1e-400 NaN Infinity -Infinity [] {} 1000000000.01 1e-20 "
    "1234567890123456 1.00000000000000000000000000000000000001 0.1234567890123456 " + "9" * 5000
).split()


@pytest.mark.parametrize(
    ("field", "value"),
    [("qty", value) for value in BAD_QTY] + [("price", value) for value in BAD_PRICE],
)
def test_bad_numbers_reach_no_broker(on: Stage, field: str, value: str) -> None:
    answer = on.trader().request("POST", "order/place", text=text_of(**{field: value}))
    check_error(answer, 400, "INVALID_REQUEST")
    assert set(answer.error["fields"]) == {field}, answer
    assert not asked(on)


BAD_FIELDS: list[dict[str, Any]] = [
    {"price": ...},
    {"price": None},
    {"orderType": "Market"},  # with a price
    {"orderType": "limit"},
    {"orderType": 1},
    {"orderType": None},
    {"orderType": []},
    {"timeInForce": "day"},
    {"timeInForce": ...},
    {"lifecycle": "ALL"},
    {"lifecycle": {}},
    {"direction": "buy"},
    {"direction": "SHORT"},
    {"direction": True},
    {"tradeType": "Cryptocurrencies"},
    {"tradeType": ...},
    {"region": "JP"},
    {"region": ...},
    {"ticker": ...},
    {"ticker": ""},
    {"ticker": 700},
    {"ticker": None},
    {"ticker": "A" * 33},
    {"ticker": "AAPL\x00"},
    {"ticker": "AA PL X"},
    {"ticker": "../../etc"},
    {"ticker": "ＡＡＰＬ"},
    {"ticker": "TOOLONG"},
    {"region": "HK"},  # AAPL is no code there
    {"region": "CN"},
    {"region": "HK", "ticker": "000000"},
    {"region": "CN", "ticker": "٠٠٠٠٠١"},
    {"clientOrderId": ""},
    {"clientOrderId": "a b"},
    {"clientOrderId": "x" * 65},
    {"clientOrderId": "é"},
    {"clientOrderId": 5},
    {"clientOrderId": "line\n"},
    {"side": "BUY"},
    {"Price": 1},
    {"pri\x00ce": 1},
    {"a": {"b": {"c": [1, 2, 3]}}},
]


@pytest.mark.parametrize("changes", BAD_FIELDS, ids=str)
def test_bad_fields_reach_no_broker(on: Stage, changes: dict[str, Any]) -> None:
    answer = place(on, **changes)
    check_error(answer, 400, "INVALID_REQUEST")
    named = set(answer.error["fields"])
    expected = {"price"} if changes == {"orderType": "Market"} else set(changes)
    assert named & (expected | {"ticker"}), answer
    assert not asked(on)


def test_a_limit_without_price_and_a_market_with_one_are_told(on: Stage) -> None:
    assert "limit order needs a price" in place(on, price=...)["ex"]
    assert "market order takes no price" in place(on, orderType="Market")["ex"]


BAD_BODIES: list[bytes] = [
    b"",
    b" ",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"12",
    b"NaN",
    b"{'a': 1}",
    b'{"a": 1,}',
    b'{"a": 01}',
    b'{"qty": 1, "qty": 100}',
    text_of().replace("}", ', "direction": "SELL"}').encode(),
    b'{"a": "\\ud800"}',
    b'{"\\udfff": 1}',
    b'{"a": "\xff"}',
    b'{"a": "\xed\xa0\x80"}',
    b'{"a": "raw\x00nul"}',
    b"\xef\xbb\xbf" + text_of().encode(),
    text_of().encode("utf-16"),
    b"[" * 60_000,
    b'{"a":' * 10_000,
    b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}",
    b"\x00" * 100,
    text_of().encode() + b"{}",
    b'{"a": 1e99999999999999999999999}',
    b'{"a": -1e-99999999999999999999999}',
    b'{"qty": ' + b"1" * 60_000 + b"}",
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=lambda body: repr(body[:40]))
@pytest.mark.parametrize("route", ["order/place", "order/cancel"])
def test_bad_bodies_reach_no_broker(on: Stage, route: str, body: bytes) -> None:
    response = raw(
        on, url(on, route), "POST", {**token(on), "Content-Type": "application/json"}, body
    )
    assert response.status_code == 400, response.data
    assert response.json["error"]["code"] == "INVALID_REQUEST"
    assert not asked(on)


@pytest.mark.parametrize("text", ["\ud800", "US\udfff", ["deep", {"er": "\ud800"}]])
@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("order/place", {**LIMIT_ORDER, "symbol": "AAPL", "clientOrderId": "mine", "odd": ""}),
        ("order/cancel", {"orderId": "1", "clientOrderId": "mine"}),
        ("order/cancel-all", {"region": "US"}),
    ],
)
def test_half_a_character_in_a_body_is_named(
    on: Stage, route: str, body: dict[str, Any], text: Any
) -> None:
    for field in body:
        answer = on.trader().request("POST", route, text=json.dumps({**body, field: text}))
        check_error(answer, 400, "INVALID_REQUEST")
        assert list(answer.error["fields"]) == [field]
        assert field in answer["ex"]
    assert not asked(on)


@pytest.mark.parametrize("text", ["\xff", "\xed\xa0\x80", "%FF", "US%ED%A0%80", "%F0%9F%98"])
@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("market/quote", ("tradeType", "region", "ticker", "symbol")),
        ("position/state", ("tradeType", "region", "ticker", "symbol")),
        ("cash/state", ("currency",)),
        ("order/state", ("orderId", "clientOrderId")),
        ("order/fills", ("orderId",)),
        ("order/list", ("status", "since", "limit")),
        ("order/place", ("clientOrderId",)),
    ],
)
def test_what_is_no_text_in_a_query_is_named(
    on: Stage, route: str, fields: tuple[str, ...], text: str
) -> None:
    method = "POST" if route == "order/place" else "GET"
    for field in fields:
        environ = EnvironBuilder(
            url(on, route), method=method, headers=Headers(token(on))
        ).get_environ()
        environ["QUERY_STRING"] = f"a=%C3%A9&{field}={text}"  # bytes, as WSGI writes them
        body, status, _ = run_wsgi_app(on.app.wsgi_app, environ, buffered=True)
        answer = json.loads(b"".join(body))
        assert (status[:3], answer["error"]["code"]) == ("400", "INVALID_REQUEST")
        assert list(answer["error"]["fields"]) == [field]
    assert not asked(on)


@pytest.mark.parametrize("route", ["order/place", "order/cancel"])
def test_what_stands_in_a_query_beside_a_body_is_not_overlooked(on: Stage, route: str) -> None:
    """An order whose name was, would be placed again when the request is repeated."""
    body = {"orderId": "1"} if route == "order/cancel" else LIMIT_ORDER
    answer = on.trader().request(
        "POST", route, query={"clientOrderId": "mine-1"}, text=json.dumps(body)
    )
    check_error(answer, 400, "INVALID_REQUEST")
    assert set(answer.error["fields"]) == {"clientOrderId"}
    assert not asked(on)


@pytest.mark.parametrize("query", ["orderId=1&orderId=2", "orderId=1&orderId=1"])
def test_a_parameter_given_twice(on: Stage, query: str) -> None:
    response = raw(on, url(on, "order/state") + "?" + query, "GET", token(on))
    assert response.status_code == 400, response.data
    assert response.json["ex"] == "The query names a parameter twice."
    assert not asked(on)


def test_a_chunked_body_counts_as_it_comes(on: Stage) -> None:
    def send(data: bytes) -> int:
        builder = EnvironBuilder(
            url(on, "order/place"),
            method="POST",
            headers=Headers({**token(on), "Content-Type": "application/json"}),
        )
        environ = builder.get_environ()
        environ.pop("CONTENT_LENGTH", None)
        environ["wsgi.input"] = io.BytesIO(data)
        environ["wsgi.input_terminated"] = True
        environ["HTTP_TRANSFER_ENCODING"] = "chunked"
        return int(run_wsgi_app(on.app.wsgi_app, environ)[1].split()[0])

    assert send(text_of().encode()) == 200
    assert send(text_of().encode() + b" " * 70_000) == 413
    assert send(b"") == 400
    exactly = text_of().encode().ljust(65_536)
    assert (send(exactly), send(exactly + b" ")) == (200, 413)
    headers = {**token(on), "Content-Type": "application/json"}
    for body, status in ((exactly, 200), (exactly + b" ", 413)):
        assert raw(on, url(on, "order/place"), "POST", headers, body).status_code == status


@settings(QUICK, max_examples=150)
@given(
    body=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from([*LIMIT_ORDER, "symbol", "clientOrderId", "orderId", "x"]),
                inner,
                max_size=6,
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_answered_without_a_bug(on: Stage, body: Any) -> None:
    """Keys of ours with values of any kind; texts with lone surrogates among them."""
    text = json.dumps(body)
    for route in ("order/place", "order/cancel"):
        assert on.trader().request("POST", route, text=text).status in (200, 400, 404, 422)


# --- what a broker does wrong --------------------------------------------------------------------
class NastyError(Exception):
    """An SDK's exception with what must not get out, in text and repr."""

    def __str__(self) -> str:
        return f"POST https://x/?sign={SECRET}"

    __repr__ = __str__


class NastyExit(BaseException):
    """As the Rust SDKs raise."""

    def __str__(self) -> str:
        return SECRET


def raising(error: BaseException) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        local = SECRET  # noqa: F841  a traceback with locals would show it
        raise error

    return run


NASTY: list[BaseException] = [
    NastyError(),
    NastyExit(),
    ValueError(SECRET),
    KeyError(SECRET),
    TimeoutError(SECRET),
    ConnectionResetError(SECRET),
    SystemExit(SECRET),
    KeyboardInterrupt(SECRET),
    StopIteration(SECRET),
    RecursionError(SECRET),
    MemoryError(SECRET),
    UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
    AssertionError(SECRET),
    ExceptionGroup(SECRET, [ValueError(SECRET)]),
    asyncio.CancelledError(SECRET),
]


@pytest.mark.parametrize("error", NASTY, ids=lambda error: type(error).__name__)
def test_nothing_of_an_unexpected_exception_gets_out(
    on: Stage, caplog: pytest.LogCaptureFixture, capfd: Any, error: BaseException
) -> None:
    caplog.set_level(logging.DEBUG)
    chained = error
    chained.__cause__ = ValueError(SECRET)
    names = ("cash", "positions", "quote", "order", "ping", "place_order", "cancel_order")
    on.script.do |= dict.fromkeys(names, raising(chained))
    trader = on.trader()
    reads = [
        trader.cash(),
        trader.positions(),
        trader.quote("US", "AAPL"),
        trader.state("404404"),
        trader.ping(),
    ]
    changes = [place(on), trader.cancel("404404")]
    for answer in reads:
        if isinstance(error, TimeoutError):
            check_error(answer, 504, "TIMEOUT", retryable=True)
        else:
            check_error(answer, 500, "INTERNAL")
            named = [getattr(record, "request_id", "") for record in caplog.records]
            assert answer.error["requestId"] in named, "the log has it under the request id"
    for answer in changes:
        check_error(answer, 504, "OUTCOME_UNKNOWN", outcome="unknown")
    on.script.do.clear()
    assert trader.cash().ok  # the worker lives on
    printed = capfd.readouterr()
    formatted = "".join(
        logging.Formatter().format(record) + repr(record.args) for record in caplog.records
    )
    for text in (
        *(answer.text + str(answer.headers) for answer in reads + changes),
        formatted,
        printed.out,
        printed.err,
    ):
        assert SECRET not in text
    assert "unexpected " in formatted or isinstance(error, TimeoutError)


class SdkWord(enum.Enum):
    STOP = "STOP"


class SdkText(str, enum.Enum):  # noqa: UP042
    """Text, but printed as "SdkText.USD"."""

    USD = "USD"


NAN = math.nan
ORDER = Order("1", "USD", 12)
NONSENSE: dict[str, list[Any]] = {
    "cash": [
        None,
        30877.499,
        "rich",
        {"currency": "USD"},
        Cash("USD", NAN),
        Cash("USD", math.inf),
        Cash("USD", -math.inf),
        Cash("USD", Decimal("NaN")),
        Cash("USD", Decimal("sNaN")),
        Cash("USD", None),  # type: ignore[arg-type]
        Cash("USD", "12"),  # type: ignore[arg-type]
        Cash("USD", True),
        Cash(None, 1),  # type: ignore[arg-type]
        Cash("USD", 1j),  # type: ignore[arg-type]
        Cash("US\ud800", 1),
        Cash(SdkText.USD, 1),
    ],
    "positions": [
        None,
        {"AAPL": 1},
        "AAPL",
        [None],
        [Position("x", "x", None, Unit.Share, "USD", 1)],  # type: ignore[arg-type]
        [Position("x", "x", AAPL, "Share", "USD", 1)],  # type: ignore[arg-type]
        [Position("x", "x", AAPL, Unit.Share, "USD", NAN)],
        [Position("x", "x", replace(AAPL, ticker="\ud800"), Unit.Share, "USD", 1)],
        [Position("x", "x", replace(AAPL, region=None), Unit.Share, "USD", 1)],
        [Position("x", "x", replace(AAPL, trade_type="Securities"), Unit.Share, "USD", 1)],
        [Position(None, "x", AAPL, Unit.Share, "USD", 1)],  # type: ignore[arg-type]
        [Position("x", None, AAPL, Unit.Share, "USD", 1)],  # type: ignore[arg-type]
        [Position("x", "x", AAPL, Unit.Share, None, 1)],  # type: ignore[arg-type]
        iter([]),
    ],
    "quote": [
        None,
        11.53,
        Quote(AAPL, None, True, 1, 1, 1, 1, 1, QUOTE_TIME),  # type: ignore[arg-type]
        Quote(AAPL, "USD", True, NAN, 1, 1, 1, 1, QUOTE_TIME),
        Quote(AAPL, "USD", True, 1, NAN, 1, 1, 1, QUOTE_TIME),
        Quote(AAPL, "USD", True, 1, 1, NAN, 1, 1, QUOTE_TIME),
        Quote(AAPL, "USD", True, 1, 1, 1, NAN, 1, QUOTE_TIME),
        Quote(AAPL, "USD", True, 1, 1, 1, 1, None, QUOTE_TIME),  # type: ignore[arg-type]
        Quote(AAPL, "USD", "yes", 1, 1, 1, 1, 1, QUOTE_TIME),  # type: ignore[arg-type]
        Quote(AAPL, "USD", True, 1, 1, 1, 1, 1, 1748409918),  # type: ignore[arg-type]
        Quote(AAPL, "USD", True, 1, 1, 1, 1, 1, datetime.min),
        Quote("AAPL", "USD", True, 1, 1, 1, 1, 1, QUOTE_TIME),  # type: ignore[arg-type]
    ],
    "order": [
        None,
        {},
        OrderReport(None),  # type: ignore[arg-type]
        OrderReport(ORDER, price=NAN),
        Order(None, "USD", 12),  # type: ignore[arg-type]
        Order("", "USD", 12),
        Order(" ", "USD", 12),
        Order(0, "USD", 12),  # type: ignore[arg-type]
        Order("404404", "USD", NAN),
        Order("404404", "USD", 12, math.inf),
        Order("404404", "USD", 12, 0, Decimal("-Infinity")),
        Order("404404", "USD", 12, is_canceled="no"),  # type: ignore[arg-type]
        Order("404404", "USD", 12, is_pending_cancel="no"),  # type: ignore[arg-type]
        Order("404404", "USD", 12, error_reason=ValueError(SECRET)),  # type: ignore[arg-type]
    ],
    "fills": [
        None,
        [None],
        [Fill("1", "404404", NAN, 1, QUOTE_TIME)],
        [Fill("1", "404404", 1, NAN, QUOTE_TIME)],
        [Fill(None, "404404", 1, 1, QUOTE_TIME)],  # type: ignore[arg-type]
        [Fill("1", None, 1, 1, QUOTE_TIME)],  # type: ignore[arg-type]
        [Fill("1", "404404", 1, 1, 1748409918)],  # type: ignore[arg-type]
        [Fill("1", "404404", 1, 1, datetime.min)],
    ],
    "recent_orders": [
        None,
        [ORDER],
        {},
        [OrderReport(Order("1", "USD", NAN))],
        [OrderReport(ORDER, mark=None)],  # type: ignore[arg-type]
        [OrderReport(ORDER, contract="AAPL")],  # type: ignore[arg-type]
        [OrderReport(ORDER, price=NAN)],
        [OrderReport(ORDER, time=1748409918)],  # type: ignore[arg-type]
        [OrderReport(ORDER, direction=SdkWord.STOP)],  # type: ignore[arg-type]
        [OrderReport(ORDER, direction="BUY\ud800")],
        [OrderReport(Order("1", "\ud800", 12))],
        [OrderReport(ORDER, order_type=SdkWord.STOP)],  # type: ignore[arg-type]
        [OrderReport(ORDER, time_in_force=SdkWord.STOP)],  # type: ignore[arg-type]
        [OrderReport(ORDER, lifecycle=SdkWord.STOP)],  # type: ignore[arg-type]
    ],
}
ASK: Mapping[str, Callable[[Any], Answer]] = {
    "cash": lambda trader: trader.cash(),
    "positions": lambda trader: trader.positions(),
    "quote": lambda trader: trader.quote("US", "AAPL"),
    "order": lambda trader: trader.state("404404"),
    "fills": lambda trader: trader.fills("404404"),
    "recent_orders": lambda trader: trader.orders(),
}


def test_a_time_that_cannot_be_costs_no_order_of_a_list() -> None:
    east = datetime.min.replace(tzinfo=timezone(timedelta(hours=8)))  # in UTC there is no such year
    told = [OrderReport(ORDER, time=time) for time in (datetime.min, east, QUOTE_TIME)]
    found = checked("recent_orders", told)
    assert [report.time for report in found] == [None, None, QUOTE_TIME]


@pytest.mark.parametrize(
    ("operation", "value"),
    [(operation, value) for operation, values in NONSENSE.items() for value in values],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_nonsense_from_a_broker_is_told_and_goes_no_further(
    on: Stage, operation: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    on.script.do[operation] = lambda **arguments: value
    answer = ASK[operation](on.trader())
    check_error(answer, 500, "INTERNAL")
    assert operation in answer["ex"] and "剧本证券" in answer["ex"]
    assert SECRET not in answer.text + caplog.text
    del on.script.do[operation]
    again = ASK[operation](on.trader())
    assert again.ok or again.code == "ORDER_NOT_FOUND"


@pytest.mark.parametrize("operation", ["recent_orders", "fills"])
def test_nonsense_in_a_push_goes_no_further(
    on: Stage, operation: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A list is asked for again; what is pushed and recorded would stand in the journal for ever,
    and every list, and every cancellation of all, would come upon it."""
    trader = on.trader()
    order_id = trader.placed(LIMIT_ORDER)
    broker = on.script.brokers[-1]
    for value in NONSENSE[operation]:
        if operation == "fills":
            broker.report_fills(*value or ())
        else:
            broker.report(*value or ())
    broker.report_fills(Fill("sound", order_id, 1, 200, QUOTE_TIME))
    listed = wait_for(lambda: trader.fills(order_id)["fills"], "the push that makes sense")
    assert [fill["fillId"] for fill in listed] == ["sound"]
    ids = {order["orderId"] for order in trader.orders()["orders"]}
    assert order_id in ids and "1" not in ids
    assert trader.request("POST", "order/cancel-all").ok
    assert "a push has" in caplog.text


def test_a_bug_of_ours_does_not_say_that_nothing_was_sent(
    on: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr("httptrading.app.order.dump_args", bug)
    monkeypatch.setattr("httptrading.app.account.dump", bug)
    check_error(place(on), 500, "INTERNAL", outcome="unknown")
    assert len(on.script.calls("place_order")) == 1
    check_error(on.trader().cash(), 500, "INTERNAL")


@pytest.mark.parametrize(
    "order_id", [None, "", " ", 0, "0", True, [], {}, 1.5, b"1", object(), "\ud83d1"]
)
def test_a_place_without_an_order_id_is_unknown(on: Stage, order_id: Any) -> None:
    on.script.do["place_order"] = lambda **arguments: order_id
    check_error(place(on), 504, "OUTCOME_UNKNOWN", outcome="unknown")


def test_numbers_where_texts_belong_are_forgiven(on: Stage) -> None:
    """Order ids are ints in some SDKs."""
    on.script.do["place_order"] = lambda **arguments: 4711
    assert place(on)["orderId"] == "4711"
    on.script.do["order"] = lambda order_id: Order(4711, "USD", 12)  # type: ignore[arg-type]
    assert on.trader().order("4711")["orderId"] == "4711"


def test_what_is_forgiven_leaves_as_documented() -> None:
    """Neither the journal nor a client comes upon an id that is not text, or half a character."""
    number = Order(4711, "USD", 12)  # type: ignore[arg-type]
    failed = replace(ORDER, error_reason="\ud83d1")
    unread = replace(ORDER, error_reason=None)  # type: ignore[arg-type]
    text = Order("4711", "USD", 12)
    assert [checked("order", one) for one in (number, failed, unread)] == [
        text,
        replace(ORDER, error_reason="?1"),
        ORDER,
    ]
    unnamed = OrderReport(replace(ORDER, order_id=""), mark="ours")
    told = (OrderReport(number), OrderReport(ORDER, mark="\ud83d1"), unnamed)
    assert checked("recent_orders", told) == [
        OrderReport(text),
        OrderReport(ORDER, mark="?1"),
        unnamed,  # left out it would count as not placed
    ]
    fill = Fill("1", "2", 1, 200, QUOTE_TIME)
    assert checked("fills", [replace(fill, fill_id=1, order_id=2)]) == [fill]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", {"qty": ["must be a multiple of 100"]}),
        Unsupported("no short sales"),
        OrderNotFound("gone"),
        Rejected("closed"),
        RateLimited("slow down", retry_after=3),
        OutcomeUnknown("cut"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_adapters_own_errors_pass_through(on: Stage, error: Any) -> None:
    on.script.do["cash"] = raising(error)
    answer = on.trader().cash()
    assert answer.code == error.code and answer["ex"] == error.text
    if isinstance(error, InvalidRequest):
        assert answer.error["fields"] == error.fields


class NoFunds(Rejected):
    """As one is written for a broker of one's own."""

    code = "NO_FUNDS"

    def __init__(self, needed: int, there: int) -> None:
        super().__init__(f"{needed} needed, {there} there")


def test_errors_of_a_brokers_own_are_those_of_the_tree(on: Stage) -> None:
    on.script.do["place_order"] = raising(NoFunds(10, 5))
    for _ in range(2):
        answer = on.trader().place(LIMIT_ORDER, key="funds")
        assert (answer.status, answer.code, answer["ex"]) == (
            422,
            "BROKER_REJECTED",
            "10 needed, 5 there",
        )
    assert len(on.script.calls("place_order")) == 1, "a refusal is remembered"


@pytest.mark.parametrize(("words", "key"), [("", "empty"), ("  ", "blank"), (None, "none")])
def test_a_refusal_without_words_is_one(on: Stage, words: Any, key: str) -> None:
    def refuse(**_: Any) -> Any:
        raise Rejected(words)

    on.script.do["place_order"] = refuse
    for _ in range(2):
        answer = on.trader().place(LIMIT_ORDER, key=key)
        check_error(answer, 422, "BROKER_REJECTED")
    assert on.trader().order(key=key)["isCompleted"] is True


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (2.5, "3"),
        ("7", "7"),
        (None, "1"),
        ("Wed, 21 Oct 2026 07:28:00 GMT", "1"),
        (math.inf, "1"),
        (math.nan, "1"),
        (-3, "1"),
    ],
)
def test_any_retry_after(on: Stage, given: Any, told: str) -> None:
    """A broker's header comes as text."""
    on.script.do["place_order"] = raising(RateLimited("slow down", retry_after=given))
    answer = place(on)
    check_error(answer, 429, "RATE_LIMITED", retryable=True)
    assert answer.headers["Retry-After"] == told


def test_market_states_of_the_wrong_kind(tmp_path: Any) -> None:
    with stage(tmp_path) as running:
        running.ready()
        state: Any = MarketStatus("US", "OPEN", UnifiedStatus.RTH)
        for value in (
            None,
            [],
            {None: {"US": state}},
            *(
                {"securities": states}
                for states in (
                    {"US": "OPEN"},
                    {1: state},
                    {"US": replace(state, region=1)},
                    {"US": replace(state, origin_status=1)},
                    {"US": replace(state, unified_status="RTH")},
                )
            ),
        ):
            running.script.do["market_status"] = lambda value=value: value
            answer = running.trader().market()
            check_error(answer, 500, "INTERNAL")
            assert "market_status" in answer["ex"], value
        running.script.do["market_status"] = lambda: {"securities": {}, "type": "x"}
        assert running.trader().market()["marketStatus"] == {
            "type": "marketStatusMap",
            "securities": {},
        }


# --- logs ----------------------------------------------------------------------------------------
def test_the_access_log_has_no_secret(on: Stage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    on.trader().cash()
    place(on, clientOrderId="logged-1")
    records = [record for record in caplog.records if record.name == "httptrading.access"]
    assert [record.status for record in records] == [200, 200]  # type: ignore[attr-defined]
    text = "".join(str(vars(record)) for record in caplog.records)
    for broker in on.brokers:
        assert broker.tokens[0] not in text
        assert broker.instance_id not in text
