"""Tickers in their canonical form, and the Chinese exchange a six-digit code belongs to."""

from __future__ import annotations

import re

from httptrading.model import CURRENCIES

_US = re.compile(r"([A-Z0-9]{1,6})(?:[.\-/ ]([A-Z0-9]{1,4}))?")
_HK = re.compile(r"[0-9]{1,5}")
_CN = re.compile(r"[0-9]{6}")

# Leading digits, most specific first, as the exchanges allot their codes: Beijing (92 since
# 2025-10, 43/83/87/88 before), Shanghai (main board, STAR, B shares, funds, bonds, repos), Shenzhen
# (main board, ChiNext, B shares, funds, bonds). Indices share digits with shares: `000001` is Ping
# An Bank in Shenzhen, never the SSE Composite.
_CN_EXCHANGES = (
    (("92", "43", "83", "87", "88"), "BJ"),
    (("900", "6", "5", "110", "111", "113", "118", "204"), "SH"),
    (("0", "2", "3", "12", "15", "16", "18"), "SZ"),
)

REGIONS = ("US", "HK", "CN")


def cn_exchange(ticker: str) -> str:
    """ "SH" or "SZ" for a six-digit code; ValueError for Beijing's and unknown ones.

    >>> cn_exchange("600519"), cn_exchange("000001")
    ('SH', 'SZ')
    """
    for prefixes, exchange in _CN_EXCHANGES:
        if ticker.startswith(prefixes):
            if exchange == "BJ":
                raise ValueError(f"{ticker} is listed in Beijing, which no broker here trades")
            return exchange
    raise ValueError(f"{ticker} is no known CN code")


# Hong Kong's counters in dollars: exchange traded funds only, under the last three digits of their
# counter in Hong Kong dollars (28xx, 30xx, 31xx, 34xx); other codes with a 9 are shares (09988).
_HK_DOLLARS = re.compile(r"09(?:[01][0-9]|4[0-9]|8[0-4])[0-9]")


def currency_of(region: str, ticker: str) -> str:
    """What a ticker is quoted in: not always its region's currency. Hong Kong's 8xxxx are counters
    in yuan (hkex.com.hk, Stock Code Allocation Plan and Multiple Counter Model for ETFs), B shares
    are in dollars of the one or the other kind.

    >>> [currency_of("HK", code) for code in ("00700", "80700", "09839", "09988")]
    ['HKD', 'CNY', 'USD', 'HKD']
    >>> [currency_of("CN", code) for code in ("600519", "900901", "200012")]
    ['CNY', 'USD', 'HKD']
    """
    if region == "HK" and ticker.startswith("8"):
        return "CNY"
    if region == "HK":
        return "USD" if _HK_DOLLARS.fullmatch(ticker) else "HKD"
    if region == "CN" and ticker.startswith("900"):
        return "USD"
    if region == "CN":
        return "HKD" if ticker.startswith(("200", "201")) else "CNY"
    return CURRENCIES[region]


def canonical_ticker(region: str, text: str) -> str:
    """The one form in which a ticker is stored, compared and shown; ValueError says what is wrong.

    US: upper case, `.` before a share class. HK: five digits. CN: six digits.

    >>> canonical_ticker("US", "brk/b"), canonical_ticker("HK", "700")
    ('BRK.B', '00700')
    """
    text = text.strip()
    if region == "US":
        # upper() makes ASCII letters of others: of "ß" the ticker SS.
        match = _US.fullmatch(text.upper() if text.isascii() else "")
        if match is None:
            raise ValueError("a US ticker has 1 to 6 letters or digits, and .X for a share class")
        return ".".join(part for part in match.groups() if part)
    if region == "HK":
        if _HK.fullmatch(text) is None or not int(text):
            raise ValueError("an HK ticker has 1 to 5 digits, like 700 or 00700")
        return text.zfill(5)
    if region == "CN":
        if _CN.fullmatch(text) is None:
            raise ValueError("a CN ticker has 6 digits, like 600519 or 000001")
        cn_exchange(text)
        return text
    raise ValueError(f"the region must be one of {', '.join(REGIONS)}")
