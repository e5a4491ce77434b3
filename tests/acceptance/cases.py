"""The cases every broker passes; a broker's test file subclasses them and supplies `subject`.

`BrokerAcceptance` is for all. `FaultAcceptance` adds what happens when the broker misbehaves, for
subjects whose other side can be stopped and given faults; `PushAcceptance` adds what is learnt
without asking.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import simplejson

from acceptance.kit import (
    EVERY_COMBINATION,
    FAR_PRICE,
    PATIENCE,
    TICKERS,
    Answer,
    Subject,
    Trader,
    comes_true,
    in_time,
    wait_for,
)
from httptrading.model import UnifiedStatus
from simulators.exchange import FaultKind, OrderStatus

ENVELOPE = ["type", "instanceId", "broker", "brokerDisplay", "time", "ex"]
CONTRACT = ["type", "tradeType", "region", "ticker"]
QUOTE = [
    "type",
    "contract",
    "currency",
    "isTradable",
    "latest",
    "preClose",
    "highPrice",
    "lowPrice",
    "openPrice",
    "timestamp",
]
POSITION = ["type", "broker", "brokerDisplay", "contract", "unit", "currency", "qty"]
ORDER = [
    "type",
    "orderId",
    "currency",
    "qty",
    "filledQty",
    "avgPrice",
    "errorReason",
    "isCanceled",
    "isFilled",
    "isCompleted",
]
ARGS = [
    "tradeType",
    "ticker",
    "region",
    "price",
    "qty",
    "orderType",
    "timeInForce",
    "lifecycle",
    "direction",
]
FINAL = ("filledQty", "avgPrice", "errorReason", "isCanceled", "isFilled", "isCompleted")

BAD_NUMBERS = ["true", '"12"', "1.5", "0", "-1", "1e30", "NaN", "Infinity", "[]", "{}", "null"]
BAD_FIELDS = [
    *(("qty", text) for text in BAD_NUMBERS),
    *(("price", text) for text in BAD_NUMBERS if text != "1.5"),
    ("price", "1.2345678901234567"),  # a float does not carry 17 digits exactly
    ("tradeType", '"Crypto"'),
    ("region", '"JP"'),
    ("orderType", '"Stop"'),
    ("timeInForce", '"FOK"'),
    ("lifecycle", '"LATE"'),
    ("direction", '"HOLD"'),
    ("direction", "1"),
    ("ticker", '""'),
    ("ticker", '"A/../B"'),
    ("ticker", '"A B C D"'),
    ("ticker", "700"),
]
ALLOWED = {
    "tradeType": ["Securities"],
    "region": ["US", "HK", "CN"],
    "orderType": ["Limit", "Market"],
    "timeInForce": ["DAY", "GTC"],
    "lifecycle": ["RTH", "ETH", "OVERNIGHT"],
    "direction": ["BUY", "SELL"],
}


class Acceptance:
    """What all cases stand on."""

    @pytest.fixture(autouse=True)
    def ready(self, subject: Subject) -> Iterator[None]:
        subject.ready()
        yield
        subject.calm()

    @pytest.fixture
    def trader(self, subject: Subject) -> Trader:
        return subject.trader()

    def body(self, subject: Subject, answer: Answer, *names: str) -> dict[str, Any]:
        """The body of a success, whose fields are the envelope's and these, in this order."""
        assert answer.status == 200, answer
        assert answer.headers["Content-Type"].startswith("application/json"), answer
        body = answer.body
        assert list(body) == [*ENVELOPE, *names], answer
        assert body["type"] == "apiResponse"
        assert body["instanceId"] == subject.broker.instance_id
        assert body["broker"] == subject.broker.broker_name
        assert body["brokerDisplay"] == subject.broker.broker_display
        assert body["ex"] is None
        moment = datetime.fromisoformat(body["time"])
        assert moment.utcoffset() == timedelta(0), body["time"]
        assert abs(datetime.now(UTC) - moment) < timedelta(minutes=5)
        return body

    def refused(
        self, answer: Answer, status: int, code: str, outcome: str = "none"
    ) -> dict[str, Any]:
        """The error of an answer with this status and code."""
        assert (answer.status, answer.code) == (status, code), answer
        body = answer.body
        assert list(body)[: len(ENVELOPE)] == ENVELOPE, answer
        assert isinstance(body["ex"], str) and len(body["ex"]) > 5, answer
        assert answer.error["outcome"] == outcome, answer
        assert isinstance(answer.error["retryable"], bool), answer
        assert answer.error["requestId"], answer
        return answer.error

    def settled(self, trader: Trader, key: str) -> dict[str, Any]:
        """Waits until the order of an unknown outcome is known; its node."""

        def look() -> dict[str, Any] | None:
            answer = trader.state(key=key)
            return answer["order"] if answer.ok else None

        return wait_for(look, "the unknown outcome to settle")


