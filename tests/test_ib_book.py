"""The order book says of an order what TWS said of it, in whatever order the messages come."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from httptrading.brokers.ib_answers import Ticks, balance, execution_time, ledger, refusal
from httptrading.brokers.ib_book import (
    BookedOrder,
    Executions,
    OrderBook,
    region_of,
    to_contract,
    to_symbol,
    to_ticker,
)
from httptrading.errors import RateLimited, Rejected, Unsupported
from httptrading.model import Contract, Fill, Lifecycle, OrderType, TimeInForce, TradeType, exact

UNSET = 1.7976931348623157e308
PERM_ID = 1845203701


def wire_contract(**fields: Any) -> Any:
    known = {
        "symbol": "BRK B",
        "secType": "STK",
        "currency": "USD",
        "exchange": "SMART",
        "primaryExchange": "",
    }
    return SimpleNamespace(**known | fields)


def wire_order(**fields: Any) -> Any:
    known = {
        "clientId": 7,
        "orderId": 3,
        "permId": PERM_ID,
        "account": "U1",
        "orderRef": "mark",
        "totalQuantity": 10.0,
        "filledQuantity": UNSET,
        "action": "BUY",
        "orderType": "LMT",
        "lmtPrice": 12.3,
        "tif": "DAY",
        "outsideRth": False,
    }
    return SimpleNamespace(**known | fields)


def state(status: str, completed: str = "") -> Any:
    return SimpleNamespace(status=status, completedStatus=completed)


def execution(
    number: int, shares: float, price: float, revision: str = "01", *, cumulative: float = 0
) -> Any:
    return SimpleNamespace(
        execId=f"0000e0d5.{number:08d}.01.{revision}",
        clientId=7,
        orderId=3,
        permId=PERM_ID,
        acctNumber="U1",
        orderRef="mark",
        side="BOT",
        shares=shares,
        price=price,
        cumQty=cumulative,
        time=datetime(2026, 11, 22, 15, number % 60, tzinfo=UTC),
    )


def working() -> tuple[OrderBook, BookedOrder]:
    book = OrderBook(7)
    return book, book.open_order(wire_contract(), wire_order(), state("Submitted"))


@pytest.mark.parametrize(
    ("status", "canceled", "pending", "completed"),
    [
        ("ApiPending", False, False, False),
        ("PendingSubmit", False, False, False),
        ("PreSubmitted", False, False, False),
        ("Submitted", False, False, False),
        ("PendingCancel", False, True, False),
        ("ApiCancelled", True, False, True),
        ("Cancelled", True, False, True),
        ("Inactive", False, False, False),  # it may become active again
        ("SomethingNew", False, False, False),
    ],
)
def test_status_words(status: str, canceled: bool, pending: bool, completed: bool) -> None:
    book, _ = working()
    order = book.order_status(3, status, 0, 0, PERM_ID, 7).order()
    assert (order.is_canceled, order.is_pending_cancel, order.is_completed) == (
        canceled,
        pending,
        completed,
    )
    assert order.error_reason == ""


@pytest.mark.parametrize("code", [10349, 399, 404, 2104, 2109, 2176, 10148, 10147, 161, 202, 1100])
def test_an_error_that_is_none_leaves_the_order_working(code: int) -> None:
    book, booked = working()
    book.error(3, code, "alarming words")
    assert not booked.order().is_completed
    book.order_status(3, "Submitted", 4, 12.25, PERM_ID, 7)
    order = booked.order()
    assert (order.filled_qty, order.avg_price, order.is_completed) == (4, Decimal("12.25"), False)
    book = OrderBook(7)
    booked = book.open_order(wire_contract(), wire_order(), state("PendingSubmit"))
    book.error(3, code, "alarming words")  # nor does it make a refusal of the cancel that follows
    assert not booked.is_doubtful
    order = book.order_status(3, "Cancelled", 0, 0, PERM_ID, 7).order()
    assert (order.is_canceled, order.error_reason) == (True, "")


def test_201_is_the_end_of_what_does_not_work() -> None:
    for words in (["Inactive"], ["Inactive", "Cancelled"], ["PendingCancel"], []):
        book = OrderBook(7)
        booked = book.open_order(wire_contract(), wire_order(), state("PendingSubmit"))
        for status in words:
            book.order_status(3, status, 0, 0, PERM_ID, 7)
        book.error(3, 201, "Order rejected - reason: no margin")
        order = booked.order()
        assert order.error_reason == "Order rejected - reason: no margin"
        assert (order.is_canceled, order.is_completed) == (False, True)
        assert booked.is_refused
        book.execution(wire_contract(), execution(1, 4, 12.3))
        assert not booked.is_refused  # something came of it


@pytest.mark.parametrize("status", ["Inactive", "Cancelled"])
@pytest.mark.parametrize("asked", [[], ["PendingCancel"]])
def test_201_about_a_working_order_is_a_doubt(asked: list[str], status: str) -> None:
    """A status or TWS's lists settle it."""
    book, booked = working()
    for word in asked:
        book.order_status(3, word, 0, 0, PERM_ID, 7)
    book.error(3, 201, "Order rejected - reason: the change")
    assert booked.is_doubtful and not booked.is_final
    book.order_status(3, "Submitted", 0, 0, PERM_ID, 7)
    assert not booked.is_doubtful
    book.error(3, 201, "Order rejected - reason: no margin")
    book.order_status(3, status, 0, 0, PERM_ID, 7)
    assert booked.error_reason == "Order rejected - reason: no margin"


