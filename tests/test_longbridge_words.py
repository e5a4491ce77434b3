"""LongPort's words and ours, and its markets' hours: tables and pure functions."""

import base64
import json
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from httptrading.brokers import longbridge_words as words
from httptrading.brokers.longbridge_hours import (
    MARKET_CODES,
    ZONES,
    Calendar,
    parse_market_codes,
    session_state,
)
from httptrading.brokers.longbridge_renewal import parse_grant
from httptrading.brokers.longbridge_rest import (
    UNREADABLE,
    NoAnswer,
    Refused,
    address,
    encode_query,
    read_envelope,
)
from httptrading.errors import BrokerUnavailable, RateLimited, Unsupported
from httptrading.model import (
    Contract,
    Lifecycle,
    OrderType,
    TimeInForce,
    TradeType,
    UnifiedStatus,
)


def contract(region: str, ticker: str) -> Contract:
    return Contract(TradeType.Securities, ticker, region)


# --- symbols ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("region", "ticker", "symbol"),
    [
        ("US", "AAPL", "AAPL.US"),
        ("US", "BRK.B", "BRK.B.US"),
        ("US", "GOOGLX", "GOOGLX.US"),
        ("HK", "00700", "700.HK"),
        ("HK", "00005", "5.HK"),
        ("HK", "80700", "80700.HK"),
        ("CN", "600519", "600519.SH"),
        ("CN", "688981", "688981.SH"),
        ("CN", "900901", "900901.SH"),
        ("CN", "510300", "510300.SH"),
        ("CN", "113050", "113050.SH"),
        ("CN", "204001", "204001.SH"),
        ("CN", "000001", "000001.SZ"),
        ("CN", "300750", "300750.SZ"),
        ("CN", "200012", "200012.SZ"),
        ("CN", "159915", "159915.SZ"),
        ("CN", "123001", "123001.SZ"),
    ],
)
def test_symbols_there_and_back(region: str, ticker: str, symbol: str) -> None:
    assert words.to_symbol(contract(region, ticker)) == symbol
    assert words.to_contract(symbol) == contract(region, ticker)


@pytest.mark.parametrize("ticker", ["920819", "430047", "830799", "870199", "700001", "100000"])
def test_codes_without_a_market(ticker: str) -> None:
    with pytest.raises(Unsupported, match="no market"):
        words.to_symbol(contract("CN", ticker))


@pytest.mark.parametrize("symbol", ["AAPL270115C200000.US", "D05.SG", "HSI.HK", "12345.SH", ""])
def test_what_is_no_security_of_ours(symbol: str) -> None:
    assert words.to_contract(symbol) is None


@given(st.integers(1, 99999))
def test_every_hk_code(number: int) -> None:
    ticker = f"{number:05d}"
    symbol = words.to_symbol(contract("HK", ticker))
    assert symbol == f"{number}.HK"
    assert words.to_contract(symbol) == contract("HK", ticker)


@given(st.from_regex(r"[A-Z]{1,6}(\.[A-Z]{1,2})?", fullmatch=True))
def test_every_us_ticker(ticker: str) -> None:
    assert words.to_contract(words.to_symbol(contract("US", ticker))) == contract("US", ticker)


@given(st.text("0123456789", min_size=6, max_size=6))
def test_a_cn_code_has_one_market_or_none(ticker: str) -> None:
    try:
        symbol = words.to_symbol(contract("CN", ticker))
    except Unsupported:
        return
    assert words.to_contract(symbol) == contract("CN", ticker)


def test_currencies_by_code() -> None:
    usual = {"AAPL": "USD", "600519": "CNY", "900901": "USD", "200012": "HKD", "201872": "HKD"}
    for ticker, currency in usual.items():
        region = "US" if ticker == "AAPL" else "CN"
        assert words.usual_currency(contract(region, ticker)) == currency
    assert words.usual_currency(contract("HK", "80700")) is None


