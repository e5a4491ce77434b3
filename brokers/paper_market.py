"""What the paper exchange trades on: made-up prices, price steps and trading hours. All pure.

Times are Unix seconds, prices `Decimal`. Nothing here needs a time zone database: Hong Kong and
China have had no summer time since 1979 and 1991, and New York follows the rule of 2007 (second
Sunday of March to first Sunday of November, at 2 a.m. local time). Holidays are not known.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from functools import lru_cache
from typing import Protocol

from httptrading.model import Lifecycle, UnifiedStatus

REGIONS = ("US", "HK", "CN")

BASE_PRICES = {
    ("US", "AAPL"): 228.0,
    ("US", "AMZN"): 205.0,
    ("US", "BRK.B"): 470.0,
    ("US", "GOOG"): 178.0,
    ("US", "META"): 590.0,
    ("US", "MSFT"): 425.0,
    ("US", "NVDA"): 135.0,
    ("US", "QQQ"): 500.0,
    ("US", "SPY"): 590.0,
    ("US", "TSLA"): 260.0,
    ("HK", "00005"): 72.0,
    ("HK", "00700"): 405.0,
    ("HK", "00939"): 6.1,
    ("HK", "01810"): 28.0,
    ("HK", "02318"): 45.0,
    ("HK", "03690"): 165.0,
    ("HK", "09988"): 88.0,
    ("CN", "000001"): 11.5,
    ("CN", "000858"): 148.0,
    ("CN", "300750"): 245.0,
    ("CN", "510300"): 3.95,
    ("CN", "600036"): 36.0,
    ("CN", "600519"): 1530.0,
}
"""Around which the prices of well-known tickers wander; others get a level from their name."""

HK_STEPS = (
    ("0.25", "0.001"),
    ("10", "0.005"),
    ("20", "0.01"),
    ("50", "0.02"),
    ("100", "0.05"),
    ("200", "0.1"),
    ("500", "0.2"),
    ("1000", "0.5"),
    ("2000", "1"),
    ("5000", "2"),
)
"""Below this price, this step: HKEX spread table part A after both phases of its reduction."""

WAVES = (
    (20 * 86400.0, 0.12),
    (86400.0, 0.02),
    (3600.0, 0.006),
    (300.0, 0.0025),
    (30.0, 0.001),
    (5.0, 0.0004),
)
"""Length in seconds and height (natural log) of the waves that add up to a price's path."""

SPREAD = Decimal("0.0001")  # bid and ask are this part of the price away from the latest
SLICE = 1.0  # seconds for which one offer of the book stands


def price_step(region: str, ticker: str, price: Decimal) -> Decimal:
    """The step of valid prices at this price ("tick")."""
    if region == "US":
        return Decimal("0.01") if price >= 1 else Decimal("0.0001")
    if region == "HK":
        for below, step in HK_STEPS:
            if price < Decimal(below):
                return Decimal(step)
        return Decimal("5")
    # Funds (SSE 5xxxxx, SZSE 15/16/18xxxx) are priced in thousandths, shares in hundredths.
    return (
        Decimal("0.001")
        if ticker[:1] == "5" or ticker[:2] in ("15", "16", "18")
        else Decimal("0.01")
    )


def on_step(region: str, ticker: str, price: Decimal, rounding: str = ROUND_HALF_EVEN) -> Decimal:
    step = price_step(region, ticker, price)
    return max(step, (price / step).to_integral_value(rounding) * step)