@pytest.mark.parametrize("status", ["Inactive", "Cancelled"])
@pytest.mark.parametrize("code", [201, 110])
def test_an_error_may_come_before_its_order(code: int, status: str) -> None:
    book = OrderBook(7)
    assert book.error(3, code, "no margin") is None
    others = book.open_order(wire_contract(), wire_order(clientId=8, permId=1), state(status))
    assert others.error_reason == ""
    booked = book.open_order(wire_contract(), wire_order(), state(status))
    assert booked.error_reason == "no margin" and booked.is_refused


def test_an_unknown_error_counts_only_with_a_dead_status() -> None:
    book = OrderBook(7)
    booked = book.open_order(wire_contract(), wire_order(), state("PendingSubmit"))
    book.error(3, 10311, "This order will be directly routed")
    assert booked.is_doubtful and not booked.order().is_completed
    book.order_status(3, "Cancelled", 0, 0, PERM_ID, 7)
    assert booked.order().error_reason == "This order will be directly routed"
    assert not booked.is_doubtful
    book, booked = working()  # of one that works it is a remark
    book.error(3, 10311, "This order will be directly routed")
    book.order_status(3, "Cancelled", 0, 0, PERM_ID, 7)
    assert (booked.order().is_canceled, booked.order().error_reason) == (True, "")


@pytest.mark.parametrize("code", [10311, 110, 201])
@pytest.mark.parametrize("working_word", ["PreSubmitted", "Submitted"])
def test_an_order_that_works_after_an_error_was_not_refused(code: int, working_word: str) -> None:
    """Whoever cancels it later has cancelled it."""
    book = OrderBook(7)
    booked = book.open_order(wire_contract(), wire_order(), state("PendingSubmit"))
    book.error(3, code, "words")
    book.order_status(3, working_word, 0, 0, PERM_ID, 7)
    assert not booked.order().is_completed
    book.order_status(3, "Cancelled", 0, 0, PERM_ID, 7)
    order = booked.order()
    assert (order.is_canceled, order.error_reason) == (True, "")


def test_a_late_repetition_does_not_revive() -> None:
    book, booked = working()
    book.order_status(3, "Filled", 10, 12.25, PERM_ID, 7)
    book.order_status(3, "Submitted", 4, 12.5, PERM_ID, 7)
    order = booked.order()
    assert (order.is_filled, order.filled_qty, order.avg_price) == (True, 10, Decimal("12.25"))


def test_a_filled_order_of_the_completed_list() -> None:
    """Its total is 0; its average is known from today's executions only."""
    book = OrderBook(7)
    told = wire_order(totalQuantity=0.0, filledQuantity=10.0, clientId=0, orderId=0)
    booked = book.completed_order(wire_contract(), told, state("Filled", "Filled Size: 10"))
    assert (booked.order().qty, booked.order().is_filled, booked.order().avg_price) == (10, True, 0)
    book.execution(wire_contract(), execution(1, 6, 12.3))
    book.execution(wire_contract(), execution(2, 4, 12.25))
    assert booked.order().avg_price == Decimal("12.28")


