"""Futu's words and ours: every order status, every market state, codes, times and numbers."""

import math
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from httptrading.brokers import futu_vocabulary as words
from httptrading.errors import Unsupported
from httptrading.model import (
    Contract,
    Lifecycle,
    OrderType,
    TimeInForce,
    TradeType,
    UnifiedStatus,
)
from httptrading.tickers import currency_of


def order_row(**changes: Any) -> dict[str, Any]:
    """A row as `order_list_query` gives it (trade/trade_query.py `parse_order`)."""
    return {
        "code": "US.BRK.B",
        "stock_name": "Berkshire",
        "order_market": "US",
        "trd_side": "SELL",
        "order_type": "NORMAL",
        "order_status": "FILLED_PART",
        "order_id": "38196006548709500",
        "qty": 12.0,
        "price": 480.01,
        "create_time": "2026-03-02 09:30:00.123",
        "updated_time": "2026-03-02 09:31:00",
        "dealt_qty": 5.0,
        "dealt_avg_price": 480.005,
        "last_err_msg": "",
        "remark": "mark",
        "time_in_force": "GTC",
        "fill_outside_rth": True,
        "session": "ETH",
        "currency": "USD",
        **changes,
    }


# Trd_Common.proto OrderStatus, as broker page qa/trade.html and the enum's comments explain it.
STATUSES = {  # canceled, failed, pending cancel
    "N/A": (False, False, False),
    "UNSUBMITTED": (False, False, False),
    "WAITING_SUBMIT": (False, False, False),
    "SUBMITTING": (False, False, False),
    "SUBMIT_FAILED": (False, True, False),
    "TIMEOUT": (False, False, False),
    "SUBMITTED": (False, False, False),
    "FILLED_PART": (False, False, False),
    "FILLED_ALL": (False, False, False),
    "CANCELLING_PART": (False, False, True),
    "CANCELLING_ALL": (False, False, True),
    "CANCELLED_PART": (True, False, False),
    "CANCELLED_ALL": (True, False, False),
    "FAILED": (False, True, False),
    "DISABLED": (False, True, False),
    "DELETED": (False, True, False),
    "FILL_CANCELLED": (False, True, False),
}


@pytest.mark.parametrize(("status", "expected"), STATUSES.items())
def test_every_order_status(status: str, expected: tuple[bool, bool, bool]) -> None:
    report = words.parse_order(order_row(order_status=status, last_err_msg="购买力不足"))
    assert report is not None
    order = report.order
    canceled, failed, pending = expected
    assert (order.is_canceled, order.is_pending_cancel) == (canceled, pending)
    assert order.error_reason == (f"{status}: 购买力不足" if failed else "")
    assert order.is_completed is (canceled or failed)
    assert order.filled_qty == 5


def test_a_filled_order_may_come_without_its_quantity() -> None:
    report = words.parse_order(order_row(order_status="FILLED_ALL", dealt_qty=0.0))
    assert report is not None
    assert (report.order.filled_qty, report.order.is_filled) == (12, True)
    report = words.parse_order(order_row(order_status="SUBMITTED", dealt_qty=0.0))
    assert report is not None and report.order.filled_qty == 0


@pytest.mark.parametrize(("told", "currency"), [("CNH", "CNH"), ("N/A", "HKD")])
def test_an_order_is_in_the_currency_of_its_counter(told: str, currency: str) -> None:
    report = words.parse_order(order_row(code="HK.80700", order_market="HK", currency=told))
    assert report is not None and report.order.currency == currency


def test_no_order_status_of_the_sdk_is_forgotten(sdk_enum: Callable[[str], list[str]]) -> None:
    assert set(sdk_enum("OrderStatus")) == set(STATUSES)


def test_an_order_in_all_its_fields() -> None:
    report = words.parse_order(order_row())
    assert report is not None
    assert report.mark == "mark"
    assert report.contract == Contract(TradeType.Securities, "BRK.B", "US")
    assert (report.direction, report.order_type, report.price) == ("SELL", OrderType.Limit, 480.01)
    assert (report.time_in_force, report.lifecycle) == (TimeInForce.GTC, Lifecycle.ETH)
    assert report.time == datetime.fromisoformat("2026-03-02 09:30:00.123-05:00")
    assert (report.order.qty, report.order.avg_price) == (12, 480.005)
    assert isinstance(report.order.qty, int)
    assert report.order.order_id == "38196006548709500"


