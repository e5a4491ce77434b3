"""Tickers: one canonical form, whatever is typed, and the exchange a CN code belongs to."""

from __future__ import annotations

import doctest
import string
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from httptrading import model, tickers
from httptrading.brokers import journal_rows
from httptrading.tickers import REGIONS, canonical_ticker, cn_exchange

ROOTS = st.text(string.ascii_uppercase + string.digits, min_size=1, max_size=6)
CLASSES = st.text(string.ascii_uppercase, min_size=1, max_size=4)


@pytest.mark.parametrize("module", [tickers, model, journal_rows])
def test_the_examples_in_the_docstrings(module: ModuleType) -> None:
    told = doctest.testmod(module)
    assert told.attempted and not told.failed


@given(ROOTS, CLASSES, st.sampled_from(["-", "/", " ", "."]), st.booleans())
def test_us_share_classes_have_one_form(root: str, share: str, sign: str, lower: bool) -> None:
    typed = f"{root}{sign}{share}"
    assert canonical_ticker("US", typed.lower() if lower else typed) == f"{root}.{share}"
    assert canonical_ticker("US", f" {root.lower()} ") == root


@given(st.integers(1, 99999), st.integers(1, 5))
def test_hk_codes_are_five_digits(code: int, width: int) -> None:
    typed = str(code).zfill(width)
    assert canonical_ticker("HK", typed) == f"{code:05}"


@given(st.text(string.digits, min_size=6, max_size=6))
def test_a_cn_code_is_kept_or_refused(code: str) -> None:
    try:
        exchange = cn_exchange(code)
    except ValueError as error:
        assert code in str(error)
        with pytest.raises(ValueError, match=code):
            canonical_ticker("CN", code)
        return
    assert exchange in ("SH", "SZ")
    assert canonical_ticker("CN", code) == code


@given(st.sampled_from(REGIONS), st.text(max_size=12))
def test_any_text_is_canonical_or_refused(region: str, text: str) -> None:
    try:
        found = canonical_ticker(region, text)
    except ValueError:
        return
    assert found.isascii() and found == found.strip().upper()
    assert canonical_ticker(region, found) == found  # once is enough
    assert all(one in string.ascii_uppercase + string.digits + "." for one in found)


@pytest.mark.parametrize(
    ("code", "exchange"),
    [
        ("600519", "SH"),  # main board
        ("688981", "SH"),  # STAR
        ("900901", "SH"),  # B share
        ("510300", "SH"),  # fund
        ("113050", "SH"),  # convertible bond
        ("204001", "SH"),  # repo
        ("000001", "SZ"),  # Ping An Bank, never the index
        ("300750", "SZ"),  # ChiNext
        ("200002", "SZ"),  # B share
        ("159915", "SZ"),  # fund
        ("128136", "SZ"),  # convertible bond
    ],
)
def test_exchanges_of_cn_codes(code: str, exchange: str) -> None:
    assert cn_exchange(code) == exchange


@pytest.mark.parametrize("code", ["830799", "430047", "871981", "889001", "920002"])
def test_beijing_is_named(code: str) -> None:
    with pytest.raises(ValueError, match="Beijing"):
        canonical_ticker("CN", code)


@pytest.mark.parametrize(
    ("region", "text"),
    [
        ("US", ""),
        ("US", "."),
        ("US", "A.B.C"),
        ("US", "TOOLONG"),
        ("US", "AAPL\n\nX"),
        ("US", "ＡＡＰＬ"),
        ("US", "ß"),
        ("US", "ﬁ"),
        ("US", "ı"),
        ("HK", "0"),
        ("HK", "00000"),
        ("HK", "123456"),
        ("HK", "٧٠٠"),
        ("HK", "700.HK"),
        ("CN", "60051"),
        ("CN", "6005190"),
        ("CN", "sh600519"),
        ("CN", "700000"),
        ("JP", "7203"),
        ("", "AAPL"),
    ],
)
def test_what_is_no_ticker(region: str, text: str) -> None:
    with pytest.raises(ValueError, match="ticker|code|region"):
        canonical_ticker(region, text)