class BrokerAcceptance(Acceptance):
    """Cases over the HTTP contract that ask nothing special of the other side."""

    # --- the eight bodies ---------------------------------------------------------------------
    def test_ping(self, subject: Subject, trader: Trader) -> None:
        assert self.body(subject, trader.ping(), "pong")["pong"] is True

    def test_quote(self, subject: Subject, trader: Trader) -> None:
        for region, ticker in TICKERS.items():
            if not subject.quotes(region):
                self.refused(trader.quote(region, ticker), 422, "UNSUPPORTED")
                continue
            scripted = subject.set_quote(
                region,
                ticker,
                latest=Decimal("11.53"),
                pre_close=Decimal("11.49"),
                open_price=Decimal("11.5"),
                high_price=Decimal("11.55"),
                low_price=Decimal("11.44"),
            )
            answer = trader.quote(region, ticker)
            quote = self.body(subject, answer, "quote")["quote"]
            assert list(quote) == QUOTE
            assert quote["type"] == "quote"
            assert list(quote["contract"]) == CONTRACT
            assert list(quote["contract"].values()) == ["contract", "Securities", region, ticker]
            assert quote["currency"] == subject.currency(region)
            assert isinstance(quote["isTradable"], bool)
            assert type(quote["timestamp"]) is int  # milliseconds
            assert quote["timestamp"] > 1_600_000_000_000
            assert quote["lowPrice"] <= quote["latest"] <= quote["highPrice"]
            if scripted:
                assert quote["latest"] == Decimal("11.53")
                assert quote["preClose"] == Decimal("11.49")
                assert quote["openPrice"] == Decimal("11.5")
                assert quote["highPrice"] == Decimal("11.55")
                assert quote["lowPrice"] == Decimal("11.44")

    def test_market_state(self, subject: Subject, trader: Trader) -> None:
        answer = trader.market()
        if not subject.offers("market_status"):
            self.refused(answer, 422, "UNSUPPORTED")
            return
        markets = self.body(subject, answer, "marketStatus")["marketStatus"]
        assert list(markets) == ["type", "securities"]
        assert markets["type"] == "marketStatusMap"
        assert markets["securities"]
        for region, node in markets["securities"].items():
            assert list(node) == ["type", "region", "originStatus", "unifiedStatus"]
            assert node["type"] == "marketStatus"
            assert node["region"] == region
            assert isinstance(node["originStatus"], str) and node["originStatus"]
            assert node["unifiedStatus"] in UnifiedStatus.__members__

    def test_cash_per_currency(self, subject: Subject, trader: Trader) -> None:
        subject.set_cash("USD", "30877.499")
        subject.set_cash("HKD", "1000.5")
        cash = self.body(subject, trader.cash(), "cash")["cash"]
        assert list(cash.items()) == [
            ("type", "cash"),
            ("currency", "USD"),
            ("amount", Decimal("30877.499")),
        ]
        assert trader.cash("USD")["cash"] == cash
        hong_kong = trader.cash("HKD")
        if subject.many_currencies:
            assert hong_kong["cash"] == {
                "type": "cash",
                "currency": "HKD",
                "amount": Decimal("1000.5"),
            }
        else:
            self.refused(hong_kong, 422, "UNSUPPORTED")
        self.refused(trader.cash("usd!"), 400, "INVALID_REQUEST")

    def test_positions(self, subject: Subject, trader: Trader) -> None:
        """Sign, fraction, region, currency and the padded tickers of HK and CN survive."""
        held = subject.holdings()
        subject.set_positions(held)
        positions = self.body(subject, trader.positions(), "positions")["positions"]
        for node in positions:
            assert list(node) == POSITION
            assert node["type"] == "position"
            assert node["broker"] == subject.broker.broker_name
            assert node["brokerDisplay"] == subject.broker.broker_display
            assert list(node["contract"]) == CONTRACT
            assert node["contract"]["type"] == "contract"
            assert node["contract"]["tradeType"] == "Securities"
            assert node["unit"] == "Share"
        shown = {
            (node["contract"]["region"], node["contract"]["ticker"], node["currency"], node["qty"])
            for node in positions
        }
        assert shown == {(one.region, one.ticker, one.currency, one.qty) for one in held}
        assert len(positions) == len(held)
        one = held[-1]
        asked = trader.positions(tradeType="Securities", region=one.region, ticker=one.ticker)
        assert [node["qty"] for node in asked["positions"]] == [one.qty]
        subject.set_positions([])
        assert trader.positions()["positions"] == []

    def test_place_state_and_cancel_bodies(self, subject: Subject, trader: Trader) -> None:
        order = subject.limit()
        shuffled = dict(reversed(order.items()))
        answer = trader.place(shuffled)
        body = answer.body
        client_order_id = body.pop("clientOrderId")
        assert isinstance(client_order_id, str) and re.fullmatch(
            r"[A-Za-z0-9._:-]{1,64}", client_order_id
        )
        assert list(body) == [*ENVELOPE, "orderId", "args"], answer
        assert body["ex"] is None
        assert isinstance(body["orderId"], str) and body["orderId"]
        assert list(body["args"]) == ARGS
        assert body["args"] == order
        assert not answer.replayed

        node = self.body(subject, trader.state(body["orderId"]), "order")["order"]
        assert list(node) == ORDER
        assert node == {
            "type": "order",
            "orderId": body["orderId"],
            "currency": subject.currency(order["region"]),
            "qty": order["qty"],
            "filledQty": 0,
            "avgPrice": 0,
            "errorReason": "",
            "isCanceled": False,
            "isFilled": False,
            "isCompleted": False,
        }
        assert trader.order(key=client_order_id) == node

        self.body(subject, trader.cancel(body["orderId"]))
        trader.wait_order(body["orderId"], isCanceled=True, isCompleted=True, isFilled=False)

    # --- what reaches the exchange ------------------------------------------------------------
    def test_every_combination_is_taken_or_refused(self, subject: Subject, trader: Trader) -> None:
        for combination in sorted(subject.combinations, key=str):
            with subject.one_order() as at_exchange:
                order_id = trader.placed(subject.order(combination, qty=100))
            found = at_exchange()
            shown = (found.region, found.order_type, found.time_in_force, found.lifecycle)
            assert " ".join((shown[0], *shown[1:])) == str(combination)
            if not found.status.is_final:
                trader.cancel(order_id)
        for combination in sorted(EVERY_COMBINATION - subject.combinations, key=str):
            with subject.nothing_sent():
                answer = trader.place(subject.order(combination, qty=100))
            self.refused(answer, 422, "UNSUPPORTED")

    @pytest.mark.parametrize("price", ["12.30", "20.01", "8.07", "1.15", "0.1234"])
    def test_the_exchange_sees_what_was_typed(
        self, subject: Subject, trader: Trader, price: str
    ) -> None:
        order = subject.limit(price=Decimal(price))
        with subject.one_order() as at_exchange:
            answer = trader.place(order)
        assert answer.ok, answer
        found = at_exchange()
        assert subject.exchange_id(answer["orderId"]) == found.order_id
        assert found.price == Decimal(price)
        assert found.qty == order["qty"]
        assert (found.region, found.ticker) == (order["region"], order["ticker"])
        assert (found.direction, found.order_type) == ("BUY", "Limit")
        assert re.fullmatch(r"[!-~]{1,24}", found.mark), "the gateway's mark is at the exchange"
        assert [one.mark for one in subject.orders()].count(found.mark) == 1
        assert answer["args"]["price"] == Decimal(price)
        trader.cancel(answer["orderId"])

    def test_tickers_come_back_padded(self, subject: Subject, trader: Trader) -> None:
        regions = {one.region for one in subject.combinations if one.order_type.name == "Limit"}
        asked = {"HK": [("700", "00700"), ("5", "00005")], "CN": [("000001", "000001")]}
        asked["US"] = [("brk.b", "BRK.B"), ("QQQ", "QQQ")]
        for region in sorted(regions):
            usual = min(
                (
                    one
                    for one in subject.combinations
                    if one.region == region and one.order_type.name == "Limit"
                ),
                key=str,
            )
            for typed, canonical in asked[region]:
                with subject.one_order() as at_exchange:
                    answer = trader.place(subject.order(usual, ticker=typed))
                assert answer.ok, answer
                assert answer["args"]["ticker"] == canonical
                assert (at_exchange().region, at_exchange().ticker) == (region, canonical)
                trader.cancel(answer["orderId"])

    def test_symbol_is_another_name_of_ticker(self, subject: Subject, trader: Trader) -> None:
        order = subject.limit()
        order["symbol"] = order.pop("ticker")
        with subject.one_order() as at_exchange:
            answer = trader.place(order)
        assert answer.ok, answer
        assert answer["args"]["ticker"] == at_exchange().ticker == order["symbol"]
        trader.cancel(answer["orderId"])

    # --- the life of an order -------------------------------------------------------------------
    def test_a_market_order_fills(self, subject: Subject, trader: Trader) -> None:
        order = subject.market_order()
        if order is None:  # the table test has shown that they are refused
            return
        subject.set_quote(order["region"], order["ticker"], latest=Decimal("187.45"))
        answer = trader.place(order)
        assert answer.ok, answer
        assert answer["args"].get("price") is None
        node = trader.wait_order(answer["orderId"], isFilled=True)
        found = subject.at_exchange(answer["orderId"])
        assert (node["filledQty"], node["isCompleted"]) == (order["qty"], True)
        assert abs(node["avgPrice"] - found.avg_price) < Decimal("0.000001")
        assert node["avgPrice"] > 0
        assert (node["errorReason"], node["isCanceled"]) == ("", False)

    def test_a_partly_filled_order_is_cancelled(self, subject: Subject, trader: Trader) -> None:
        order = subject.limit()
        order_id = trader.placed(order)
        node = trader.order(order_id)
        assert (node["filledQty"], node["isCompleted"]) == (0, False)
        subject.fill(order_id, 5, "12.30")
        node = trader.wait_order(order_id, filledQty=5)
        assert node["avgPrice"] == Decimal("12.30")
        assert (node["isFilled"], node["isCompleted"], node["isCanceled"]) == (False, False, False)
        self.body(subject, trader.cancel(order_id))
        node = trader.wait_order(order_id, isCanceled=True)
        assert node["filledQty"] == 5
        assert node["avgPrice"] == Decimal("12.30")
        assert (node["isFilled"], node["isCompleted"], node["errorReason"]) == (False, True, "")
        assert subject.at_exchange(order_id).status is OrderStatus.CANCELED

    def test_filled_quantity_and_price_go_one_way(self, subject: Subject, trader: Trader) -> None:
        order = subject.limit()
        order_id, half = trader.placed(order), order["qty"] // 2
        subject.fill(order_id, half, "12.30")
        node = trader.wait_order(order_id, filledQty=half)
        assert node["avgPrice"] == Decimal("12.30")
        subject.fill(order_id, order["qty"] - half, "12.32")
        node = trader.wait_order(order_id, filledQty=order["qty"], isFilled=True)
        assert node["avgPrice"] == Decimal("12.31")
        assert (node["isCompleted"], node["isCanceled"], node["errorReason"]) == (True, False, "")
        self.refused(trader.cancel(order_id), 422, "BROKER_REJECTED")
        again = trader.order(order_id)
        assert {name: again[name] for name in FINAL} == {name: node[name] for name in FINAL}

    def test_final_is_final(self, subject: Subject, trader: Trader) -> None:
        order_id = trader.placed(subject.limit())
        self.body(subject, trader.cancel(order_id))
        node = trader.wait_order(order_id, isCanceled=True)
        with_words = self.refused(trader.cancel(order_id), 422, "BROKER_REJECTED")
        assert with_words["retryable"] is False
        again = trader.order(order_id)
        assert {name: again[name] for name in FINAL} == {name: node[name] for name in FINAL}

    def test_cancelled_by_somebody_else(self, subject: Subject, trader: Trader) -> None:
        order_id = trader.placed(subject.limit())
        subject.cancel(order_id)
        trader.wait_order(order_id, isCanceled=True, isCompleted=True, errorReason="")

    def test_rejected_after_it_was_accepted(self, subject: Subject, trader: Trader) -> None:
        order_id = trader.placed(subject.limit())
        subject.reject(order_id, "margin call in progress")
        node = trader.wait_order(order_id, isCompleted=True)
        assert node["errorReason"], node
        assert (node["isCanceled"], node["isFilled"], node["filledQty"]) == (False, False, 0)

    def test_expired_with_a_part_filled(self, subject: Subject, trader: Trader) -> None:
        order_id = trader.placed(subject.limit())
        subject.fill(order_id, 5, "12.30")
        subject.expire(order_id)
        node = trader.wait_order(order_id, isCompleted=True)
        assert node["errorReason"] or node["isCanceled"]  # some brokers call it cancelled
        assert (node["filledQty"], node["avgPrice"]) == (5, Decimal("12.30"))
        assert node["isFilled"] is False

    def test_an_unknown_order(self, subject: Subject, trader: Trader) -> None:
        with subject.nothing_sent():
            self.refused(trader.state(key="never-heard-of"), 404, "ORDER_NOT_FOUND")
            self.refused(trader.cancel(key="never-heard-of"), 404, "ORDER_NOT_FOUND")
        before = subject.placements()
        self.refused(trader.state("987654321"), 404, "ORDER_NOT_FOUND")
        self.refused(trader.cancel("987654321"), 404, "ORDER_NOT_FOUND")
        assert subject.placements() == before
        for answer in (trader.state(), trader.post("order/cancel", {})):
            self.refused(answer, 400, "INVALID_REQUEST")

    # --- exactly once -----------------------------------------------------------------------------
    def test_one_key_one_order(self, subject: Subject, trader: Trader) -> None:
        order, key = subject.limit(), subject.key()
        with subject.one_order():
            first = trader.place(order, key=key)
            assert first.ok and not first.replayed, first
            assert first["clientOrderId"] == key
            again = trader.place(dict(reversed(order.items())), key=key)
            by_header = trader.place(order, headers={"Idempotency-Key": key})
        for answer in (again, by_header):
            assert answer.ok and answer.replayed, answer
            for name in ("orderId", "clientOrderId", "args"):
                assert answer[name] == first[name]
        assert trader.order(key=key) == trader.order(first["orderId"])
        self.body(subject, trader.cancel(key=key))
        trader.wait_order(key=key, isCanceled=True)
        assert trader.place(order, key=key)["orderId"] == first["orderId"]

    def test_one_key_another_content(self, subject: Subject, trader: Trader) -> None:
        order, key = subject.limit(), subject.key()
        order_id = trader.placed(order, key)
        with subject.nothing_sent():
            for changes in ({"qty": order["qty"] + 100}, {"price": FAR_PRICE + 1}):
                answer = trader.place(order | changes, key=key)
                self.refused(answer, 422, "IDEMPOTENCY_CONFLICT")
        trader.cancel(order_id)

    def test_two_keys_two_orders(self, subject: Subject, trader: Trader) -> None:
        order = subject.limit()
        ids = {trader.placed(order, subject.key()), trader.placed(order, subject.key())}
        ids |= {trader.placed(order), trader.placed(order)}
        assert len(ids) == 4
        for order_id in ids:
            trader.cancel(order_id)

    def test_one_key_at_the_same_time(self, subject: Subject, trader: Trader) -> None:
        order, key = subject.limit(), subject.key()
        answers: list[Answer] = []
        start = threading.Barrier(12)

        def place() -> None:
            mine = subject.trader()
            start.wait(PATIENCE)
            answers.append(mine.place(order, key=key))

        with subject.one_order():
            threads = [threading.Thread(target=place) for _ in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(2 * PATIENCE)
        assert len(answers) == 12
        assert all(answer.ok for answer in answers), answers
        assert len({answer["orderId"] for answer in answers}) == 1
        assert sum(not answer.replayed for answer in answers) == 1
        trader.cancel(key=key)

    @pytest.mark.parametrize("key", ["", "x" * 65, "two words", "a/b", "ключ"])
    def test_a_bad_key(self, subject: Subject, trader: Trader, key: str) -> None:
        with subject.nothing_sent():
            error = self.refused(trader.place(subject.limit(), key=key), 400, "INVALID_REQUEST")
        assert "clientOrderId" in error["fields"]

    def test_refused_by_the_broker(self, subject: Subject, trader: Trader) -> None:
        order, words = subject.refused_order()
        key = subject.key()
        answer = trader.place(order, key=key)
        self.refused(answer, 422, "BROKER_REJECTED")
        assert words in answer["ex"]
        before = subject.placements()
        again = trader.place(order, key=key)  # the broker's refusal uses the key up
        self.refused(again, 422, "BROKER_REJECTED")
        assert subject.placements() == before
        node = trader.order(key=key)
        assert words in node["errorReason"]
        assert (node["isCompleted"], node["isFilled"], node["filledQty"]) == (True, False, 0)

    def test_a_refused_quote(self, subject: Subject, trader: Trader) -> None:
        if not any(subject.quotes(region) for region in TICKERS):
            return  # test_quote has shown that all of them are refused
        refused = subject.refused_quote()
        if refused is not None:
            self.refused(trader.quote(*refused), 422, "BROKER_REJECTED")

    # --- input --------------------------------------------------------------------------------
    @pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda text: text[:20])
    def test_bad_fields(self, subject: Subject, trader: Trader, field: str, value: str) -> None:
        order = simplejson.dumps(subject.limit() | {field: "@"}, use_decimal=True)
        with subject.nothing_sent():
            answer = trader.request("POST", "order/place", text=order.replace('"@"', value))
        error = self.refused(answer, 400, "INVALID_REQUEST")
        assert list(error["fields"]) == [field], answer
        if isinstance(value, str) and field in ALLOWED:
            said = " ".join(error["fields"][field])
            assert all(allowed in said for allowed in ALLOWED[field]), said

    @pytest.mark.parametrize("field", ARGS)
    def test_missing_fields(self, subject: Subject, trader: Trader, field: str) -> None:
        order = subject.limit()
        del order[field]
        with subject.nothing_sent():
            answer = trader.place(order)
        assert field in self.refused(answer, 400, "INVALID_REQUEST")["fields"], answer

    def test_a_market_order_has_no_price(self, subject: Subject, trader: Trader) -> None:
        order = subject.market_order() or (subject.limit() | {"orderType": "Market"})
        with subject.nothing_sent():
            answer = trader.place(order | {"price": Decimal("12.34")})
        assert "price" in self.refused(answer, 400, "INVALID_REQUEST")["fields"], answer

    @pytest.mark.parametrize(
        ("region", "ticker"),
        [("HK", "123456"), ("HK", "ABC"), ("CN", "12345"), ("CN", "1234567"), ("US", "A$B")],
    )
    def test_bad_tickers(self, subject: Subject, trader: Trader, region: str, ticker: str) -> None:
        with subject.nothing_sent():
            answer = trader.place(subject.limit(region=region, ticker=ticker))
            assert "ticker" in self.refused(answer, 400, "INVALID_REQUEST")["fields"], answer
            answer = trader.quote(region, ticker)
            assert "ticker" in self.refused(answer, 400, "INVALID_REQUEST")["fields"], answer

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '"order"', "{}", '{"qty": 1'])
    def test_bad_json(self, subject: Subject, trader: Trader, text: str) -> None:
        with subject.nothing_sent():
            answer = trader.request("POST", "order/place", text=text)
        self.refused(answer, 400, "INVALID_REQUEST")

    def test_wrong_ways_in(self, subject: Subject, trader: Trader) -> None:
        text = simplejson.dumps(subject.limit(), use_decimal=True)
        large = text[:-1] + " " * 70_000 + "}"
        with subject.nothing_sent():
            for status, method, content, headers in (
                (405, "GET", None, {}),
                (405, "PUT", text, {}),
                (415, "POST", text, {"Content-Type": "text/plain"}),
                (413, "POST", large, {}),
                (400, "POST", text, {"HT-TIMEOUT": "0"}),
                (400, "POST", text, {"HT-TIMEOUT": "soon"}),
                (400, "POST", text[:-1] + ', "prise": 1}', {}),
                (400, "POST", text.encode("utf-16").decode("latin-1"), {}),
            ):
                answer = trader.request(method, "order/place", text=content, headers=headers)
                self.refused(answer, status, "INVALID_REQUEST")

    def test_strangers_see_nothing(self, subject: Subject, trader: Trader) -> None:
        assert subject.app is not None
        known, token = trader.instance_id, trader.token
        with subject.nothing_sent():
            for instance_id, offered in ((known, token + "x"), (known[::-1], token), (known, "")):
                answer = Trader(subject.app, instance_id, offered).place(subject.limit())
                assert answer.status == 404 and not answer.text.startswith("{"), answer

    # --- lists ---------------------------------------------------------------------------------
    def test_orders_are_listed(self, subject: Subject, trader: Trader) -> None:
        order = subject.limit()
        working, done = trader.placed(order), trader.placed(order)
        self.body(subject, trader.cancel(done))
        trader.wait_order(done, isCanceled=True)
        listed = {
            status: [node["orderId"] for node in trader.orders(status=status)["orders"]]
            for status in ("open", "closed", "all")
        }
        assert working in listed["open"] and done not in listed["open"]
        assert done in listed["closed"] and working not in listed["closed"]
        assert listed["all"].index(done) < listed["all"].index(working), "newest first"
        node = next(n for n in trader.orders()["orders"] if n["orderId"] == working)
        assert list(node)[: len(ORDER)] == ORDER
        assert {name: node[name] for name in ORDER} == trader.order(working)
        assert len(trader.orders(limit=1)["orders"]) == 1
        self.refused(trader.orders(status="odd"), 400, "INVALID_REQUEST")
        trader.cancel(working)

    def test_fills_are_listed(self, subject: Subject, trader: Trader) -> None:
        order_id = trader.placed(subject.limit())
        subject.fill(order_id, 5, "12.30")
        subject.fill(order_id, 2, "12.25")
        trader.wait_order(order_id, filledQty=7)

        def look() -> list[dict[str, Any]] | None:
            fills = trader.fills(order_id)["fills"]
            return fills if sum(fill["qty"] for fill in fills) >= 7 else None

        fills = wait_for(look, "two fills")
        assert sorted((fill["qty"], fill["price"]) for fill in fills) == [
            (2, Decimal("12.25")),
            (5, Decimal("12.30")),
        ]
        trader.cancel(order_id)


