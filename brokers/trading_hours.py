"""From a contract's trading and liquid hours, as Interactive Brokers writes them, to market states.

IB has no market-state request. `ContractDetails` carries `tradingHours` (all sessions) and
`liquidHours` (the regular ones) for about six days, in the exchange's own time zone, in one of
two spellings: `20260323:0930-20260323:1600;20260324:CLOSED` (TWS 970 and later) or
`20260323:0930-1130,1300-1500;20260324:CLOSED`. A second session of a day follows a comma or a
semicolon, with its date or without. Halts are not in there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from httptrading.model import MarketStatus, UnifiedStatus

REGION_ZONES = {"US": "America/New_York", "HK": "Asia/Hong_Kong", "CN": "Asia/Shanghai"}

EXTENDED = {"US"}
"""Where trading outside the liquid hours is a session of its own. Elsewhere it is an auction:
UNKNOWN before the open, as the other brokers' adapters have it, and CLOSED after the close."""


@dataclass(frozen=True)
class Session:
    """From `begin` up to, not including, `end`; both timezone-aware."""

    begin: datetime
    end: datetime

    def __contains__(self, moment: datetime) -> bool:
        return self.begin <= moment < self.end

    def __str__(self) -> str:
        return f"{self.begin:%m-%d %H:%M}-{self.end:%H:%M}"


@dataclass(frozen=True)
class Hours:
    """The hours of one contract; `name` says which, for people."""

    name: str
    zone: str
    trading: tuple[Session, ...]
    liquid: tuple[Session, ...]


def time_zone(name: str, region: str) -> ZoneInfo:
    """The zone IB names, e.g. `US/Eastern`, `Hongkong` or `EST (Eastern Standard Time)`; the
    region's own where the name is none (the abbreviation EST knows no summer time)."""
    if "/" in name and " " not in name:
        try:
            return ZoneInfo(name)
        except (KeyError, OSError, ValueError):
            pass
    return ZoneInfo(REGION_ZONES[region])


def parse_sessions(text: str, zone: ZoneInfo) -> tuple[Session, ...]:
    """The sessions in `tradingHours` or `liquidHours`, in order; ValueError for anything else."""
    sessions = []
    for day in filter(None, text.split(";")):
        date, _, spans = day.partition(":")
        for span in spans.split(","):
            if span == "CLOSED":
                continue
            begin_text, dash, end_text = span.partition("-")
            if not dash:
                raise ValueError(f"no session: {span!r}")
            begin, end = (
                _moment(own_date or date, time, zone)
                for own_date, _, time in (text.rpartition(":") for text in (begin_text, end_text))
            )
            if end <= begin:
                end += timedelta(days=1)
            sessions.append(Session(begin, end))
    return tuple(sorted(sessions, key=lambda session: session.begin))


def _moment(date: str, time: str, zone: ZoneInfo) -> datetime:
    day = datetime.strptime(date, "%Y%m%d")
    if len(time) != 4 or not time.isdigit() or time > "2400":
        raise ValueError(f"no time of day: {time!r}")
    return (day + timedelta(hours=int(time[:2]), minutes=int(time[2:]))).replace(tzinfo=zone)


def hours(name: str, region: str, zone: str, trading: str, liquid: str) -> Hours:
    """The hours in one ContractDetails; ValueError when they cannot be read."""
    found = time_zone(zone, region)
    return Hours(name, found.key, parse_sessions(trading, found), parse_sessions(liquid, found))


def market_status(
    region: str, now: datetime, day: Hours | None, night: Hours | None = None
) -> MarketStatus:
    """The state at `now`, and in `origin_status` which hours say so.

    `day` are the hours of a stock that stands for the market, `night` those of the same stock on
    IB's overnight venue (US only); without them (the venue may not be listed, only from tonight
    on, or with the hours of the day) the documented hours, 20:00 to 03:50 New York time before a
    trading day, hold.
    """
    if day is None:
        return MarketStatus(region, "no contract hours at IB", UnifiedStatus.UNKNOWN)
    liquid = _at(now, day.liquid)
    if liquid is not None:
        return _status(region, UnifiedStatus.RTH, "liquidHours", liquid, day)
    before, after = _around(now, day)
    if before is not None and after is not None:
        pause = Session(before.end, after.begin)
        return _status(region, UnifiedStatus.REST, "between liquidHours", pause, day)
    trading = _at(now, day.trading)
    if trading is not None:
        state = UnifiedStatus.PRE_HOURS if before is None else UnifiedStatus.AFTER_HOURS
        if region not in EXTENDED:
            state = UnifiedStatus.UNKNOWN if before is None else UnifiedStatus.CLOSED
        return _status(region, state, "tradingHours", trading, day)
    if region in EXTENDED:
        dark = Hours(f"{day.name} (documented)", day.zone, _nights(day), ())
        told = () if night is None or night.trading == day.trading else night.trading
        if night is not None and told and told[0].begin <= now:
            dark = night
        session = _at(now, dark.trading)
        if session is not None:
            return _status(region, UnifiedStatus.OVERNIGHT, "overnight hours", session, dark)
    opens = next((session for session in day.trading if session.begin > now), None)
    until = f" until {opens.begin:%m-%d %H:%M} {day.zone}" if opens else ""
    return MarketStatus(region, f"{day.name} closed{until}", UnifiedStatus.CLOSED)


def _at(now: datetime, sessions: Iterable[Session]) -> Session | None:
    return next((session for session in sessions if now in session), None)


def _around(now: datetime, day: Hours) -> tuple[Session | None, Session | None]:
    """The liquid sessions before and after `now` on the exchange's own date."""
    date = now.astimezone(ZoneInfo(day.zone)).date()
    today = [session for session in day.liquid if session.begin.date() == date]
    ended = [session for session in today if session.end <= now]
    coming = [session for session in today if session.begin > now]
    return (ended[-1] if ended else None, coming[0] if coming else None)


def _nights(day: Hours) -> tuple[Session, ...]:
    """20:00 to 03:50 before each trading day: IB's overnight hours for US stocks."""
    nights = []
    for session in day.trading:
        end = session.begin.replace(hour=3, minute=50)
        begin = (end - timedelta(days=1)).replace(hour=20, minute=0)
        nights.append(Session(begin, end))
    return tuple(nights)


def _status(
    region: str, state: UnifiedStatus, kind: str, session: Session, source: Hours
) -> MarketStatus:
    return MarketStatus(region, f"{source.name} {kind} {session} {source.zone}", state)
