"""The paper account and its exchange: orders, fills, cash and holdings in one SQLite file.

Every public method is one transaction: what it answers is on the disk (WAL, full sync), and what
it does not answer did not happen. Amounts are exact decimals, times Unix seconds. One thread uses
an object; several objects, in several processes too, may use one file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from decimal import ROUND_CEILING, Decimal
from enum import Enum
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from httptrading.brokers.paper_market import (
    SLICE,
    Hours,
    Prices,
    book_side,
    book_size,
    price_step,
)
from httptrading.errors import BrokerUnavailable, OrderNotFound, Rejected
from httptrading.model import CURRENCIES, Lifecycle, OrderType, TimeInForce

MARKET_RESERVE = Decimal("1.03")
"""A market buy sets aside this times the ask: its later parts may fill higher."""

MOST_STEPS = 200
"""At most so many moments of a missed time are looked at again, fewer when many orders rest."""

ORDERS_PER_SECOND = 1000
"""Resting orders beyond this are compared with prices less often than once a second."""

SAVE_EVERY = 60.0
"""Seconds after which the time of the last match is stored although nothing happened."""

CENT = Decimal("0.01")
PLACES = Decimal("1e-8")  # averages that are not exact are rounded to this


class Status(Enum):
    WORKING = "working"
    FILLED = "filled"
    CANCELED = "canceled"
    REJECTED = "rejected"  # after it was accepted: the money ran out on the way
    EXPIRED = "expired"

    @property
    def is_final(self) -> bool:
        return self is not Status.WORKING


@dataclass(frozen=True)
class Fee:
    """Commission of one order: the larger of `minimum` and what its filled part costs."""

    per_share: Decimal = Decimal(0)
    of_value: Decimal = Decimal(0)
    minimum: Decimal = Decimal(0)

    def total(self, qty: int, value: Decimal) -> Decimal:
        if not qty:
            return Decimal(0)
        share = self.per_share * qty + self.of_value * value
        return max(self.minimum, share.quantize(CENT, ROUND_CEILING))


FEES = {
    "US": Fee(per_share=Decimal("0.005"), minimum=Decimal(1)),
    "HK": Fee(of_value=Decimal("0.0008"), minimum=Decimal(18)),
    "CN": Fee(of_value=Decimal("0.0003"), minimum=Decimal(5)),
}
"""Of the usual order of magnitude; taxes are left out."""

NO_FEES = {region: Fee() for region in FEES}


@dataclass
class PaperOrder:
    """One row of `paper_order`, in the order of its columns; `value` is the sum of quantity times
    price over its fills."""

    number: int
    mark: str
    region: str
    ticker: str
    direction: str
    order_type: OrderType
    price: Decimal | None
    qty: int
    time_in_force: TimeInForce
    lifecycle: Lifecycle
    reserve_price: Decimal  # what a share of a buy may cost at most; 0 for sells
    reserved: Decimal  # cash set aside for the rest of a working buy
    placed: float
    expires: float | None
    status: Status = Status.WORKING
    reason: str = ""
    filled: int = 0
    value: Decimal = Decimal(0)
    fees: Decimal = Decimal(0)
    change: int = 0  # grows with every change to any order
    updated: float = 0.0

    @property
    def order_id(self) -> str:
        return str(self.number)

    @property
    def currency(self) -> str:
        return CURRENCIES[self.region]

    @property
    def left(self) -> int:
        return self.qty - self.filled

    @property
    def avg_price(self) -> Decimal:
        """Exact where eight decimal places suffice, else rounded to them."""
        if not self.filled:
            return Decimal(0)
        return (self.value / self.filled).quantize(PLACES).normalize()


@dataclass(frozen=True)
class PaperFill:
    number: int
    order_id: str
    qty: int
    price: Decimal
    time: float


@dataclass(frozen=True)
class Holding:
    """`cost` is the average price paid per share, fees left out."""

    region: str
    ticker: str
    currency: str
    qty: Decimal
    cost: Decimal


@dataclass(frozen=True)
class Changes:
    """What happened since the last look: `orders` in their newest state, `fills` in order."""

    orders: list[PaperOrder] = field(default_factory=list)
    fills: list[PaperFill] = field(default_factory=list)


class Exact(sa.types.TypeDecorator[Decimal]):
    """A decimal kept as its plain text: SQLite's own numbers are doubles."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else f"{value:f}"

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Decimal | None:
        return None if value is None else Decimal(value)


