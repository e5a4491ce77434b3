"""What single messages of TWS mean: ticks of a quote, the cash ledger, error codes. Pure.

Codes and tick types: interactivebrokers.github.io/tws-api/message_codes.html, tick_types.html.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from httptrading.brokers.ib_book import CANCEL_CONFIRMED, UNSET
from httptrading.errors import HttpTradingError, RateLimited, Rejected, Unsupported
from httptrading.model import Contract, Quote, exact

PRICE_TICKS = {
    **dict.fromkeys((4, 68), "last"),
    **dict.fromkeys((6, 72), "high"),
    **dict.fromkeys((7, 73), "low"),
    **dict.fromkeys((9, 75), "close"),
    **dict.fromkeys((14, 76), "open"),
}
"""Live and delayed; ib_insync/wrapper.py priceSizeTick. The times of 45 and 88 it leaves out."""

TIME_TICKS = {45, 88}
HALTED_TICKS = {49, 90}
LIVE_OR_FROZEN = (1, 2)

PARTLY_UNSUBSCRIBED = {10089, 10090, 10091}
"""Ticks may follow all the same: "Part of requested market data is not subscribed …"."""

NO_DATA_PERMISSION = {354, 10089, 10090, 10091, 10168, 10186}
MESSAGE_RATE = 100
ABOUT_A_REQUEST = {MESSAGE_RATE, *range(320, 324)}
"""Errors that, without a request's id, are about one that has none: validation (the Read-Only API
refuses to list orders with 321), reading, processing. Others are news (10197, 10225 …)."""

NOT_CONNECTED = 504
CANCEL_REFUSED = {161, 10147, 10148}
ABOUT_A_CANCEL = {CANCEL_CONFIRMED, *CANCEL_REFUSED}
NO_SUCH_CONTRACT = 200

SURELY_REFUSED = {103, 200, 201, 203, 321, 434, 435, 10243}
"""After these there is no such order. After others TWS's list of orders is asked: ib_insync takes
110 (price step) for a mere warning, for one."""


@dataclass
class Ticks:
    """One quote being received."""

    prices: dict[str, Decimal] = field(default_factory=dict)
    time: datetime | None = None
    is_live: bool = True
    is_halted: bool | None = None
    is_ended: bool = False
    error: tuple[int, str] | None = None
    advice: tuple[int, str] | None = None  # an error after which ticks may follow

    def price(self, tick: int, price: float, _size: float = 0.0) -> None:
        """-1 and 0 mean that there is none; ticks of bids, asks and other things are left out."""
        if tick in PRICE_TICKS and 0 < price < UNSET:
            self.prices[PRICE_TICKS[tick]] = exact(price)

    def string(self, tick: int, value: str) -> None:
        if tick in TIME_TICKS and value.isdigit() and int(value) > 0:
            self.time = datetime.fromtimestamp(int(value), UTC)

    def number(self, tick: int, value: float) -> None:
        if tick in HALTED_TICKS:
            self.is_halted = value > 0

    def kind(self, market_data_type: int) -> None:
        self.is_live = market_data_type in LIVE_OR_FROZEN

    def end(self) -> None:
        self.is_ended = True

    @property
    def is_complete(self) -> bool:
        return self.time is not None and len(self.prices) == len(set(PRICE_TICKS.values()))

    def quote(self, contract: Contract, currency: str, now: datetime) -> Quote:
        """Rejected where IB knows no price, or not when it was made; absent others are 0."""
        time = self.time or (now if self.is_live else None)
        if "last" not in self.prices or time is None:
            raise Rejected(
                f"IB has no {'price' if 'last' not in self.prices else 'time'} for the quote of "
                f"{contract.ticker} at the moment"
            )
        return Quote(
            contract=contract,
            currency=currency,
            is_tradable=not self.is_halted,
            latest=self.prices["last"],
            pre_close=self.prices.get("close", 0),
            open_price=self.prices.get("open", 0),
            high_price=self.prices.get("high", 0),
            low_price=self.prices.get("low", 0),
            time=time,
        )


_EXECUTION_TIME = re.compile(r"(\d{8})(-| +)(\d\d:\d\d:\d\d)(?: (.+))?")


def execution_time(text: str, zone: ZoneInfo | None) -> str:
    """An execution's time in a spelling that the SDKs do not misread: seconds since 1970.

    `20231214-20:57:37` is UTC (ib_insync#671, ib_async#230), which they take for this machine's
    time; a name of a zone that is none (`CST`, `China Standard Time`) loses them the message. Such
    a time, and one without a zone, is TWS's own: `zone`, None for this machine's.
    """
    found = _EXECUTION_TIME.fullmatch(text)
    if found is None:
        return text
    day, between, clock, name = found.groups()
    moment = datetime.strptime(day + clock, "%Y%m%d%H:%M:%S")
    if between == "-" and name is None:
        return str(int(moment.replace(tzinfo=UTC).timestamp()))
    return str(int(moment.replace(tzinfo=_zone(name) or zone).timestamp()))


def _zone(name: str | None) -> ZoneInfo | None:
    try:
        return ZoneInfo(name) if name else None
    except (OSError, ValueError, ZoneInfoNotFoundError):
        return None


def refusal(code: int, text: str) -> HttpTradingError:
    """The error for an error message of TWS that ends a request."""
    if code == MESSAGE_RATE:
        return RateLimited("TWS takes at most 50 messages a second", retry_after=1.0)
    if code in NO_DATA_PERMISSION:
        return Unsupported(
            f"This account may not see that quote through the API, not even delayed: {text} "
            f"(IB error {code})"
        )
    return Rejected(f"{text} (IB error {code})")


def ledger(values: Any, account: str) -> dict[str, str]:
    """Currency → cash balance as TWS writes it, from the answer to $LEDGER:ALL. Newer TWS (10.47)
    puts `$LEDGER-` before the names; the row in BASE is the total in the base currency."""
    return {
        value.currency: value.value
        for value in values
        if value.account == account and value.tag.removeprefix("$LEDGER-") == "CashBalance"
    }


def balance(currency: str, balances: dict[str, str]) -> Decimal:
    """0 in a currency that is not in the ledger; Rejected where TWS does not say the amount."""
    if set(balances) == {"BASE"}:
        raise Rejected(
            f"TWS tells only the account's total of {balances['BASE']} in its base currency"
        )
    text = balances.get(currency, "0")
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or abs(amount) >= UNSET:
        raise Rejected(f"TWS tells no amount of {currency}, but {text!r}")
    return amount