class PushAcceptance(Acceptance):
    """For subjects that push: what happened is known although nobody asked the broker."""

    def test_a_fill_is_known_after_the_broker_forgot_it(
        self, subject: Subject, trader: Trader
    ) -> None:
        order = subject.limit()
        order_id = trader.placed(order)
        trader.order(order_id)
        subject.fill(order_id, order["qty"], "12.30")
        subject.forget(order_id)
        node = trader.wait_order(order_id, isFilled=True)
        assert (node["filledQty"], node["avgPrice"]) == (order["qty"], Decimal("12.30"))


class FaultAcceptance(Acceptance):
    """Cases with a broker that is down, hangs, cuts, or answers nonsense."""

    def test_down_and_back(self, subject: Subject, trader: Trader) -> None:
        order, key = subject.limit(), subject.key()
        subject.stop()
        try:
            answer = wait_for(
                lambda: (lambda a: a if a.code == "BROKER_UNAVAILABLE" else None)(
                    trader.cash(timeout=2)
                ),
                "503 BROKER_UNAVAILABLE for a read",
            )
            assert answer.status == 503 and int(answer.headers["Retry-After"]) >= 1, answer
            with subject.nothing_sent():
                refused = trader.place(order, key=key)
                self.refused(refused, 503, "BROKER_UNAVAILABLE")
            ping = trader.ping()
            assert ping.code == "BROKER_UNAVAILABLE" or ping["pong"] is False, ping
        finally:
            subject.start()
        with subject.one_order():
            # The promise is 5 s; a machine that stands still again and again gets more.
            back = wait_for(
                lambda: (lambda a: a if a.ok else None)(trader.place(order, key=key)),
                "the broker to be served again",
                patience=30,
            )
        assert back["clientOrderId"] == key
        self.body(subject, trader.cancel(key=key))

    def placed_into(
        self, subject: Subject, trader: Trader, order: dict[str, Any], kind: FaultKind
    ) -> tuple[str, set[str], Answer]:
        """Places an order that reaches the broker and meets this fault there before its time is up;
        its key, the orders that were at the exchange before, and its answer."""
        key, there, count, late = "", set[str](), 0, 0.0

        def place(seconds: float) -> Answer:
            nonlocal key, there, count, late
            key, there, count, late = (
                subject.key(),
                subject.order_ids(),
                subject.placements(),
                2 * seconds,
            )
            subject.exchange.clear_faults()
            subject.fault("place", kind, seconds=late)
            return trader.place(order, key=key, timeout=seconds)

        def arrived() -> bool:
            return subject.placements() > count

        def met(answer: Answer) -> bool:
            if kind is FaultKind.LATE and answer.ok:
                return answer.seconds < late  # else the machine stood still until it had come
            return arrived() or (answer.error["outcome"] == "unknown" and comes_true(arrived))

        answer = in_time(place, met)
        return key, there, answer

    @pytest.mark.parametrize("kind", [FaultKind.ACCEPT_THEN_CUT, FaultKind.ACCEPT_THEN_HANG])
    @pytest.mark.parametrize("pushes", [True, False], ids=["pushed", "only listed"])
    def test_accepted_without_an_answer(
        self, subject: Subject, trader: Trader, kind: FaultKind, pushes: bool
    ) -> None:
        """The order is found by its mark, in a push or in the broker's list."""
        order = subject.limit()
        subject.exchange.pushes = pushes
        key, before, answer = self.placed_into(subject, trader, order, kind)
        subject.exchange.pushes = True
        self.refused(answer, 504, "OUTCOME_UNKNOWN", "unknown")
        assert answer.error["clientOrderId"] == key
        node = self.settled(trader, key)
        again = trader.place(order, key=key)
        assert subject.exchange_id(node["orderId"]) == subject.new_order(before).order_id
        assert (node["qty"], node["isCompleted"]) == (order["qty"], False)
        assert again.ok and again["orderId"] == node["orderId"], again
        self.body(subject, trader.cancel(key=key))

    @pytest.mark.parametrize("kind", [FaultKind.CUT, FaultKind.HANG, FaultKind.GARBAGE])
    def test_not_accepted_and_no_answer(
        self, subject: Subject, trader: Trader, kind: FaultKind
    ) -> None:
        """The client may only repeat; once it is settled that there is no order, that places it."""
        order = subject.limit()
        key, before, first = self.placed_into(subject, trader, order, kind)
        assert first.code in {"OUTCOME_UNKNOWN", "BROKER_UNAVAILABLE"}, first
        wait_for(lambda: trader.place(order, key=key).ok, "the repetition to place the order")
        subject.new_order(before)
        self.body(subject, trader.cancel(key=key))

    def test_an_answer_after_the_deadline(self, subject: Subject, trader: Trader) -> None:
        order = subject.limit()
        key, before, answer = self.placed_into(subject, trader, order, FaultKind.LATE)
        self.refused(answer, 504, "OUTCOME_UNKNOWN", "unknown")
        node = self.settled(trader, key)
        assert subject.exchange_id(node["orderId"]) == subject.new_order(before).order_id
        self.body(subject, trader.cancel(key=key))

    def test_a_read_that_hangs(self, subject: Subject, trader: Trader) -> None:
        subject.fault("cash", FaultKind.HANG)
        answer = trader.cash(timeout=1)
        subject.exchange.clear_faults()  # when there was no time to ask, it would meet the next
        if answer.ok:  # the broker's own copy of the account answers without a request
            return
        self.refused(answer, 504, "TIMEOUT")
        assert answer.seconds < 20, "the deadline was 1 s"
        wait_for(lambda: trader.cash().ok, "reads to be served again")
        self.body(subject, trader.cancel(trader.placed(subject.limit())))

    def test_a_cut_read(self, subject: Subject, trader: Trader) -> None:
        subject.fault("positions", FaultKind.CUT)
        trader.positions(timeout=2)
        wait_for(lambda: trader.positions().ok, "reads to be served again")

    def test_the_brokers_own_limit(self, subject: Subject, trader: Trader) -> None:
        order, key = subject.limit(), subject.key()
        subject.fault("place", FaultKind.RATE_LIMIT)
        answer = trader.place(order, key=key)
        assert (answer.status, answer.code) in {
            (429, "RATE_LIMITED"),
            (504, "OUTCOME_UNKNOWN"),  # where the broker's words leave it open
        }, answer
        if answer.status == 429:
            assert int(answer.headers["Retry-After"]) >= 1
        with subject.one_order():
            wait_for(lambda: trader.place(order, key=key).ok, "the repetition to place the order")
        self.body(subject, trader.cancel(key=key))

    def test_cancel_without_an_answer(self, subject: Subject, trader: Trader) -> None:
        order_id = trader.placed(subject.limit())
        before = subject.cancellations()

        def cancel(seconds: float) -> Answer:
            subject.exchange.clear_faults()
            subject.fault("cancel", FaultKind.ACCEPT_THEN_CUT)
            return trader.cancel(order_id, timeout=seconds)

        def arrived() -> bool:
            return subject.cancellations() > before

        answer = in_time(
            cancel,
            lambda a: (
                arrived() or a.ok or (a.error["outcome"] == "unknown" and comes_true(arrived))
            ),
        )
        assert answer.ok or (answer.status, answer.code) == (504, "OUTCOME_UNKNOWN"), answer
        wait_for(lambda: trader.cash().ok, "reads to be served again")
        trader.wait_order(order_id, isCanceled=True)