_tables = sa.MetaData()

_WORKING = sa.text("status = 'WORKING'")  # literally, so that SQLite takes the partial index

ORDERS = sa.Table(
    "paper_order",
    _tables,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("mark", sa.String, nullable=False),
    sa.Column("region", sa.String, nullable=False),
    sa.Column("ticker", sa.String, nullable=False),
    sa.Column("direction", sa.String, nullable=False),
    sa.Column("order_type", sa.Enum(OrderType), nullable=False),
    sa.Column("price", Exact),
    sa.Column("qty", sa.BigInteger, nullable=False),
    sa.Column("time_in_force", sa.Enum(TimeInForce), nullable=False),
    sa.Column("lifecycle", sa.Enum(Lifecycle), nullable=False),
    sa.Column("reserve_price", Exact, nullable=False),
    sa.Column("reserved", Exact, nullable=False),
    sa.Column("placed", sa.Float, nullable=False),
    sa.Column("expires", sa.Float),
    sa.Column("status", sa.Enum(Status), nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("filled", sa.BigInteger, nullable=False),
    sa.Column("value", Exact, nullable=False),
    sa.Column("fees", Exact, nullable=False),
    sa.Column("change", sa.BigInteger, nullable=False),
    sa.Column("updated", sa.Float, nullable=False),
    sa.Index("paper_order_change", "change"),
    sa.Index("paper_order_updated", "updated"),
    sa.Index("paper_order_working", "region", "ticker", sqlite_where=_WORKING),
)
FILLS = sa.Table(
    "paper_fill",
    _tables,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("order_number", sa.BigInteger, nullable=False, index=True),
    sa.Column("region", sa.String, nullable=False),
    sa.Column("ticker", sa.String, nullable=False),
    sa.Column("direction", sa.String, nullable=False),
    sa.Column("qty", sa.BigInteger, nullable=False),
    sa.Column("price", Exact, nullable=False),
    sa.Column("time", sa.Float, nullable=False, index=True),
)
CASH = sa.Table(
    "paper_cash",
    _tables,
    sa.Column("currency", sa.String, primary_key=True),
    sa.Column("amount", Exact, nullable=False),
    sa.Column("reserved", Exact, nullable=False),  # the sum over working orders
)
HOLDINGS = sa.Table(
    "paper_holding",
    _tables,
    sa.Column("region", sa.String, primary_key=True),
    sa.Column("ticker", sa.String, primary_key=True),
    sa.Column("currency", sa.String, nullable=False),
    sa.Column("qty", Exact, nullable=False),
    sa.Column("cost", Exact, nullable=False),
)
NOTES = sa.Table(
    "paper_note",
    _tables,
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("value", sa.Float, nullable=False),
)
"""`version` of these tables, and `matched`: until when orders were compared with prices."""

VERSION = 1


def _engine(path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{path}", poolclass=sa.StaticPool)

    @sa.event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        # Python's sqlite3 would begin transactions by itself, and too late for reads.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA busy_timeout = 5000")

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


class PaperExchange:
    """The account with its orders. Raises Rejected and OrderNotFound with sentences for traders."""

    def __init__(
        self,
        path: Path,
        cash: Mapping[str, Decimal],
        prices: Prices,
        hours: Hours,
        fees: Mapping[str, Fee],
        clock: Callable[[], float],
    ) -> None:
        """`cash` is what a new account begins with; an existing one keeps what it has."""
        self._prices = prices
        self._hours = hours
        self._fees = fees
        self._clock = clock
        self._engine = _engine(path)
        self._matched = self._saved = self._next_match = 0.0
        self._seen_change = self._seen_fill = 0
        try:
            with self._transaction() as db:
                self._prepare(db, cash)
        except BaseException:
            self.close()
            raise

    def _prepare(self, db: sa.Connection, cash: Mapping[str, Decimal]) -> None:
        _tables.create_all(db)
        version = db.scalar(sa.select(NOTES.c.value).where(NOTES.c.name == "version"))
        if version is None:
            db.execute(NOTES.insert().values(name="version", value=VERSION))
        elif version != VERSION:
            raise BrokerUnavailable(
                f"paper.sqlite is of version {version:g}, this program wants {VERSION}: update the "
                "program, or move the file away to begin a new account"
            )
        have = set(db.scalars(sa.select(CASH.c.currency)))
        for currency, amount in cash.items():
            if currency not in have:
                db.execute(
                    CASH.insert().values(currency=currency, amount=amount, reserved=Decimal(0))
                )
        matched = db.scalar(sa.select(NOTES.c.value).where(NOTES.c.name == "matched"))
        self._matched = self._saved = matched or self._clock()
        self._seen_change = db.scalar(sa.select(sa.func.max(ORDERS.c.change))) or 0
        self._seen_fill = db.scalar(sa.select(sa.func.max(FILLS.c.number))) or 0

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        """Commits at the end. BrokerUnavailable: nothing was changed; an error of the commit itself
        passes as it is, for it may have reached the disk."""
        with ExitStack() as stack:
            try:
                db = stack.enter_context(self._engine.connect())
                db.begin()
                yield db
            except sa.exc.DBAPIError as error:
                raise BrokerUnavailable(
                    "The paper account's file cannot be read or written (is the disk full?); "
                    "nothing was changed"
                ) from error
            try:
                db.commit()
            except sa.exc.DBAPIError:
                # SQLite does not show what it could not sync, but finds the whole of it in its log
                # when it opens the file again: rather now than after a restart.
                db.invalidate()
                raise

    @contextmanager
    def _account(self) -> Iterator[_Account]:
        """A transaction on an account that is up to date with the market."""
        self.advance()
        with self._transaction() as db:
            yield _Account(db)

    # --- for traders ------------------------------------------------------------------------
    def place(
        self,
        region: str,
        ticker: str,
        direction: str,
        order_type: OrderType,
        qty: int,
        price: Decimal | None,
        time_in_force: TimeInForce,
        lifecycle: Lifecycle,
        mark: str,
    ) -> PaperOrder:
        """Takes an order in and fills what the book offers now."""
        with self._account() as account:
            now = self._clock()
            day = time_in_force is TimeInForce.DAY
            order = PaperOrder(
                number=account.next_number(now),
                mark=mark,
                region=region,
                ticker=ticker,
                direction=direction,
                order_type=order_type,
                price=price,
                qty=qty,
                time_in_force=time_in_force,
                lifecycle=lifecycle,
                reserve_price=self._worst_price(region, ticker, direction, price, now),
                reserved=Decimal(0),
                placed=now,
                expires=self._hours.day_end(region, lifecycle, now) if day else None,
            )
            self._check_price_step(order)
            self._check_cover(account, order)
            self._reserve(account, order)
            account.add(order, now)
            self._try(account, order, now, _Market(self._prices, self._hours, now))
            return order

    def cancel(self, order_id: str) -> PaperOrder:
        with self._account() as account:
            order = account.find(order_id)
            if order.status.is_final:
                raise Rejected(f"Order {order_id} cannot be cancelled: it is {order.status.value}.")
            self._end(account, order, Status.CANCELED, "", self._clock())
            return order

    def order(self, order_id: str) -> PaperOrder:
        with self._account() as account:
            return account.find(order_id)

    def orders(self, since: float) -> list[PaperOrder]:
        """Every working order, and every one changed since then; newest first."""
        with self._account() as account:
            return account.orders(sa.or_(_WORKING, ORDERS.c.updated >= since))[::-1]

    def fills(self, order_id: str) -> list[PaperFill]:
        with self._account() as account:
            return account.fills(FILLS.c.order_number == account.find(order_id).number)

    def spendable(self, currency: str) -> Decimal:
        """Cash less what working buy orders have set aside."""
        with self._account() as account:
            return account.spendable(currency)

    def holdings(self) -> list[Holding]:
        with self._account() as account:
            return account.holdings()

    def awaited(self) -> list[tuple[str, str]]:
        """Region and ticker of everything that a working order waits for."""
        query = sa.select(ORDERS.c.region, ORDERS.c.ticker).where(_WORKING).distinct()
        with self._transaction() as db:
            return [(row.region, row.ticker) for row in db.execute(query)]

    def changes(self) -> Changes:
        """What happened since the last call, whoever did it."""
        with self._transaction() as db:
            account = _Account(db)
            orders = account.orders(ORDERS.c.change > self._seen_change)
            fills = account.fills(FILLS.c.number > self._seen_fill)
        self._seen_change = max([self._seen_change, *(order.change for order in orders)])
        self._seen_fill = max([self._seen_fill, *(fill.number for fill in fills)])
        return Changes(orders, fills)

    # --- for the script of a test, or a person who wants to play the market --------------------
    def execute(self, order_id: str, qty: int, price: Decimal) -> None:
        """Fills a part of a working order at a price, whatever the market says."""
        with self._account() as account:
            self._fill(account, account.find(order_id), qty, price, self._clock())

    def finish(self, order_id: str, status: Status, reason: str = "") -> None:
        """Ends a working order without the client's doing."""
        with self._account() as account:
            self._end(account, account.find(order_id), status, reason, self._clock())

    # --- matching -----------------------------------------------------------------------------
    def advance(self) -> None:
        """Lets time pass: compares all resting orders with the prices since the last time."""
        now = self._clock()
        if self._matched <= now < self._next_match:
            return
        with self._transaction() as db:
            account = _Account(db)
            working = account.orders(_WORKING)
            if working:
                most = max(1, min(MOST_STEPS, 20 * ORDERS_PER_SECOND // len(working)))
                for moment in self._prices.moments(self._matched, now, most):
                    market = _Market(self._prices, self._hours, moment)
                    for order in working:
                        if order.placed <= moment and not order.status.is_final:
                            self._try(account, order, moment, market)
            save = account.changed or not 0 <= now - self._saved < SAVE_EVERY
            if save:
                account.note("matched", now)
        self._matched = now
        self._saved = now if save else self._saved
        pause = max(SLICE, len(working) / ORDERS_PER_SECOND)
        self._next_match = (now // SLICE) * SLICE + pause

    def _try(self, account: _Account, order: PaperOrder, moment: float, market: _Market) -> None:
        """Fills what can be filled of one order at one moment; expires it when its time is up."""
        if order.expires is not None and moment >= order.expires:
            self._end(account, order, Status.EXPIRED, "The order's day has ended.", order.expires)
            return
        price = market.price(order)
        if price is None:
            return
        buys = order.direction == "BUY"
        if order.price is not None and (price > order.price if buys else price < order.price):
            return
        offered = book_size(order.region, order.ticker, order.direction, moment)
        qty = min(order.left, offered - account.taken(order, moment))
        if buys and qty > 0:
            qty = self._affordable(account, order, qty, price)
            if not qty:
                reason = f"Not enough {order.currency} for the rest of the order."
                self._end(account, order, Status.REJECTED, reason, moment)
        if qty > 0:
            self._fill(account, order, qty, price, moment)

    def _affordable(self, account: _Account, order: PaperOrder, qty: int, price: Decimal) -> int:
        """At most `qty`: how many shares the cash that no other order has set aside can buy."""
        money = account.spendable(order.currency) + order.reserved
        while qty > 0:
            short = qty * price + self._fee_step(order, qty, price) - money
            if short <= 0:
                break
            qty -= max(1, int((short / price).to_integral_value(ROUND_CEILING)))
        return max(0, qty)

    def _fill(
        self, account: _Account, order: PaperOrder, qty: int, price: Decimal, moment: float
    ) -> None:
        fee = self._fee_step(order, qty, price)
        buys = order.direction == "BUY"
        account.pay(order.currency, -(qty * price) - fee if buys else qty * price - fee)
        account.hold(order, qty if buys else -qty, price)
        order.filled += qty
        order.value += qty * price
        order.fees += fee
        if order.left <= 0:
            order.status = Status.FILLED
        self._reserve(account, order)
        account.add_fill(order, qty, price, moment)
        account.save(order, moment)

    def _end(
        self, account: _Account, order: PaperOrder, status: Status, reason: str, moment: float
    ) -> None:
        order.status, order.reason = status, reason
        self._reserve(account, order)
        account.save(order, moment)

    def _reserve(self, account: _Account, order: PaperOrder) -> None:
        """Sets aside what the rest of a working buy may cost, and frees what it no longer may.

        After a fill above what was reckoned with there may be less left than that: all of it then.
        """
        need = Decimal(0)
        if not order.status.is_final:
            left = account.spendable(order.currency) + order.reserved
            need = min(self._cover(order), left)
        account.reserve(order.currency, need - order.reserved)
        order.reserved = need

    def _cover(self, order: PaperOrder) -> Decimal:
        """What the rest of a buy may cost, fee included; 0 for sells."""
        if order.direction != "BUY":
            return Decimal(0)
        rest = order.left * order.reserve_price
        return rest + self._fee_step(order, order.left, order.reserve_price)

    def _fee_step(self, order: PaperOrder, qty: int, price: Decimal) -> Decimal:
        """What the next fill adds to the order's fee; a sale never costs more than it brings."""
        total = self._fees[order.region].total(order.filled + qty, order.value + qty * price)
        step = max(Decimal(0), total - order.fees)
        return step if order.direction == "BUY" else min(step, qty * price)

    # --- what an order needs --------------------------------------------------------------------
    def _worst_price(
        self, region: str, ticker: str, direction: str, price: Decimal | None, now: float
    ) -> Decimal:
        if direction != "BUY":
            return Decimal(0)
        if price is not None:
            return price
        latest = self._prices.latest(region, ticker, now)
        if latest is None:
            raise Rejected(f"There is no price for {region} {ticker} now: use a limit order.")
        ask = book_side(region, ticker, "BUY", latest)
        return (ask * MARKET_RESERVE).quantize(CENT, ROUND_CEILING)

    def _check_price_step(self, order: PaperOrder) -> None:
        if order.price is None:
            return
        step = price_step(order.region, order.ticker, order.price)
        if order.price % step:
            raise Rejected(
                f"The price {order.price:f} is not a multiple of {step:f}, the price step of "
                f"{order.region} {order.ticker} at this price."
            )

    def _check_cover(self, account: _Account, order: PaperOrder) -> None:
        """Refuses what could not be paid for or delivered."""
        if order.direction == "BUY":
            needed, money = self._cover(order), account.spendable(order.currency)
            if needed > money:
                raise Rejected(
                    f"Not enough buying power: the order needs up to {needed:,.2f} "
                    f"{order.currency} (fee included), {money:,.2f} can be spent."
                )
            return
        held = account.held(order.region, order.ticker)
        offered = account.offered(order.region, order.ticker)
        if order.qty > held - offered:
            raise Rejected(
                f"Not enough shares: {held:f} {order.ticker} held, {offered} of them in open "
                "sell orders, and the paper account does not sell short."
            )


class _Market:
    """The prices of one moment, each looked up once."""

    def __init__(self, prices: Prices, hours: Hours, moment: float) -> None:
        self._prices = prices
        self._hours = hours
        self._moment = moment
        self._known: dict[tuple[str, str, str, Lifecycle], Decimal | None] = {}

    def price(self, order: PaperOrder) -> Decimal | None:
        """What the book asks from this buyer, or bids this seller; None when nothing trades."""
        key = order.region, order.ticker, order.direction, order.lifecycle
        if key not in self._known:
            latest = None
            if self._hours.trades(order.region, order.lifecycle, self._moment):
                latest = self._prices.latest(order.region, order.ticker, self._moment)
            self._known[key] = (
                None
                if latest is None
                else book_side(order.region, order.ticker, order.direction, latest)
            )
        return self._known[key]


class _Account:
    """The rows, within one transaction."""

    def __init__(self, db: sa.Connection) -> None:
        self._db = db
        self.changed = False

    # --- orders -----------------------------------------------------------------------------
    def orders(self, wanted: sa.ColumnElement[bool] | sa.TextClause) -> list[PaperOrder]:
        """Oldest first."""
        query = ORDERS.select().where(wanted).order_by(ORDERS.c.number)
        return [PaperOrder(*row) for row in self._db.execute(query)]

    def find(self, order_id: str) -> PaperOrder:
        # Python's int() also takes "1_0" and " 1": such ids are nobody's.
        if order_id.isascii() and order_id.isdigit() and len(order_id) < 19:
            for order in self.orders(ORDERS.c.number == int(order_id)):
                return order
        raise OrderNotFound(f"There is no order {order_id[:40]} in the paper account.")

    def next_number(self, now: float) -> int:
        """From the clock, so that ids stay unique even when the file is deleted."""
        last = self._db.scalar(sa.select(sa.func.max(ORDERS.c.number))) or 0
        return max(int(now * 1000), last + 1)

    def add(self, order: PaperOrder, now: float) -> None:
        self._stamp(order, now)
        self._db.execute(ORDERS.insert(), _row(order))

    def save(self, order: PaperOrder, now: float) -> None:
        self._stamp(order, now)
        self._db.execute(ORDERS.update().where(ORDERS.c.number == order.number), _row(order))

    def _stamp(self, order: PaperOrder, now: float) -> None:
        last = self._db.scalar(sa.select(sa.func.max(ORDERS.c.change))) or 0
        order.change, order.updated, self.changed = last + 1, now, True

    def offered(self, region: str, ticker: str) -> int:
        """Shares in open sell orders."""
        left = sa.func.sum(ORDERS.c.qty - ORDERS.c.filled)
        found = self._db.scalar(
            sa.select(left).where(
                _WORKING,
                ORDERS.c.region == region,
                ORDERS.c.ticker == ticker,
                ORDERS.c.direction == "SELL",
            )
        )
        return int(found or 0)

    # --- fills ------------------------------------------------------------------------------
    def fills(self, wanted: sa.ColumnElement[bool]) -> list[PaperFill]:
        query = FILLS.select().where(wanted).order_by(FILLS.c.number)
        return [
            PaperFill(row.number, str(row.order_number), row.qty, row.price, row.time)
            for row in self._db.execute(query)
        ]

    def add_fill(self, order: PaperOrder, qty: int, price: Decimal, moment: float) -> None:
        self._db.execute(
            FILLS.insert().values(
                order_number=order.number,
                region=order.region,
                ticker=order.ticker,
                direction=order.direction,
                qty=qty,
                price=price,
                time=moment,
            )
        )

    def taken(self, order: PaperOrder, moment: float) -> int:
        """How much of the book's offer in the slice of this moment is gone."""
        start = moment // SLICE * SLICE
        found = self._db.scalar(
            sa.select(sa.func.sum(FILLS.c.qty)).where(
                FILLS.c.time >= start,
                FILLS.c.time < start + SLICE,
                FILLS.c.region == order.region,
                FILLS.c.ticker == order.ticker,
                FILLS.c.direction == order.direction,
            )
        )
        return int(found or 0)

    # --- money ------------------------------------------------------------------------------
    def spendable(self, currency: str) -> Decimal:
        amount, reserved = self._cash(currency)
        return amount - reserved

    def pay(self, currency: str, amount: Decimal) -> None:
        self._set_cash(currency, amount, Decimal(0))

    def reserve(self, currency: str, amount: Decimal) -> None:
        if amount:
            self._set_cash(currency, Decimal(0), amount)

    def _cash(self, currency: str) -> tuple[Decimal, Decimal]:
        row = self._db.execute(CASH.select().where(CASH.c.currency == currency)).first()
        return (row.amount, row.reserved) if row is not None else (Decimal(0), Decimal(0))

    def _set_cash(self, currency: str, more: Decimal, more_reserved: Decimal) -> None:
        amount, reserved = self._cash(currency)
        self._db.execute(
            CASH.update()
            .where(CASH.c.currency == currency)
            .values(amount=amount + more, reserved=reserved + more_reserved)
        )

    # --- holdings ---------------------------------------------------------------------------
    def holdings(self) -> list[Holding]:
        query = HOLDINGS.select().order_by(HOLDINGS.c.region, HOLDINGS.c.ticker)
        return [Holding(*row) for row in self._db.execute(query)]

    def held(self, region: str, ticker: str) -> Decimal:
        return sum(
            (
                held.qty
                for held in self.holdings()
                if (held.region, held.ticker) == (region, ticker)
            ),
            Decimal(0),
        )

    def hold(self, order: PaperOrder, qty: int, price: Decimal) -> None:
        """Adds to a holding (or takes from it); the average cost changes only when it grows."""
        here = (HOLDINGS.c.region == order.region, HOLDINGS.c.ticker == order.ticker)
        row = self._db.execute(HOLDINGS.select().where(*here)).first()
        held, cost = (row.qty, row.cost) if row is not None else (Decimal(0), Decimal(0))
        if qty > 0 and held + qty:
            cost = ((held * cost + qty * price) / (held + qty)).quantize(PLACES)
        held += qty
        self._db.execute(HOLDINGS.delete().where(*here))
        if held:
            self._db.execute(
                HOLDINGS.insert().values(
                    region=order.region,
                    ticker=order.ticker,
                    currency=order.currency,
                    qty=held,
                    cost=cost,
                )
            )

    def note(self, name: str, value: float) -> None:
        noted = NOTES.insert().prefix_with("OR REPLACE").values(name=name, value=value)
        self._db.execute(noted)


def _row(order: PaperOrder) -> dict[str, Any]:
    return {column.name: getattr(order, column.name) for column in fields(order)}