@lru_cache(maxsize=65536)
def _dice(*names: object) -> float:
    """A number in [0, 1) that is always the same for the same names."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _path(region: str, ticker: str, epoch: float) -> float:
    total = 0.0
    for length, height in WAVES:
        number, part = divmod(epoch / length, 1.0)
        left = _dice(region, ticker, length, int(number)) * 2 - 1
        right = _dice(region, ticker, length, int(number) + 1) * 2 - 1
        total += height * (left + (right - left) * part * part * (3 - 2 * part))
    return total


def made_up_price(region: str, ticker: str, epoch: float) -> Decimal:
    """The latest price at a moment: the same on every machine and after every restart."""
    base = BASE_PRICES.get((region, ticker)) or math.exp(1 + 4 * _dice(region, ticker, "base"))
    return on_step(region, ticker, Decimal(repr(base * math.exp(_path(region, ticker, epoch)))))


def book_side(region: str, ticker: str, direction: str, latest: Decimal) -> Decimal:
    """The price at which a buyer (the ask) or a seller (the bid) is served at once."""
    if direction == "BUY":
        return on_step(region, ticker, latest * (1 + SPREAD), ROUND_CEILING)
    return on_step(region, ticker, latest * (1 - SPREAD), ROUND_FLOOR)


def book_size(region: str, ticker: str, direction: str, epoch: float) -> int:
    """How many shares that side of the book offers during the slice of this moment."""
    return 100 + int(900 * _dice(region, ticker, direction, int(epoch // SLICE)))


@dataclass(frozen=True)
class DayPrices:
    pre_close: Decimal
    open_price: Decimal
    high_price: Decimal
    low_price: Decimal


def day_prices(region: str, ticker: str, epoch: float) -> DayPrices:
    """The trading day so far, from midnight of the region; extremes are looked for every 5 min."""
    here = local_time(region, epoch)
    start = epoch_of(region, here.date(), time(0))
    close = epoch_of(region, here.date() - timedelta(days=1), REGULAR[region][-1][1])
    seen = [made_up_price(region, ticker, at) for at in _grid(start, epoch, 300.0)]
    return DayPrices(made_up_price(region, ticker, close), seen[0], max(seen), min(seen))


def _grid(start: float, end: float, step: float) -> Iterable[float]:
    yield from (start + step * number for number in range(int((end - start) // step) + 1))
    yield end


# --- where prices come from -------------------------------------------------------------------
class Prices(Protocol):
    def latest(self, region: str, ticker: str, epoch: float) -> Decimal | None:
        """The price at this moment; None when there is none, so that nothing trades."""

    def moments(self, since: float, now: float, most: int) -> list[float]:
        """At which moments after `since` orders are compared with prices, the last being now."""


class MadeUpPrices:
    """Can be asked for the past, so what was missed while the service was down is made up for."""

    def latest(self, region: str, ticker: str, epoch: float) -> Decimal | None:
        return made_up_price(region, ticker, epoch)

    def moments(self, since: float, now: float, most: int) -> list[float]:
        steps = max(1, min(most, int((now - since) / SLICE)))
        return [now - (now - since) * left / steps for left in range(steps - 1, -1, -1)]


# --- hours ------------------------------------------------------------------------------------
REGULAR = {
    "US": ((time(9, 30), time(16)),),
    "HK": ((time(9, 30), time(12)), (time(13), time(16))),
    "CN": ((time(9, 30), time(11, 30)), (time(13), time(15))),
}
US_EARLY, US_LATE = time(4), time(20)  # pre-market from, after-hours until; then overnight


def _sunday(year: int, month: int, number: int) -> date:
    first = date(year, month, 1)
    return first + timedelta(days=(6 - first.weekday()) % 7 + 7 * (number - 1))


def zone(region: str, epoch: float) -> timezone:
    """The region's offset from UTC at a moment."""
    if region != "US":
        return timezone(timedelta(hours=8))
    year = datetime.fromtimestamp(epoch, UTC).year
    begins = datetime.combine(_sunday(year, 3, 2), time(7), UTC).timestamp()  # 2 a.m. at UTC-5
    ends = datetime.combine(_sunday(year, 11, 1), time(6), UTC).timestamp()  # 2 a.m. at UTC-4
    return timezone(timedelta(hours=-4 if begins <= epoch < ends else -5))