@pytest.mark.parametrize(
    ("changes", "field", "expected"),
    [
        ({"order_type": "MARKET"}, "price", None),
        ({"order_type": "STOP"}, "order_type", None),
        ({"time_in_force": "GTD"}, "time_in_force", None),
        ({"session": "N/A", "fill_outside_rth": False}, "lifecycle", Lifecycle.RTH),
        ({"session": "N/A"}, "lifecycle", Lifecycle.ETH),
        ({"session": "OVERNIGHT"}, "lifecycle", Lifecycle.OVERNIGHT),
        ({"trd_side": "BUY_BACK"}, "direction", "BUY"),
        ({"trd_side": "SELL_SHORT"}, "direction", "SELL"),
        ({"trd_side": "N/A"}, "direction", None),
        ({"create_time": ""}, "time", None),
        ({"remark": ""}, "mark", ""),
    ],
)
def test_orders_of_other_clients(changes: dict[str, Any], field: str, expected: Any) -> None:
    assert getattr(words.parse_order(order_row(**changes)), field) == expected


@pytest.mark.parametrize("code", ["US.AAPL261218C200000", "JP.7203", "HK.800000", "HK_FUTURE.1"])
def test_what_is_no_security_is_left_out(code: str) -> None:
    position = {"code": code, "position_market": "US", "qty": 1.0}
    position |= {"position_side": "LONG", "currency": "USD"}
    assert words.parse_order(order_row(code=code)) is None
    assert words.parse_position(position, "futu", "富途证券") is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (("US.AAPL", 0.5, "LONG", "USD"), ("US", "AAPL", "USD", 0.5)),
        (("HK.00700", 200.0, "LONG", "HKD"), ("HK", "00700", "HKD", 200)),
        (("SH.600519", 100.0, "LONG", "CNH"), ("CN", "600519", "CNH", 100)),
        (("SZ.000001", 100.0, "LONG", "N/A"), ("CN", "000001", "CNY", 100)),
        (("US.BRK.B", 3.0, "SHORT", "USD"), ("US", "BRK.B", "USD", -3)),
        (("US.BRK.B", -3.0, "SHORT", "USD"), ("US", "BRK.B", "USD", -3)),
        (("US.QQQ", -3.0, "N/A", "USD"), ("US", "QQQ", "USD", -3)),
    ],
)
def test_positions(row: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    named = dict(zip(("code", "qty", "position_side", "currency"), row, strict=True))
    named["position_market"] = "N/A"
    found = words.parse_position(named, "futu", "富途证券")
    assert found is not None
    shown = (found.contract.region, found.contract.ticker, found.currency, found.qty)
    assert shown == expected


def test_a_position_closed_today_is_none() -> None:
    row = {"code": "US.AAPL", "qty": 0.0, "position_side": "LONG", "currency": "USD"}
    row["position_market"] = "US"
    assert words.parse_position(row, "futu", "富途证券") is None


@pytest.mark.parametrize(
    ("listed", "currency", "alone", "expected"),
    [
        ({"us_cash": 5.25, "hk_cash": 0.0}, "USD", False, 5.25),
        ({"us_cash": 5.25, "hk_cash": 0.0}, "HKD", False, 0),
        ({"us_cash": 5.25}, "CNY", False, 0),  # it lists its currencies, this is none of them
        ({"cn_cash": 8.5}, "CNY", False, 8.5),
        ({}, "USD", True, 999.0),
        ({}, "USD", False, None),  # everything converted into dollars is not what is held in them
    ],
)
def test_cash(listed: dict[str, float], currency: str, alone: bool, expected: float | None) -> None:
    row: dict[str, Any] = dict.fromkeys(words.CASH_FIELDS.values(), "N/A")
    assert words.parse_cash(row | {"cash": 999.0} | listed, currency, alone) == expected


UNIFIED = {
    "RTH": {"MORNING", "AFTERNOON"},
    "REST": {"REST"},
    "PRE_HOURS": {"PRE_MARKET_BEGIN"},
    "AFTER_HOURS": {
        "AFTER_HOURS_BEGIN",
        "ASHARE_AFTER_HOURS_BEGIN",
        "STIB_AFTER_HOURS_BEGIN",
    },
    "OVERNIGHT": {"OVERNIGHT"},
    "CLOSED": {
        "CLOSED",
        "AFTER_HOURS_END",
        "HK_CAS",
        "ASHARE_AFTER_HOURS_WAIT",
        "ASHARE_AFTER_HOURS_END",
        "STIB_AFTER_HOURS_WAIT",
        "STIB_AFTER_HOURS_END",
    },
}


def test_every_market_state_of_the_sdk(sdk_enum: Callable[[str], list[str]]) -> None:
    listed = {word for some in UNIFIED.values() for word in some}
    assert listed <= set(sdk_enum("MarketState"))
    for word in [*sdk_enum("MarketState"), "N/A"]:
        states = dict.fromkeys(("market_us", "market_hk", "market_sh", "market_sz"), word)
        expected = next((name for name, some in UNIFIED.items() if word in some), "UNKNOWN")
        for region, status in words.parse_market_states(states).items():
            assert (status.region, status.origin_status) == (region, word)
            assert status.unified_status is UnifiedStatus[expected], word


@pytest.mark.parametrize(
    ("shanghai", "shenzhen", "shown"),
    [
        ("CLOSED", "ASHARE_AFTER_HOURS_BEGIN", "ASHARE_AFTER_HOURS_BEGIN"),
        ("N/A", "AFTERNOON", "AFTERNOON"),
        ("REST", "N/A", "REST"),
        ("MORNING", "CLOSED", "MORNING"),
    ],
)
def test_shanghai_and_shenzhen_make_one_state(shanghai: str, shenzhen: str, shown: str) -> None:
    states = {"market_us": "NONE", "market_hk": "NONE"}
    states |= {"market_sh": shanghai, "market_sz": shenzhen}
    assert words.parse_market_states(states)["CN"].origin_status == shown


def test_quotes_know_their_own_time_and_halts() -> None:
    row = {
        "last_price": 11.53,
        "prev_close_price": 11.49,
        "open_price": 11.5,
        "high_price": 11.55,
        "low_price": 11.44,
        "update_time": "2025-05-28 13:25:18.000",
        "suspension": False,
        "sec_status": "NORMAL",
    }
    ping_an = Contract(TradeType.Securities, "000001", "CN")
    quote = words.parse_quote(row, ping_an)
    assert int(quote.time.timestamp() * 1000) == 1748409918000
    assert (quote.latest, quote.currency, quote.is_tradable) == (11.53, "CNY", True)
    for halted in ({"suspension": True}, {"sec_status": "RECOVERABLE_CIRCUIT_BREAKER"}):
        assert words.parse_quote(row | halted, ping_an).is_tradable is False
    summer = words.parse_time("2026-07-01 09:30:00", "US")
    winter = words.parse_time("2026-01-05 09:30:00", "US")
    assert (summer.utcoffset(), winter.utcoffset()) != (winter.utcoffset(), summer.utcoffset())


@pytest.mark.parametrize("told", [math.nan, math.inf])
def test_what_is_no_number_is_no_holding_of_none(told: float) -> None:
    """Nor a price of 0 of an execution: the check of every answer refuses it (checked.py). In an
    order, where the journal may know better, 0 stands for what is not known."""
    held = {"code": "US.AAPL", "position_market": "US", "position_side": "LONG", "currency": "USD"}
    position = words.parse_position(held | {"qty": told}, "futu", "富途证券")
    assert position is not None and not math.isfinite(position.qty)
    cash = words.parse_cash({name: told for name in words.CASH_FIELDS.values()}, "USD", True)
    assert cash is not None and not math.isfinite(cash)
    report = words.parse_order(order_row(qty=told, dealt_qty=told, price=told))
    assert report is not None
    assert (report.order.qty, report.order.filled_qty, report.price) == (0, 0, 0)


@pytest.mark.parametrize("time", ["", "N/A", "0000-00-00 00:00:00", "2026-13-45 99:99:99"])
def test_an_order_whose_time_cannot_be_read_is_told_without_one(time: str) -> None:
    report = words.parse_order(order_row(create_time=time))
    assert report is not None and (report.time, report.order.qty) == (None, 12)


def test_a_quote_is_in_the_currency_of_its_code() -> None:
    """Qot_GetSecuritySnapshot.proto has none."""
    told = {"US.AAPL": "USD", "HK.00700": "HKD", "HK.80700": "CNY", "SH.600519": "CNY"}
    told |= {"HK.09839": "USD", "HK.09040": "USD", "HK.09439": "USD", "HK.09988": "HKD"}
    told |= {"SH.900901": "USD", "SZ.200012": "HKD", "SZ.201872": "HKD", "SH.204001": "CNY"}
    for code, currency in told.items():
        contract = words.to_contract(code, "N/A")
        assert contract is not None
        assert currency_of(contract.region, contract.ticker) == currency


def account_row(acc_id: int, markets: list[str], **changes: Any) -> dict[str, Any]:
    return {
        "acc_id": acc_id,
        "trd_env": "SIMULATE",
        "acc_type": "MARGIN",
        "acc_status": "ACTIVE",
        "acc_role": "NORMAL",
        "sim_acc_type": "STOCK",
        "trdmarket_auth": markets,
        **changes,
    }


def test_orders_go_to_accounts_for_stocks_only() -> None:
    rows = [
        account_row(1, ["US"], acc_status="DISABLED"),
        account_row(2, ["US"], sim_acc_type="OPTION"),
        account_row(3, ["US"], sim_acc_type="COMPETITION"),
        account_row(4, ["US"], sim_acc_type="STOCK_AND_OPTION"),
        account_row(5, ["CN"]),
        account_row(10, ["HK", "US", "HKCC"], trd_env="REAL", acc_role="MASTER"),
        account_row(6, ["HK", "US", "HKCC"], trd_env="REAL", sim_acc_type="N/A"),
        account_row(7, ["MY"], trd_env="REAL", acc_role="IPO"),
        account_row(8, ["HK", "US"], trd_env="REAL", sim_acc_type="N/A"),
    ]
    paper = words.parse_accounts(rows, "SIMULATE", 0)
    assert [account.acc_id for account in paper] == [4, 5]
    assert [account.serves("CN") for account in paper] == [False, True]
    real = words.parse_accounts(rows, "REAL", 0)
    assert [account.acc_id for account in real] == [6]
    assert real[0].serves("CN") and real[0].serves("HK")
    assert words.parse_accounts(rows, "SIMULATE", 5) == paper[1:]
    assert [account.acc_id for account in words.parse_accounts(rows, "REAL", 8)] == [8]
    assert [account.acc_id for account in words.parse_accounts(rows, "REAL", 10)] == [10]
    assert words.parse_accounts([account_row(9, ["JP"])], "SIMULATE", 0) == []


def test_accounts_stay_as_they_were() -> None:
    rows = [account_row(1, ["HK"]), account_row(2, ["HK", "US"]), account_row(3, ["US", "CN"])]
    before = words.parse_accounts(rows, "SIMULATE", 0)
    assert [account.acc_id for account in before] == [1, 2, 3]
    known = [account.acc_id for account in before]
    assert words.parse_accounts(rows[::-1], "SIMULATE", 0, known) == before
    assert words.parse_accounts(rows * 2, "SIMULATE", 0) == before  # or its holdings would double
    assert (
        words.parse_accounts([account_row(4, ["CN", "US"]), *rows], "SIMULATE", 0, known) == before
    )


us_tickers = st.from_regex(r"[A-Z]{1,5}(\.[A-Z]{1,2})?", fullmatch=True)
hk_tickers = st.integers(1, 99999).map("{:05}".format)
cn_tickers = st.sampled_from(["600519", "688981", "900901", "510300", "113050", "204001"]) | (
    st.sampled_from(["000001", "002594", "300750", "200012", "159915", "123045"])
)
contracts = st.one_of(
    us_tickers.map(lambda ticker: Contract(TradeType.Securities, ticker, "US")),
    hk_tickers.map(lambda ticker: Contract(TradeType.Securities, ticker, "HK")),
    cn_tickers.map(lambda ticker: Contract(TradeType.Securities, ticker, "CN")),
)


@given(contracts)
def test_a_contract_survives_the_way_to_futu_and_back(contract: Contract) -> None:
    assert words.to_contract(words.to_code(contract), "N/A") == contract


@pytest.mark.parametrize("trade_market", ["US", "HK", "HKCC", "CN"])
def test_a_code_without_a_market(trade_market: str) -> None:
    """secMarket is an optional field: the SDK writes `N/A` for it."""
    ticker, region = {
        "US": ("AAPL", "US"),
        "HK": ("00700", "HK"),
        "HKCC": ("600519", "CN"),
        "CN": ("000001", "CN"),
    }[trade_market]
    contract = Contract(TradeType.Securities, ticker, region)
    report = words.parse_order(order_row(code=f"N/A.{ticker}", order_market=trade_market))
    assert report is not None and report.contract == contract


@given(st.text())
def test_any_text_is_a_contract_or_none(code: str) -> None:
    contract = words.to_contract(code, "US")
    assert contract is None or contract.region in ("US", "HK", "CN")


def test_beijing_is_refused_in_words() -> None:
    with pytest.raises(Unsupported, match="Beijing"):
        words.to_code(Contract(TradeType.Securities, "920001", "CN"))


@given(st.floats() | st.just("N/A"))
def test_numbers_are_numbers(value: Any) -> None:
    found = words.known(value)
    assert found == (value if isinstance(value, float) and math.isfinite(value) else 0)
    assert isinstance(found, int) or not found.is_integer()


def test_the_document_has_every_word() -> None:
    text = (Path(__file__).parent.parent / "docs" / "brokers" / "futu.md").read_text("utf-8")
    expected = {one.name for one in fields(words.Arguments)} | set(STATUSES) - {"N/A"}
    expected |= {state for state in words.MARKET_STATES if not state.startswith("STIB")}
    expected |= words.SECURITY_FIRMS - {"N/A"}
    assert {word for word in expected if f"`{word}`" not in text} == set()


@pytest.fixture(scope="module")
def sdk_enum(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    from httptrading.brokers import futu_sdk

    constant = futu_sdk.load("futu", tmp_path_factory.mktemp("home")).common.constant
    return lambda name: list(getattr(constant, name)().load_dic())


def test_a_pushed_fill_without_its_order_is_left_to_the_list() -> None:
    """orderIDEx of a fill is optional: the SDK writes `N/A`, or nothing."""
    row = {"code": "US.AAPL", "deal_market": "US", "status": "OK", "deal_id": "1", "qty": 1.0}
    row |= {"price": 2.0, "create_time": "2026-03-02 09:30:00"}
    assert words.parse_fill(row | {"order_id": "N/A"}) is None
    assert words.parse_fill(row | {"order_id": ""}) is None
    assert words.parse_fill(row | {"order_id": "7"}) is not None


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"port": 70000}, "at most 65535"),
        ({"port": -1}, "whole numbers"),
        ({"port": True}, "whole numbers"),
        ({"port": 11111.5}, "whole numbers"),
        ({"acc_id": 1.5}, "whole numbers"),
        ({"acc_id": "1_000"}, "whole numbers"),
    ],
)
def test_a_number_that_is_none_never_becomes_another(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        words.parse_arguments({"trade_env": "SIMULATE"} | wrong)


def test_numbers_may_be_texts_as_secrets_are() -> None:
    found = words.parse_arguments(
        {"trade_env": "REAL", "port": "12345", "acc_id": " 281756460279912345"}
    )
    assert (found.port, found.acc_id) == (12345, 281756460279912345)
    assert words.parse_arguments({"trade_env": "REAL", "port": "", "acc_id": None}).port == 11111