def test_an_average_of_a_part_is_not_that_of_all() -> None:
    """Neither what was said with the first part, nor the executions of today alone."""
    book, booked = working()
    book.order_status(3, "Submitted", 4, 12.0, PERM_ID, 7)
    told = wire_order(totalQuantity=0.0, filledQuantity=10.0, clientId=0, orderId=0)
    book.completed_order(wire_contract(), told, state("Filled", "Filled Size: 10"))
    assert (booked.order().filled_qty, booked.order().avg_price) == (10, 0)
    book.execution(wire_contract(), execution(1, 6, 13.0))
    assert booked.order().avg_price == 0
    book.execution(wire_contract(), execution(2, 4, 12.0))
    assert booked.order().avg_price == Decimal("12.6")


def test_executions_go_on_from_an_earlier_day() -> None:
    """Its executions are not listed any more, and a fill need not have an orderStatus."""
    book, booked = working()
    book.order_status(3, "Submitted", 4, 12.0, PERM_ID, 7)
    book.execution(wire_contract(), execution(2, 5, 13.0, cumulative=9))
    assert (booked.order().filled_qty, booked.order().avg_price) == (9, Decimal(113) / 9)
    book.execution(wire_contract(), execution(3, 1, 13.0, cumulative=10))
    order = booked.order()
    assert (order.is_filled, order.filled_qty, order.avg_price) == (True, 10, Decimal("12.6"))


def test_executions_may_come_before_their_order_and_be_corrected() -> None:
    book = OrderBook(7)
    early, _ = book.execution(wire_contract(), execution(1, 6, 12.3))
    booked = book.open_order(wire_contract(), wire_order(), state("Submitted"))
    book.execution(wire_contract(), execution(1, 6, 12.2, revision="02"))
    _, again = book.execution(wire_contract(), execution(1, 6, 12.3))  # the superseded one
    assert again is None
    order = booked.order()
    assert early is booked
    assert (order.qty, order.filled_qty, order.avg_price) == (10, 6, Decimal("12.2"))
    [fill] = book.fills(PERM_ID)
    assert fill.fill_id == "0000e0d5.00000001.01"  # the same, corrected or not
    assert (fill.qty, fill.price, fill.order_id) == (6, Decimal("12.2"), str(PERM_ID))


@pytest.mark.parametrize("odd", [math.nan, 1.7976931348623157e308])
def test_an_order_without_a_price_is_told_without_one(odd: float) -> None:
    """As a NaN it would cost all orders of the list (checked.py)."""
    book = OrderBook(7)
    booked = book.open_order(wire_contract(), wire_order(lmtPrice=odd), state("Submitted"))
    assert (booked.report().price, booked.report().order.qty) == (None, 10)


@pytest.mark.parametrize("odd", [math.nan, math.inf, 1.7976931348623157e308])
def test_an_execution_without_numbers_does_not_stay(odd: float) -> None:
    """Neither in the sums, from which nothing would take a NaN out again."""
    book = OrderBook(7)
    for shares, price in ((odd, 12.3), (6, odd)):
        with pytest.raises(ValueError, match="without"):
            book.execution(wire_contract(), execution(1, shares, price))
    booked, fill = book.execution(wire_contract(), execution(1, 6, 12.3))
    assert fill is not None and fill.qty == 6
    assert (booked.filled_qty, booked.avg_price) == (6, Decimal("12.3"))


def test_an_order_known_by_its_executions_only() -> None:
    """How much was asked for is not known, so it is not completed; the journal knows."""
    book = OrderBook(7)
    booked, fill = book.execution(wire_contract(), execution(1, 6, 12.3))
    report = booked.report()
    assert (report.mark, report.direction, report.order.order_id) == ("mark", "BUY", str(PERM_ID))
    assert report.contract == Contract(TradeType.Securities, "BRK.B", "US")
    assert (report.order.qty, report.order.filled_qty, report.order.is_completed) == (0, 6, False)
    assert (booked.is_described, fill.order_id, booked.account) == (True, str(PERM_ID), "U1")
    assert book.order_status(3, "Filled", 6, 12.3, PERM_ID, 7).order().is_filled


def test_a_part_of_an_order_for_an_amount_of_money() -> None:
    """Made by hand, as TWS lets one: a part of it is not all of it."""
    book = OrderBook(7)
    told = wire_order(clientId=0, orderId=0, totalQuantity=0.0)
    booked = book.open_order(wire_contract(), told, state("Submitted"))
    book.order_status(0, "Submitted", 1.5, 200.0, PERM_ID, 0)
    order = booked.order()
    assert (order.qty, order.filled_qty, order.is_completed) == (0, Decimal("1.5"), False)
    order = book.order_status(0, "Filled", 2.5, 200.0, PERM_ID, 0).order()
    assert (order.qty, order.filled_qty, order.is_filled) == (Decimal("2.5"), Decimal("2.5"), True)
    cancelled = OrderBook(7).completed_order(
        wire_contract(),
        wire_order(clientId=0, orderId=0, totalQuantity=0.0, filledQuantity=1.5),
        state("Cancelled", "Cancelled by Trader"),
    )
    assert (cancelled.order().is_canceled, cancelled.order().is_filled) == (True, False)