def local_time(region: str, epoch: float) -> datetime:
    return datetime.fromtimestamp(epoch, zone(region, epoch))


def epoch_of(region: str, day: date, clock: time) -> float:
    """The moment at which the clocks of the region show this."""
    guess = datetime.combine(day, clock, UTC).timestamp()
    for _ in range(2):  # the offset at the guess, then at the moment itself
        offset = zone(region, guess).utcoffset(None)
        guess = (datetime.combine(day, clock, UTC) - offset).timestamp()
    return guess


def session(region: str, epoch: float) -> UnifiedStatus:
    """The real exchange's state by the clock; holidays count as working days."""
    here = local_time(region, epoch)
    clock, weekday = here.time(), here.weekday() < 5
    spans = REGULAR[region]
    if weekday and any(start <= clock < end for start, end in spans):
        return UnifiedStatus.RTH
    if weekday and spans[0][0] <= clock < spans[-1][1]:
        return UnifiedStatus.REST
    if region == "US":
        if weekday and US_EARLY <= clock < spans[0][0]:
            return UnifiedStatus.PRE_HOURS
        if weekday and spans[-1][1] <= clock < US_LATE:
            return UnifiedStatus.AFTER_HOURS
        # The night belongs to the day it leads to: Sunday to Thursday evening, until 4 a.m.
        leads_to = here.date() + timedelta(days=1 if clock >= US_LATE else 0)
        if leads_to.weekday() < 5 and (clock >= US_LATE or clock < US_EARLY):
            return UnifiedStatus.OVERNIGHT
    return UnifiedStatus.CLOSED


_SESSIONS = {
    Lifecycle.RTH: {UnifiedStatus.RTH},
    Lifecycle.ETH: {UnifiedStatus.RTH, UnifiedStatus.PRE_HOURS, UnifiedStatus.AFTER_HOURS},
    Lifecycle.OVERNIGHT: {UnifiedStatus.OVERNIGHT},
}


class Hours(Protocol):
    def status(self, region: str, epoch: float) -> tuple[str, UnifiedStatus]:
        """The exchange's own word for its state, and the unified one."""

    def trades(self, region: str, lifecycle: Lifecycle, epoch: float) -> bool: ...

    def day_end(self, region: str, lifecycle: Lifecycle, epoch: float) -> float:
        """When a DAY order placed now expires."""


class AlwaysOpen:
    """Trades day and night, weekends too; the day ends at midnight of the region."""

    def status(self, region: str, epoch: float) -> tuple[str, UnifiedStatus]:
        real = session(region, epoch).name
        return f"SIMULATED_ALWAYS_OPEN (by the clock: {real})", UnifiedStatus.RTH

    def trades(self, region: str, lifecycle: Lifecycle, epoch: float) -> bool:
        return True

    def day_end(self, region: str, lifecycle: Lifecycle, epoch: float) -> float:
        tomorrow = local_time(region, epoch).date() + timedelta(days=1)
        return epoch_of(region, tomorrow, time(0))


class ExchangeHours:
    """Trades when the real exchange does; a DAY order waits for its session and ends with it."""

    def status(self, region: str, epoch: float) -> tuple[str, UnifiedStatus]:
        status = session(region, epoch)
        return f"SIMULATED_{status.name}", status

    def trades(self, region: str, lifecycle: Lifecycle, epoch: float) -> bool:
        return session(region, epoch) in _SESSIONS[lifecycle]

    def day_end(self, region: str, lifecycle: Lifecycle, epoch: float) -> float:
        clock = {
            Lifecycle.RTH: REGULAR[region][-1][1],
            Lifecycle.ETH: US_LATE,
            Lifecycle.OVERNIGHT: US_EARLY,
        }[lifecycle]
        day = local_time(region, epoch).date()
        while day.weekday() >= 5 or epoch_of(region, day, clock) <= epoch:
            day += timedelta(days=1)
        return epoch_of(region, day, clock)
