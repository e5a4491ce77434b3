"""The state of LongBridge's markets, from LongPort's own codes or from sessions and open days."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from datetime import time as clock
from typing import Any

from httptrading.model import MarketStatus, UnifiedStatus

MARKET_CODES: Mapping[int, tuple[str, UnifiedStatus]] = {
    101: ("CLEAN", UnifiedStatus.UNKNOWN),
    102: ("OPEN_BID", UnifiedStatus.UNKNOWN),
    103: ("MORNING_CLOSING", UnifiedStatus.REST),
    105: ("TRADING", UnifiedStatus.RTH),
    106: ("NOON_CLOSING", UnifiedStatus.REST),
    107: ("CLOSE_BID", UnifiedStatus.RTH),
    108: ("CLOSING", UnifiedStatus.CLOSED),
    120: ("AFTER_FIX", UnifiedStatus.AFTER_HOURS),
    121: ("HALF_CLOSING", UnifiedStatus.CLOSED),
    122: ("NOT_OPENED", UnifiedStatus.UNKNOWN),
    123: ("REALTIME_QUOTE", UnifiedStatus.REST),
    201: ("US_PREV", UnifiedStatus.PRE_HOURS),
    202: ("US_TRADING", UnifiedStatus.RTH),
    203: ("US_AFTER", UnifiedStatus.AFTER_HOURS),
    204: ("US_CLOSING", UnifiedStatus.CLOSED),
    205: ("US_STOP", UnifiedStatus.CLOSED),
    206: ("US_CLEAN", UnifiedStatus.PRE_HOURS),
    207: ("US_NIGHT", UnifiedStatus.OVERNIGHT),
    209: ("US_PREV_MARKET_CLEAN", UnifiedStatus.CLOSED),
    210: ("US_AFTER_MARKET_CLEAN", UnifiedStatus.RTH),
}
"""Clearing goes on beside trading: 206 is shown as Pre-Market, 209 as Closed, 210 as Trading
(longbridge/openapi 4.3.3, rust/src/market/types.rs, TradeStatus)."""

SESSIONS = {
    "Intraday": UnifiedStatus.RTH,
    "Pre": UnifiedStatus.PRE_HOURS,
    "Post": UnifiedStatus.AFTER_HOURS,
    "Overnight": UnifiedStatus.OVERNIGHT,
}
ZONES = {"US": "America/New_York", "HK": "Asia/Hong_Kong", "CN": "Asia/Shanghai"}
HALF_DAY_ENDS = {"US": clock(13), "HK": clock(12)}
POST_HOURS_ON_HALF_DAYS = clock(17)


@dataclass(frozen=True)
class Calendar:
    """One market's open days (half days included) and half days, from `first` up to `last`."""

    first: date
    last: date
    open_days: frozenset[date]
    half_days: frozenset[date]


Period = tuple[clock, clock, str]


def parse_market_codes(data: Mapping[str, Any]) -> dict[str, MarketStatus]:
    """Region → state, from the answer of /v1/quote/market-status."""
    found = {}
    for row in data.get("market_time") or ():
        region, code = str(row["market"]), row.get("trade_status")
        if region not in ZONES or not isinstance(code, int):
            continue
        name, unified = MARKET_CODES.get(code, (str(code), UnifiedStatus.UNKNOWN))
        if code == 107 and region == "HK":  # its closing auction is after the regular hours
            unified = UnifiedStatus.CLOSED
        found[region] = MarketStatus(region, name, unified)
    return found


def session_state(
    region: str, now: datetime, periods: Sequence[Period], calendar: Calendar
) -> MarketStatus:
    """The state at `now` (market-local time) by the day's trading sessions and the open days."""
    today, moment = now.date(), now.time()
    half = today in calendar.half_days
    regular = []
    for begin, end, kind in periods:
        day = today
        if kind == "Intraday":
            if region == "CN" and end == clock(14, 57):
                end = clock(15)  # LongPort leaves the closing auction out
            end = min(end, HALF_DAY_ENDS.get(region, end)) if half else end
            if end <= begin:  # the afternoon of a half day, not a night
                continue
            regular.append((begin, end))
        elif kind == "Post" and half and region == "US":
            begin, end = HALF_DAY_ENDS[region], POST_HOURS_ON_HALF_DAYS
        if kind == "Overnight" and moment >= begin >= clock(12):  # until midnight, or beyond
            day = today + timedelta(days=1)  # the night belongs to the day it leads to
            inside = True
        else:
            inside = moment < end and (end <= begin or begin <= moment)
        if inside and day in calendar.open_days:
            return MarketStatus(region, kind, SESSIONS.get(kind, UnifiedStatus.UNKNOWN))
    if today in calendar.open_days and regular:
        if moment < min(begin for begin, _ in regular):
            return MarketStatus(region, "BeforeOpen", UnifiedStatus.UNKNOWN)
        if moment < max(end for _, end in regular):
            return MarketStatus(region, "Break", UnifiedStatus.REST)
    return MarketStatus(region, "Closed", UnifiedStatus.CLOSED)