def test_a_number_given_anew_is_another_order() -> None:
    """What was said under it before is not about the order sent now."""
    book, earlier = working()
    later = book.open_order(wire_contract(), wire_order(permId=5), state("Submitted"))
    assert later is not earlier and book.own(3) is later
    book.sending(3, "another mark")
    assert book.own(3) is None
    assert book.error(3, 201, "of the earlier order") is None
    book.sending(3, "a third mark")
    anew = book.open_order(wire_contract(), wire_order(permId=6), state("Inactive"))
    assert anew is not later and anew.error_reason == ""
    assert (earlier.perm_id, later.perm_id) == (PERM_ID, 5)


def test_an_execution_of_an_order_with_the_same_api_id() -> None:
    """TWS may number anew: what was filled today under a number is not the order just sent."""
    book = OrderBook(7)
    earlier, _ = book.execution(wire_contract(), execution(1, 6, 12.3))
    book.sending(3, "another mark")
    book.execution(wire_contract(), execution(2, 4, 12.3))
    assert book.own(3) is None and earlier.filled_qty == 10
    booked = book.open_order(
        wire_contract(), wire_order(permId=5, orderRef="another mark"), state("Submitted")
    )
    assert book.own(3) is booked is not earlier
    book.sending(4, "mark")
    told = execution(3, 10, 12.3)
    told.orderId, told.permId = 4, 6
    quick, _ = book.execution(wire_contract(), told)
    assert book.own(4) is quick and quick.perm_id == 6


def test_an_execution_that_comes_before_the_permanent_id() -> None:
    book = OrderBook(7)
    book.sending(3, "mark")
    told = execution(1, 6, 12.3)
    told.permId = 0
    early, _ = book.execution(wire_contract(), told)
    assert early.order().order_id == "" and book.own(3) is early
    assert book.open_order(wire_contract(), wire_order(), state("Submitted")) is early
    assert [fill.order_id for fill in book.fills(PERM_ID)] == [str(PERM_ID)]


def test_partly_filled_and_cancelled() -> None:
    book, booked = working()
    book.order_status(3, "Cancelled", 4, 12.25, PERM_ID, 7)
    order = booked.order()
    assert (order.is_canceled, order.filled_qty, order.is_filled) == (True, 4, False)


def test_a_rejection_listed_as_completed() -> None:
    book = OrderBook(7)
    booked = book.completed_order(
        wire_contract(), wire_order(), state("Inactive", "Order rejected - reason:no margin")
    )
    assert booked.order().error_reason == "Order rejected - reason:no margin"


@pytest.mark.parametrize(
    ("words", "reason"), [("Expired by TWS", "Expired by TWS"), ("", "Inactive")]
)
def test_an_inactive_order_that_is_completed_is_over(words: str, reason: str) -> None:
    told = OrderBook(7).completed_order(wire_contract(), wire_order(), state("Inactive", words))
    order = told.order()
    assert (order.error_reason, order.qty, order.is_completed) == (reason, 10, True)


def test_the_perm_id_joins_what_was_said_before_it() -> None:
    book = OrderBook(7)
    assert book.own(3) is None
    early = book.order_status(3, "PendingSubmit", 0, 0, 0, 7)
    assert book.own(3) is early and not early.perm_id
    booked = book.open_order(wire_contract(), wire_order(), state("Submitted"))
    assert book.own(3) is early is booked is book.get(PERM_ID)
    assert book.order_status(3, "Submitted", 4, 12.25, 0, 7) is booked  # and once more without


def test_orders_made_by_hand_have_numbers_at_client_0_alone() -> None:
    book = OrderBook(0)
    by_hand = book.order_status(-2, "Submitted", 0, 0, PERM_ID, 0)
    assert book.own(-2) is by_hand
    book = OrderBook(7)
    one, two = (book.order_status(0, "Submitted", 0, 0, perm_id, 7) for perm_id in (1, 2))
    assert one is not two and book.own(0) is None