# --- orders -----------------------------------------------------------------------------------
@given(st.floats(1e-4, 1e9, allow_nan=False).map(lambda number: float(f"{number:.15g}")))
@example(200.0)
def test_prices_go_out_as_typed(price: float) -> None:
    body = words.to_order_body(
        contract("US", "AAPL"),
        OrderType.Limit,
        TimeInForce.GTC,
        Lifecycle.OVERNIGHT,
        "SELL",
        7,
        price,
        "mark",
    )
    assert "e" not in body["submitted_price"].lower()
    assert Decimal(body["submitted_price"]) == Decimal(repr(price))
    assert not body["submitted_price"].endswith(".0")
    assert body == {
        "symbol": "AAPL.US",
        "order_type": "LO",
        "side": "Sell",
        "submitted_quantity": "7",
        "time_in_force": "GTC",
        "submitted_price": body["submitted_price"],
        "outside_rth": "OVERNIGHT",
        "remark": "mark",
    }


def test_a_market_order_has_no_price_and_hk_no_session() -> None:
    hk = contract("HK", "00700")
    body = words.to_order_body(
        hk, OrderType.Market, TimeInForce.DAY, Lifecycle.RTH, "BUY", 100, None, ""
    )
    assert body == {
        "symbol": "700.HK",
        "order_type": "MO",
        "side": "Buy",
        "submitted_quantity": "100",
        "time_in_force": "Day",
    }


def row(status: str, **changes: Any) -> dict[str, Any]:
    return {
        "order_id": "706388312699592704",
        "status": status,
        "symbol": "AAPL.US",
        "currency": "USD",
        "quantity": "12",
        "executed_quantity": "5",
        "executed_price": "200.005",
        "price": "200.01",
        "side": "Buy",
        "order_type": "LO",
        "time_in_force": "GTC",
        "outside_rth": "ANY_TIME",
        "msg": "its words",
        "remark": "mark",
        "submitted_at": "1651644897",
    } | changes


STATUSES = {
    # status → (canceled, pending cancel, failed); False, False, False: still something to come
    "Unknown": (False, False, False),
    "NotReported": (False, False, False),
    "ReplacedNotReported": (False, False, False),
    "ProtectedNotReported": (False, False, False),
    "VarietiesNotReported": (False, False, False),
    "FilledStatus": (False, False, False),
    "WaitToNew": (False, False, False),
    "NewStatus": (False, False, False),
    "WaitToReplace": (False, False, False),
    "PendingReplaceStatus": (False, False, False),
    "ReplacedStatus": (False, False, False),
    "PartialFilledStatus": (False, False, False),
    "WaitToCancel": (False, True, False),
    "PendingCancelStatus": (False, True, False),
    "RejectedStatus": (False, False, True),
    "CanceledStatus": (True, False, False),
    "ExpiredStatus": (False, False, False),  # of an order until cancelled
    "PartialWithdrawal": (True, False, False),
    "SomethingNew": (False, False, False),
}


@pytest.mark.parametrize("status", STATUSES)
def test_every_status_in_lists_and_pushes(status: str) -> None:
    canceled, pending, failed = STATUSES[status]
    listed = words.parse_order(row(status))
    order = listed.order
    assert (order.is_canceled, order.is_pending_cancel) == (canceled, pending)
    assert order.error_reason == ("its words" if failed else "")
    assert order.is_completed == (canceled or failed)
    assert order.is_cancelable == (not (canceled or failed or pending))
    assert (order.qty, order.filled_qty, order.avg_price) == (12, 5, Decimal("200.005"))
    pushed = words.parse_order(words.push_row(push(status)))
    assert pushed.order == order
    names = ("mark", "contract", "direction", "order_type", "price", "time")
    assert [getattr(pushed, name) for name in names] == [getattr(listed, name) for name in names]


def push(status: str) -> SimpleNamespace:
    """What the SDK makes of a push: enum members, Decimals, a naive time in the local zone."""
    return SimpleNamespace(
        order_id="706388312699592704",
        status=f"OrderStatus.{status.removesuffix('Status')}",
        symbol="AAPL.US",
        currency="USD",
        submitted_quantity=Decimal(12),
        executed_quantity=Decimal(5),
        executed_price=Decimal("200.005"),
        submitted_price=Decimal("200.01"),
        side="OrderSide.Buy",
        order_type="OrderType.LO",
        msg="its words",
        remark="mark",
        submitted_at=datetime.fromtimestamp(1651644897),
    )


