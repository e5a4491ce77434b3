"""Contract hours as IB writes them become the right market states."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from httptrading.brokers.trading_hours import (
    REGION_ZONES,
    Hours,
    hours,
    market_status,
    parse_sessions,
    time_zone,
)
from httptrading.model import UnifiedStatus

NEW_YORK = ZoneInfo("America/New_York")

US = hours(
    "SPY@SMART",
    "US",
    "US/Eastern",
    "20261125:0400-20261125:2000;20261126:CLOSED;20261127:0400-20261127:1700;"
    "20261128:CLOSED;20261129:CLOSED;20261130:0400-20261130:2000",
    "20261125:0930-20261125:1600;20261126:CLOSED;20261127:0930-20261127:1300;"
    "20261128:CLOSED;20261129:CLOSED;20261130:0930-20261130:1600",
)
NIGHT = hours(
    "SPY@OVERNIGHT",
    "US",
    "US/Eastern",
    "20261124:2000-20261125:0350;20261126:2000-20261127:0350;20261129:2000-20261130:0350",
    "",
)
# The older spelling, and the zone's name as TWS has it.
HONG_KONG = hours(
    "700@SEHK",
    "HK",
    "Hongkong",
    "20261125:0900-1200,1300-1610;20261126:CLOSED;20261224:0900-1210",
    "20261125:0930-1200,1300-1600;20261126:CLOSED;20261224:0930-1200",
)
CHINA = hours(
    "600519@SEHKNTL",
    "CN",
    "Asia/Shanghai",
    "20261125:0915-20261125:1130;20261125:1300-20261125:1500",
    "20261125:0930-20261125:1130;20261125:1300-20261125:1457",
)


@pytest.mark.parametrize(
    ("local", "state"),
    [
        ("2026-11-25 03:49", "OVERNIGHT"),
        ("2026-11-25 03:50", "CLOSED"),
        ("2026-11-25 04:00", "PRE_HOURS"),
        ("2026-11-25 09:29", "PRE_HOURS"),
        ("2026-11-25 09:30", "RTH"),
        ("2026-11-25 15:59", "RTH"),
        ("2026-11-25 16:00", "AFTER_HOURS"),
        ("2026-11-25 19:59", "AFTER_HOURS"),
        ("2026-11-25 20:00", "CLOSED"),  # Thanksgiving follows: no night session
        ("2026-11-26 12:00", "CLOSED"),
        ("2026-11-26 20:00", "OVERNIGHT"),  # the night before the half day
        ("2026-11-27 12:59", "RTH"),
        ("2026-11-27 13:00", "AFTER_HOURS"),
        ("2026-11-27 17:00", "CLOSED"),
        ("2026-11-28 12:00", "CLOSED"),
        ("2026-11-29 19:59", "CLOSED"),
        ("2026-11-29 20:00", "OVERNIGHT"),
    ],
)
def test_us(local: str, state: str) -> None:
    now = datetime.fromisoformat(local).replace(tzinfo=NEW_YORK).astimezone(UTC)
    assert market_status("US", now, US, NIGHT).unified_status.name == state
    # Where the venue OVERNIGHT is not listed, its documented hours say the same.
    assert market_status("US", now, US).unified_status.name == state


@pytest.mark.parametrize(
    ("local", "state"),
    [
        ("2026-11-25 08:59", "CLOSED"),
        ("2026-11-25 09:00", "UNKNOWN"),  # the opening auction
        ("2026-11-25 09:30", "RTH"),
        ("2026-11-25 12:00", "REST"),
        ("2026-11-25 12:59", "REST"),
        ("2026-11-25 13:00", "RTH"),
        ("2026-11-25 16:00", "CLOSED"),  # the closing auction
        ("2026-11-25 22:00", "CLOSED"),
        ("2026-11-26 10:00", "CLOSED"),
        ("2026-12-24 11:00", "RTH"),
        ("2026-12-24 12:30", "CLOSED"),  # a half day has no afternoon to rest for
    ],
)
def test_hong_kong(local: str, state: str) -> None:
    now = datetime.fromisoformat(local).replace(tzinfo=ZoneInfo("Asia/Hong_Kong"))
    assert market_status("HK", now.astimezone(UTC), HONG_KONG).unified_status.name == state


def test_china_rests_at_noon() -> None:
    noon = datetime(2026, 11, 25, 12, 0, tzinfo=ZoneInfo("Asia/Shanghai"))
    assert market_status("CN", noon, CHINA).unified_status is UnifiedStatus.REST


def test_the_origin_says_which_hours() -> None:
    now = datetime(2026, 11, 25, 10, 0, tzinfo=NEW_YORK)
    status = market_status("US", now, US, NIGHT)
    assert status.origin_status == "SPY@SMART liquidHours 11-25 09:30-16:00 US/Eastern"
    asleep = market_status("US", now + timedelta(days=1), US, NIGHT)
    assert asleep.origin_status == "SPY@SMART closed until 11-27 04:00 US/Eastern"
    assert market_status("CN", now, None).unified_status is UnifiedStatus.UNKNOWN


@pytest.mark.parametrize("name", ["", "EST (Eastern Standard Time)", "No/Where", "../etc/passwd"])
def test_a_zone_that_is_none_is_the_regions(name: str) -> None:
    assert time_zone(name, "US").key == "America/New_York"


@pytest.mark.parametrize("text", ["20261125", "20261125:0930", "x:0930-1600", "20261125:9-16"])
def test_unreadable_hours_are_an_error(text: str) -> None:
    with pytest.raises(ValueError):
        parse_sessions(text, NEW_YORK)


def test_the_overnight_venue_with_the_hours_of_the_day() -> None:
    """They say nothing of the night: the documented hours hold."""
    now = datetime(2026, 11, 27, 3, 0, tzinfo=NEW_YORK)
    same = replace(US, name="SPY@OVERNIGHT")
    assert market_status("US", now, US, same).unified_status is UnifiedStatus.OVERNIGHT


minutes = st.integers(0, 24 * 60 - 1)


@given(st.dates(datetime(2020, 1, 1).date(), datetime(2040, 1, 1).date()), minutes, minutes)
def test_sessions_survive_both_spellings(day: object, first: int, second: int) -> None:
    date = f"{day:%Y%m%d}"
    begin, end = (f"{minute // 60:02}{minute % 60:02}" for minute in (first, second))
    [short] = parse_sessions(f"{date}:{begin}-{end}", UTC_ZONE)
    assert short.begin.strftime("%Y%m%d:%H%M") == f"{date}:{begin}"
    assert timedelta(0) < short.end - short.begin <= timedelta(days=1)
    if first < second:
        assert parse_sessions(f"{date}:{begin}-{date}:{end}", UTC_ZONE) == (short,)


@pytest.mark.parametrize("between", [",", ",20261125:", ";20261125:"])
@pytest.mark.parametrize("until", ["-", "-20261125:"])
def test_two_sessions_of_a_day(between: str, until: str) -> None:
    text = f"20261125:0930{until}1200{between}1300{until}1600;20261126:CLOSED"
    assert [str(each) for each in parse_sessions(text, UTC_ZONE)] == [
        "11-25 09:30-12:00",
        "11-25 13:00-16:00",
    ]


UTC_ZONE = ZoneInfo("UTC")


@given(
    st.sampled_from(sorted(REGION_ZONES)),
    st.datetimes(datetime(2026, 11, 20), datetime(2026, 12, 2), timezones=st.just(UTC)),
)
def test_there_is_always_a_state(region: str, now: datetime) -> None:
    day: Hours = {"US": US, "HK": HONG_KONG, "CN": CHINA}[region]
    status = market_status(region, now, day, NIGHT)
    assert status.region == region and status.origin_status
    if region != "US":
        assert status.unified_status.name in {"RTH", "REST", "CLOSED", "UNKNOWN"}