def test_a_report_says_what_was_asked_for() -> None:
    _, booked = working()
    report = booked.report()
    assert report.contract == Contract(TradeType.Securities, "BRK.B", "US")
    assert (report.mark, report.direction, report.price) == ("mark", "BUY", Decimal("12.3"))
    assert (report.order_type, report.time_in_force) == (OrderType.Limit, TimeInForce.DAY)
    assert report.lifecycle is Lifecycle.RTH
    night = OrderBook(7).open_order(
        wire_contract(exchange="OVERNIGHT"), wire_order(), state("Submitted")
    )
    assert night.report().lifecycle is Lifecycle.OVERNIGHT
    late = OrderBook(7).open_order(
        wire_contract(), wire_order(outsideRth=True, orderType="MKT", tif="IOC"), state("Submitted")
    )
    assert late.report().lifecycle is Lifecycle.ETH
    assert (late.report().price, late.report().time_in_force) == (None, None)


messages = st.lists(
    st.tuples(
        st.sampled_from(["PreSubmitted", "Submitted", "Inactive", "PendingCancel", "Filled"]),
        st.integers(0, 10),
        st.sampled_from([0, 0, 0, 201, 202, 399, 10349, 10311]),
    ),
    max_size=12,
)


@given(messages)
def test_filled_never_goes_back_and_the_end_is_one_thing(told: list[tuple[str, int, int]]) -> None:
    book, booked = working()
    before = Decimal(0)
    for status, shares, code in told:
        filled = 10 if status == "Filled" else shares
        book.order_status(3, status, filled, 12.25, PERM_ID, 7)
        if code:
            book.error(3, code, f"error {code}")
        order = booked.order()
        assert order.filled_qty >= before
        before = exact(order.filled_qty)
        assert [order.is_filled, order.is_canceled, bool(order.error_reason)].count(True) <= 1
        assert order.is_completed or booked.is_doubtful or code != 201


# --- symbols, numbers, errors -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("region", "ticker", "symbol"),
    [
        ("US", "AAPL", "AAPL"),
        ("US", "BRK.B", "BRK B"),
        ("HK", "00700", "700"),
        ("HK", "00005", "5"),
        ("HK", "80700", "80700"),
        ("CN", "600519", "600519"),
        ("CN", "000001", "000001"),
    ],
)
def test_symbols(region: str, ticker: str, symbol: str) -> None:
    assert to_symbol(region, ticker) == symbol
    assert to_ticker(region, symbol) == ticker


@given(st.integers(1, 99999))
def test_hong_kong_symbols_go_round(number: int) -> None:
    ticker = f"{number:05}"
    assert to_ticker("HK", to_symbol("HK", ticker)) == ticker


@pytest.mark.parametrize(
    ("currency", "exchanges", "region"),
    [
        ("USD", ("NASDAQ", "SMART"), "US"),
        ("HKD", ("SEHK",), "HK"),
        ("CNH", ("SEHK",), "HK"),  # an RMB counter
        ("CNH", ("SEHKNTL",), "CN"),
        ("CNH", ("", ""), "CN"),
        ("EUR", ("IBIS",), None),
    ],
)
def test_regions(currency: str, exchanges: tuple[str, ...], region: str | None) -> None:
    assert region_of(currency, *exchanges) == region


def test_other_securities_have_no_unified_contract() -> None:
    assert to_contract(wire_contract(secType="OPT")) is None
    assert to_contract(wire_contract(currency="EUR")) is None


@given(st.decimals(-(10**9), 10**9, places=4))
def test_floats_are_read_exactly(number: Decimal) -> None:
    assert exact(float(number)) == number


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("20231214-20:57:37", "2023-12-14T20:57:37+00:00"),  # UTC, whatever the machine's zone
        ("20231214 20:57:37 US/Eastern", "2023-12-14T20:57:37-05:00"),
        ("20231214  20:57:37", "2023-12-14T20:57:37+08:00"),
        ("20231214 20:57:37", "2023-12-14T20:57:37+08:00"),
        ("20231214 20:57:37 CST", "2023-12-14T20:57:37+08:00"),
        ("20231214 20:57:37 China Standard Time", "2023-12-14T20:57:37+08:00"),
    ],
)
def test_times_of_executions(text: str, moment: str) -> None:
    seconds = execution_time(text, ZoneInfo("Asia/Shanghai"))
    assert int(seconds) == datetime.fromisoformat(moment).timestamp()


def test_a_time_in_another_spelling_is_left_to_the_sdk() -> None:
    assert execution_time("1702587457", None) == "1702587457"