def test_the_sdk_has_no_status_that_the_table_lacks() -> None:
    from longport.openapi import OrderStatus

    known = words.WORKING | words.PENDING_CANCEL | words.CANCELED | words.FAILED
    names = {name for name in vars(OrderStatus) if not name.startswith("_")}
    assert names == known
    # The words of the history filter are those of open orders, as REST spells them.
    final = {"Filled", "Unknown"} | words.CANCELED | words.FAILED
    assert {word.removesuffix("Status") for word in words.OPEN_WORDS} == known - final


@pytest.mark.parametrize("executed", ["0", "", None])
def test_an_order_filled_without_a_quantity(executed: str | None) -> None:
    """As paper accounts tell it, in lists and pushes (longbridge/openapi-go#61)."""
    empty: dict[str, Any] = {"executed_quantity": executed, "executed_price": executed}
    order = words.parse_order(row("FilledStatus", **empty)).order
    assert (order.filled_qty, order.is_filled, order.avg_price) == (12, True, 0)
    pushed = SimpleNamespace(**(vars(push("FilledStatus")) | dict.fromkeys(empty, Decimal(0))))
    assert words.parse_order(words.push_row(pushed)).order == order
    for word in ("PartialFilledStatus", "CanceledStatus", "NewStatus"):
        assert words.parse_order(row(word, **empty)).order.filled_qty == 0


def test_a_filled_order_and_what_is_left_empty() -> None:
    report = words.parse_order(
        row(
            "FilledStatus",
            executed_quantity="12",
            msg=None,
            price="",
            outside_rth="UnknownOutsideRth",
            order_type="TSLPPCT",
            remark="",
        )
    )
    assert report.order.is_filled and report.order.error_reason == ""
    assert (report.price, report.lifecycle, report.order_type) == (None, None, None)
    of_the_day = row("ExpiredStatus", msg="", time_in_force="Day")
    assert words.parse_order(of_the_day).order.error_reason == "Expired"
    empty = words.parse_order(row("NewStatus", executed_quantity="", executed_price=None)).order
    assert (empty.filled_qty, empty.avg_price) == (0, 0)
    for bad in ({"quantity": "NaN"}, {"quantity": ""}, {"quantity": None}, {"order_id": None}):
        with pytest.raises(ValueError):
            words.parse_order(row("NewStatus", **bad))


@pytest.mark.parametrize(
    ("word", "tag", "told", "ends"),
    [
        ("Day", "Normal", TimeInForce.DAY, True),
        ("Day", "Grey", TimeInForce.DAY, True),
        ("Day", None, TimeInForce.DAY, True),
        ("GTC", "Gtc", TimeInForce.GTC, False),
        ("GTC", "GTC", TimeInForce.GTC, False),
        ("GTD", "Gtc", None, False),
        ("Day", "Gtc", None, False),  # lists have had the two the wrong way round
        ("GTC", "Normal", None, False),
    ],
)
def test_how_long_an_order_works(
    word: str, tag: str | None, told: TimeInForce | None, ends: bool
) -> None:
    report = words.parse_order(row("ExpiredStatus", time_in_force=word, tag=tag))
    assert (report.time_in_force, report.order.is_completed) == (told, ends)


@pytest.mark.parametrize("moment", ["soon", "1e99", "9" * 30, 1e300, [], {}, None, "", "0"])
def test_a_time_that_cannot_be_read_is_none(moment: object) -> None:
    assert words.parse_order(row("NewStatus", submitted_at=moment)).time is None


@pytest.mark.parametrize(
    "changes",
    [{"quantity": "--"}, {"status": ...}, {"symbol": ...}, {"price": {}}, {"quantity": "1e999999"}],
)
def test_a_listed_order_that_cannot_be_read_keeps_its_id_and_mark(changes: dict[str, Any]) -> None:
    """One that is missing from a listing counts as not placed."""
    found = row("NewStatus") | changes
    bad = {name: value for name, value in found.items() if value is not ...}
    report = words.parse_listed(bad)
    assert (report.order.order_id, report.mark) == (bad["order_id"], "mark")
    assert not report.order.is_completed and report.order.filled_qty == 0
    assert words.parse_readable([bad, row("NewStatus")]) == [words.parse_order(row("NewStatus"))]
    for unknown in (None, "", [], 7.5e17, True):
        with pytest.raises(UNREADABLE):
            words.parse_listed(bad | {"order_id": unknown})
    with pytest.raises(UNREADABLE):
        words.parse_listed(bad | {"remark": 5})
    with pytest.raises(UNREADABLE):
        words.parse_listed("a row")  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [None, [], {}, {"orders": None}, {"orders": {}}, "orders"])
def test_a_listing_without_its_list_is_none(data: Any) -> None:
    with pytest.raises(UNREADABLE):
        words.rows_of(data, "orders")


# --- account ----------------------------------------------------------------------------------
def test_cash_is_what_is_available_in_one_currency() -> None:
    infos = [
        {"currency": "HKD", "available_cash": "1.5", "frozen_cash": "9"},
        {"currency": "USD", "available_cash": "-30877.499", "frozen_cash": "9"},
    ]
    data = {"list": [{"currency": "HKD", "total_cash": "99", "cash_infos": infos}]}
    assert words.parse_cash(data, "USD") == Decimal("-30877.499")
    assert words.parse_cash(data, "CNY") == 0
    assert words.parse_cash({"list": [{"cash_infos": []}]}, "USD") == 0
    # An account without any: the field is optional (documentation; the SDK's serde default).
    assert words.parse_cash({"list": [{"currency": "HKD", "total_cash": "0.00"}]}, "USD") == 0


@pytest.mark.parametrize("kept", ["CNH", "CNY"])
def test_renminbi_has_two_names(kept: str) -> None:
    data = {"list": [{"cash_infos": [{"currency": kept, "available_cash": "500.5"}]}]}
    for asked in ("CNH", "CNY"):
        assert words.parse_cash(data, asked) == Decimal("500.5")
        assert words.asked_currency(asked) == "CNH"
    assert words.parse_cash(data, "USD") == 0
    assert words.asked_currency("USD") == "USD"


@pytest.mark.parametrize(
    "rows",
    [
        *(None, {}, [], [{}], [{"currency": "USD", "total_cash": "9"}], [{"cash_infos": None}]),
        *([{"cash_infos": [{"currency": "USD"}]}], [{"cash_infos": ["USD"]}]),
        *([{"cash_infos": [{"currency": "USD", "available_cash": x}]}] for x in (None, "", "-")),
        *([{"cash_infos": [{"currency": x, "available_cash": "5"}]}] for x in (None, "")),
    ],
)
def test_cash_that_is_not_told_is_not_0(rows: object) -> None:
    with pytest.raises(UNREADABLE):
        words.parse_cash({"list": rows}, "USD")


def test_positions_over_all_channels() -> None:
    def held(symbol: str, qty: str, currency: str = "USD") -> dict[str, str]:
        return {"symbol": symbol, "quantity": qty, "currency": currency}

    data = {
        "list": [
            {"account_channel": "lb", "stock_info": [held("AAPL.US", "1.5"), held("QQQ.US", "0")]},
            {"account_channel": "lb_papertrading", "stock_info": [held("5.HK", "-100", "HK")]},
            {"account_channel": "third", "stock_info": [held("AAPL.US", "2"), held("D05.SG", "1")]},
            {"account_channel": "empty"},
        ]
    }
    assert words.parse_positions(data) == {
        contract("US", "AAPL"): ("USD", Decimal("3.5")),
        contract("HK", "00005"): ("HKD", Decimal(-100)),
    }