def test_ledger_in_both_spellings() -> None:
    rows = [
        SimpleNamespace(account="U1", tag="CashBalance", value="10.50", currency="USD"),
        SimpleNamespace(account="U1", tag="$LEDGER-CashBalance", value="-3", currency="HKD"),
        SimpleNamespace(account="U1", tag="CashBalance", value="99", currency="BASE"),
        SimpleNamespace(account="U2", tag="CashBalance", value="7", currency="EUR"),
        SimpleNamespace(account="U1", tag="ExchangeRate", value="1.0", currency="CHF"),
    ]
    assert ledger(rows, "U1") == {"USD": "10.50", "HKD": "-3", "BASE": "99"}


def test_balances() -> None:
    known = {"USD": "10.50", "HKD": "", "EUR": "1,234.50", "CHF": "NaN", "BASE": "99"}
    known["SEK"] = "1.7976931348623157E308"  # unset
    assert balance("USD", known) == Decimal("10.50")
    assert balance("JPY", known) == 0
    for currency in ("HKD", "EUR", "CHF", "SEK"):
        with pytest.raises(Rejected, match=f"no amount of {currency}"):
            balance(currency, known)
    with pytest.raises(Rejected, match="total of 99"):
        balance("USD", {"BASE": "99"})


@pytest.mark.parametrize(
    ("code", "kind"),
    [(201, Rejected), (10197, Rejected), (354, Unsupported), (10089, Unsupported)],
)
def test_refusals_keep_the_brokers_words(code: int, kind: type[Exception]) -> None:
    error = refusal(code, "its own words")
    assert type(error) is kind
    assert "its own words" in str(error) and str(code) in str(error)
    assert isinstance(refusal(100, "too fast"), RateLimited)


APPLE = Contract(TradeType.Securities, "AAPL", "US")
NOW = datetime(2026, 11, 22, 15, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("last", "high", "low", "close", "open_", "time", "halted"),
    [(4, 6, 7, 9, 14, 45, 49), (68, 72, 73, 75, 76, 88, 90)],
    ids=["live", "delayed"],
)
def test_ticks(
    last: int, high: int, low: int, close: int, open_: int, time: int, halted: int
) -> None:
    ticks = Ticks()
    ticks.kind(1 if last == 4 else 3)
    ticks.price(1, 5.0)  # the bid is not the price
    for tick, price in ((last, 101.5), (high, 102), (low, 99), (close, 100), (open_, -1)):
        ticks.price(tick, price)
    ticks.string(time, "1779999999")
    assert not ticks.is_complete
    quote = ticks.quote(APPLE, "USD", NOW)
    assert (quote.latest, quote.open_price, quote.pre_close) == (Decimal("101.5"), 0, 100)
    assert quote.time == datetime.fromtimestamp(1779999999, UTC)
    assert quote.is_tradable
    ticks.price(open_, 100.5)
    ticks.number(halted, 2)
    assert ticks.is_complete
    assert not ticks.quote(APPLE, "USD", NOW).is_tradable
    ticks.time = None
    assert not ticks.is_complete  # its time may follow


def test_a_quote_without_price_or_time_is_refused() -> None:
    ticks = Ticks()
    for price in (-1.0, 0.0, float("nan"), UNSET):
        ticks.price(4, price)
    with pytest.raises(Rejected, match="no price"):
        ticks.quote(APPLE, "USD", NOW)
    ticks.price(4, 10.0)
    assert ticks.quote(APPLE, "USD", NOW).time == NOW  # live: it was made just now
    ticks.kind(3)
    with pytest.raises(Rejected, match="no time"):
        ticks.quote(APPLE, "USD", NOW)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9)), max_size=12))
def test_sums_of_executions(told: list[tuple[int, int, int]]) -> None:
    """In any order and repeated: each execution counts once, with its highest revision."""
    executions, newest = Executions(), dict[int, tuple[int, int]]()
    now = datetime.now(UTC)
    for number, revision, qty in told:
        executions.add(
            f"x.{number}.0{revision}",
            Fill(f"x.{number}", "1", Decimal(qty), Decimal("0.1") * revision, now),
            Decimal(qty),
        )
        if revision >= newest.get(number, (0, 0))[0]:
            newest[number] = revision, qty
    assert executions.shares == sum(qty for _, qty in newest.values())
    assert executions.paid == sum(
        qty * Decimal("0.1") * revision for revision, qty in newest.values()
    )
    assert executions.cumulative == max((qty for _, qty in newest.values()), default=0)
    assert len(executions.in_order()) == len(newest)