@pytest.mark.parametrize(
    "changes",
    [
        *({"quantity": ""}, {"quantity": None}, {"quantity": "-"}, {"currency": None}),
        *({"symbol": odd} for odd in (..., None, "", 700, [], "AAPL")),
    ],
)
def test_a_position_that_is_not_told_is_not_left_out(changes: dict[str, Any]) -> None:
    held = {"symbol": "AAPL.US", "quantity": "5", "currency": "USD"} | changes
    row = {name: value for name, value in held.items() if value is not ...}
    with pytest.raises(UNREADABLE):
        words.parse_positions({"list": [{"stock_info": [row]}]})


def jwt(**claims: object) -> str:
    """A token as LongPort makes them, unsigned."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in ({}, claims)]
    return f"m_{parts[0].decode().rstrip('=')}.{parts[1].decode().rstrip('=')}.sign"


GRANTED, OWN_END, ASKED = 4070953437.0, 4070953000, 4070952000.0


@pytest.mark.parametrize(
    ("end", "expiry"),
    [
        ("2099-01-01T12:23:57.859Z", GRANTED),
        ("2099-01-01T12:23:57.123456789Z", GRANTED),
        ("2099-01-01T20:23:57+08:00", GRANTED),
        (GRANTED, GRANTED),
        ("4070953437", GRANTED),
        (4070953437859, GRANTED),
        ("4070953437859", GRANTED),
        *((bad, None) for bad in (..., None, "", "soon", True, 0, "0", "2020-01-01", [], 1e300)),
        ("Thu, 01 Jan 2099 12:23:57 GMT", None),
    ],
)
def test_a_granted_token_is_kept_whatever_its_end_looks_like(
    end: object, expiry: float | None
) -> None:
    """The old one is dead, so this is the only one."""
    for text, else_ in (("m_new", ASKED), (jwt(exp=OWN_END), OWN_END), (jwt(exp="x"), ASKED)):
        data = {"token": text} if end is ... else {"token": text, "expired_at": end}
        token = parse_grant(data, ASKED)
        assert (token.text, token.expiry) == (text, expiry or else_)


@pytest.mark.parametrize("data", [None, [], {}, {"token": None}, {"token": ""}, {"token": "a b"}])
def test_what_is_no_granted_token(data: Any) -> None:
    with pytest.raises(ValueError):
        parse_grant(data, ASKED)


# --- REST -------------------------------------------------------------------------------------
@pytest.mark.parametrize("code", [401003, 401004, 401102])  # of users' reports; 0: over WebSocket
def test_what_is_wrong_with_a_token_is_said(code: int) -> None:
    for status in (401, 0):
        found = words.refusal(Refused(status, code, "its words"), Path("token.toml"))
        assert isinstance(found, BrokerUnavailable) and "no longer accepts the token" in found.text


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (429, 0, RateLimited),  # as a proxy before LongPort says it
        (200, 429001, RateLimited),
        (0, 301606, RateLimited),
        (401, 0, BrokerUnavailable),
        (403, 403205, BrokerUnavailable),
        (403, 403202, NoAnswer),  # a duplicate of what may have been done
        (0, 301602, NoAnswer),
        (200, 602023, NoAnswer),  # "internal server error"
        (400, 602023, NoAnswer),
        (500, 602001, NoAnswer),
        (200, 500000, NoAnswer),
        (200, 501000, words.CodedRejection),
        (400, 430000, words.CodedRejection),
        (400, 602001, words.CodedRejection),
        (400, 602035, words.CodedRejection),
    ],
)
def test_what_refusals_mean(status: int, code: int, kind: type[Exception]) -> None:
    """An order that LongPort may have taken never counts as refused, nor one refused as unsent."""
    found = words.refusal(Refused(status, code, "its words"), Path("token.toml"))
    assert type(found) is kind
    if isinstance(found, words.CodedRejection):
        assert (found.text, found.longport_code) == (f"its words (LongBridge code {code})", code)


def test_an_error_within_longbridge_is_no_refusal() -> None:
    found = words.refusal(Refused(0, 14, "Internal server error"), Path("token.toml"))
    assert type(found) is NoAnswer


def test_envelopes() -> None:
    assert read_envelope(200, b'{"code":0,"message":"","data":{"a":1}}') == {"a": 1}
    with pytest.raises(Refused) as refused:
        read_envelope(403, b'{"code":403201,"message":"signature invalid"}')
    assert (refused.value.status, refused.value.code) == (403, 403201)
    with pytest.raises(Refused) as refused:
        read_envelope(429, b"<html>")
    assert refused.value.status == 429
    endless = b'{"code":0,"data":' + b"[" * 100_000
    for status, text in (
        *((200, b"<html>"), (502, b"<html>"), (200, b"[]"), (500, b'{"code":0}'), (204, b"")),
        *((200, b'{"code":Infinity}'), (200, b'{"code":NaN}'), (200, endless)),
        (200, b'{"code":603001,"message":"no","data":{"order_id":"701276261045858304"}}'),
    ):
        with pytest.raises(NoAnswer):
            read_envelope(status, text)


def test_queries_and_addresses() -> None:
    assert encode_query({"a": "x y/&", "status": ["New", "Old"]}) == (
        "a=x%20y%2F%26&status=New&status=Old"
    )
    assert address("[::1]:80") == ("::1", 80)
    assert address("user@example.com") == ("example.com", None)
    with pytest.raises(ValueError):
        address(":80")


# --- market state -----------------------------------------------------------------------------
US = [
    (time(9, 30), time(16), "Intraday"),
    (time(4), time(9, 30), "Pre"),
    (time(16), time(20), "Post"),
    (time(20), time(4), "Overnight"),
]
# Two parts of one night, as the SDK's own table has them (rust/crates/candlesticks/src/markets.rs).
TWO_PARTS = [(time(0), time(4), "Overnight"), (time(20), time(23, 59), "Overnight")]
HK = [(time(9, 30), time(12), "Intraday"), (time(13), time(16), "Intraday")]
CN = [(time(9, 30), time(11, 30), "Intraday"), (time(13), time(14, 57), "Intraday")]
# Friday 2026-11-27 is a half day in the US, Wednesday 2026-12-23 taken for one in Hong Kong.
HALF = frozenset({date(2026, 11, 27), date(2026, 12, 23)})
HOLIDAYS = {date(2026, 11, 26), date(2026, 12, 25)}
DAYS = [date(2026, 11, 16) + timedelta(days=number) for number in range(60)]
CALENDAR = Calendar(
    DAYS[0],
    DAYS[-1],
    frozenset(day for day in DAYS if day.weekday() < 5 and day not in HOLIDAYS),
    HALF,
)


@pytest.mark.parametrize(
    ("region", "moment", "state"),
    [
        ("US", "2026-11-23 03:59", "OVERNIGHT"),
        ("US", "2026-11-23 04:00", "PRE_HOURS"),
        ("US", "2026-11-23 09:30", "RTH"),
        ("US", "2026-11-23 15:59", "RTH"),
        ("US", "2026-11-23 16:00", "AFTER_HOURS"),
        ("US", "2026-11-23 20:00", "OVERNIGHT"),
        ("US", "2026-11-23 23:59:30", "OVERNIGHT"),
        ("US", "2026-11-24 00:00", "OVERNIGHT"),
        ("US", "2026-11-25 20:00", "CLOSED"),  # the night before Thanksgiving
        ("US", "2026-11-26 10:00", "CLOSED"),
        ("US", "2026-11-26 20:00", "OVERNIGHT"),
        ("US", "2026-11-27 12:59", "RTH"),
        ("US", "2026-11-27 13:00", "AFTER_HOURS"),
        ("US", "2026-11-27 17:00", "CLOSED"),
        ("US", "2026-11-27 20:00", "CLOSED"),
        ("US", "2026-11-28 03:00", "CLOSED"),
        ("US", "2026-11-29 19:59", "CLOSED"),
        ("US", "2026-11-29 20:00", "OVERNIGHT"),
        ("HK", "2026-11-23 09:29", "UNKNOWN"),
        ("HK", "2026-11-23 11:59", "RTH"),
        ("HK", "2026-11-23 12:00", "REST"),
        ("HK", "2026-11-23 13:00", "RTH"),
        ("HK", "2026-11-23 16:00", "CLOSED"),
        ("HK", "2026-12-23 09:29", "UNKNOWN"),
        ("HK", "2026-12-23 11:59", "RTH"),
        ("HK", "2026-12-23 12:30", "CLOSED"),
        ("HK", "2026-12-23 14:00", "CLOSED"),
        ("HK", "2026-12-25 10:00", "CLOSED"),
        ("CN", "2026-11-23 11:45", "REST"),
        ("CN", "2026-11-23 14:59", "RTH"),
        ("CN", "2026-11-23 15:00", "CLOSED"),
        ("CN", "2026-11-22 10:00", "CLOSED"),
    ],
)
def test_states_by_session(region: str, moment: str, state: str) -> None:
    now = datetime.fromisoformat(moment).replace(tzinfo=ZoneInfo(ZONES[region]))
    periods = {"US": US, "HK": HK, "CN": CN}[region]
    assert session_state(region, now, periods, CALENDAR).unified_status.name == state
    if region == "US":
        for split in ([*US[:-1], *TWO_PARTS], [*reversed(TWO_PARTS), *US[:-1]]):
            assert session_state(region, now, split, CALENDAR).unified_status.name == state


@given(
    st.sampled_from(["US", "HK", "CN"]),
    st.datetimes(datetime(2026, 11, 17), datetime(2027, 1, 10)),
)
def test_a_closed_day_has_no_regular_hours(region: str, moment: datetime) -> None:
    periods = {"US": US, "HK": HK, "CN": CN}[region]
    state = session_state(region, moment, periods, CALENDAR).unified_status
    if moment.date() not in CALENDAR.open_days:
        assert state in (UnifiedStatus.CLOSED, UnifiedStatus.OVERNIGHT)
    if state is UnifiedStatus.OVERNIGHT:
        night = moment.date() + timedelta(days=moment.hour >= 20)
        assert night in CALENDAR.open_days
    assert session_state(region, moment, (), CALENDAR).unified_status is UnifiedStatus.CLOSED


def test_states_by_code() -> None:
    def answered(code: Any, market: str = "US") -> dict[str, Any]:
        return {"market_time": [{"market": market, "trade_status": code}]}

    for code, (name, state) in MARKET_CODES.items():
        found = parse_market_codes(answered(code))["US"]
        assert (found.origin_status, found.unified_status) == (name, state)
    assert parse_market_codes(answered(999))["US"].unified_status is UnifiedStatus.UNKNOWN
    # Clearing goes on beside trading: the SDK's TradeStatus (4.3.3), normalize() and name().
    for code, state in (
        (206, UnifiedStatus.PRE_HOURS),
        (209, UnifiedStatus.CLOSED),
        (210, UnifiedStatus.RTH),
    ):
        assert parse_market_codes(answered(code))["US"].unified_status is state
    closing = parse_market_codes(answered(107, "HK"))["HK"]
    assert closing.unified_status is UnifiedStatus.CLOSED
    assert parse_market_codes(answered(202, "SG")) == {}
    assert parse_market_codes(answered(None)) == {}
    assert parse_market_codes({}) == {}


def test_times_are_aware() -> None:
    assert words.parse_order(row("NewStatus")).time == datetime(2022, 5, 4, 6, 14, 57, tzinfo=UTC)
    fill = words.parse_fill(
        {
            "trade_id": "t",
            "order_id": "1",
            "quantity": "1",
            "price": "2.5",
            "trade_done_at": "1648611351",
        }
    )
    assert fill.time == datetime(2022, 3, 30, 3, 35, 51, tzinfo=UTC)


@pytest.mark.parametrize("odd", [None, "", True, [], 1.5])
def test_a_fill_without_an_id_is_none(odd: object) -> None:
    """Recorded without it, it would count twice beside itself."""
    told = {"trade_id": odd, "order_id": "1", "quantity": "1", "price": "2.5"}
    with pytest.raises(ValueError, match="no trade_id"):
        words.parse_fill(told)
