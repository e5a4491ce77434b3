"""The order journal's tables: their columns, the statements on them, and their upgrades."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, sqlite
from sqlalchemy.sql.compiler import SQLCompiler

SENDING, PLACED, REFUSED, UNKNOWN, NOT_PLACED, SEEN = (
    "sending",
    "placed",
    "refused",
    "unknown",
    "not placed",
    "seen",
)
UNSETTLED = (SENDING, UNKNOWN)
"""Values of a row's `state`; `journal` tells what they mean."""

metadata = sa.MetaData()


def _name(length: int) -> sa.String:
    """A name in which case matters; elsewhere than in MySQL it does anyway."""
    exact = mysql.VARCHAR(length, charset="utf8mb4", collation="utf8mb4_bin")
    return sa.String(length).with_variant(exact, "mysql", "mariadb")


about = sa.Table(
    "about",
    metadata,
    sa.Column("name", sa.String(32), primary_key=True),
    sa.Column("value", sa.String(64), nullable=False),
)

orders = sa.Table(
    "orders",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("instance_id", _name(32), nullable=False),
    sa.Column("client_order_id", _name(64)),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("mark", sa.String(24)),
    sa.Column("state", sa.String(12), nullable=False),
    sa.Column("order_id", _name(128)),
    sa.Column("trade_type", sa.String(16)),
    sa.Column("region", sa.String(8)),
    sa.Column("ticker", sa.String(64)),
    sa.Column("direction", sa.String(8)),
    sa.Column("order_type", sa.String(16)),
    sa.Column("time_in_force", sa.String(8)),
    sa.Column("lifecycle", sa.String(16)),
    # Decimals as text: exact in every database.
    sa.Column("price", sa.String(40)),
    sa.Column("asked_qty", sa.String(40)),
    sa.Column("qty", sa.String(40), nullable=False),  # the order's now; changed in a broker's app
    sa.Column("currency", sa.String(8), nullable=False),
    sa.Column("filled_qty", sa.String(40), nullable=False),
    sa.Column("avg_price", sa.String(40), nullable=False),
    sa.Column("priced_qty", sa.String(40), nullable=False),  # the filled_qty that avg_price is of
    sa.Column("error_reason", sa.Text, nullable=False),
    sa.Column("is_canceled", sa.Boolean, nullable=False),
    sa.Column("is_pending_cancel", sa.Boolean, nullable=False),
    sa.Column("is_open", sa.Boolean, nullable=False),  # may still change at the broker
    sa.Column("created", sa.Double, nullable=False),  # seconds since the epoch
    sa.Column("updated", sa.Double, nullable=False),
    sa.UniqueConstraint("instance_id", "client_order_id", "attempt"),
    sa.UniqueConstraint("instance_id", "mark"),
    sa.Index("orders_by_order_id", "instance_id", "order_id"),
    sa.Index("orders_by_time", "instance_id", "created"),
    sa.Index("orders_open", "instance_id", "is_open", "created"),
    sa.Index("orders_by_state", "instance_id", "state"),
)

fills = sa.Table(
    "fills",
    metadata,
    sa.Column("instance_id", _name(32), primary_key=True),
    sa.Column("order_id", _name(128), primary_key=True),
    sa.Column("fill_id", _name(128), primary_key=True),
    sa.Column("qty", sa.String(40), nullable=False),
    sa.Column("price", sa.String(40), nullable=False),
    sa.Column("time", sa.Double, nullable=False),
)

# The statements of the order path are built once: building one costs more than running it.
INSERT = sa.insert(orders)
UPDATE = sa.update(orders).where(orders.c.id == sa.bindparam("row"))
BY_ROW = sa.select(orders).where(orders.c.id == sa.bindparam("row"))
_mine = orders.c.instance_id == sa.bindparam("instance")
WITH_MARKS = sa.select(orders).where(_mine, orders.c.mark.in_(sa.bindparam("names")))
WITH_ORDER_IDS = (
    sa.select(orders)
    .where(_mine, orders.c.order_id.in_(sa.bindparam("names")))
    .order_by(orders.c.id)
)
WITH_ORDER_ID = sa.select(orders).where(_mine, orders.c.order_id == sa.bindparam("by_order_id"))
EARLY = WITH_ORDER_ID.where(orders.c.state == SEEN, orders.c.id > sa.bindparam("row"))
WITH_KEY = sa.select(orders).where(_mine, orders.c.client_order_id == sa.bindparam("key"))
NEWEST_ATTEMPT = WITH_KEY.order_by(orders.c.attempt.desc()).limit(1)
NEWEST_PLACED = NEWEST_ATTEMPT.where(orders.c.state == PLACED)
WITHOUT_OUTCOME = (
    sa.select(orders).where(_mine, orders.c.state.in_(UNSETTLED)).order_by(orders.c.id)
)

MIGRATIONS: tuple[tuple[str, ...], ...] = ((),)
"""One tuple of SQL statements per schema version; version 1 is `create_all`. A change to the tables
appends a tuple, and a journal of an older version runs what it lacks, in order."""


class Short:
    """A statement in SQLite's own words, for the driver's own connection: SQLAlchemy takes several
    times as long as SQLite itself, and every order waits for three of these."""

    def __init__(self, statement: sa.ClauseElement, columns: Iterable[str] = ()) -> None:
        """`columns`: those that an INSERT or UPDATE sets."""
        made = statement.compile(dialect=sqlite.dialect(), column_keys=list(columns) or None)
        assert isinstance(made, SQLCompiler)
        self.text = str(made)
        self.names = tuple(made.positiontup or ())
        self._fixed = {
            name: value for name, value in made.params.items() if isinstance(value, str | int)
        }

    def __call__(self, driver: sqlite3.Connection, values: Mapping[str, Any]) -> sqlite3.Cursor:
        known = {**self._fixed, **values}
        return driver.execute(self.text, [known[name] for name in self.names])


_early = orders.alias()
INSERT_SHORT = Short(INSERT, (column.name for column in orders.c if column.name != "id"))
PLACED_SHORT = Short(
    UPDATE.where(
        orders.c.state == SENDING,
        orders.c.order_id.is_(None),
        ~sa.exists().where(
            _early.c.instance_id == orders.c.instance_id,
            _early.c.order_id == sa.bindparam("by_order_id"),
            _early.c.state == SEEN,
            _early.c.id > orders.c.id,
        ),
    ),
    ("state", "order_id", "updated"),
)
HAS_KEY_SHORT = Short(WITH_KEY.with_only_columns(orders.c.id).limit(1))


def create_or_upgrade(connection: sa.Connection) -> str:
    """The tables as this version wants them; returns the gateway's id, made with the journal.

    Raises ValueError for a journal of a newer version.
    """
    is_there = sa.inspect(connection).has_table(about.name)
    known = _about_of(connection) if is_there else {}
    version = int(known.get("schema_version", len(MIGRATIONS)))
    if version > len(MIGRATIONS):
        raise ValueError("The journal was written by a newer version of httptrading.")
    metadata.create_all(connection)
    for statements in MIGRATIONS[version:]:
        for statement in statements:
            connection.execute(sa.text(statement))
    values = {
        "gateway_id": known.get("gateway_id", uuid.uuid4().hex),
        "schema_version": str(len(MIGRATIONS)),
    }
    for name, value in values.items():
        if known.get(name) != value:
            connection.execute(sa.delete(about).where(about.c.name == name))
            connection.execute(sa.insert(about).values(name=name, value=value))
    return values["gateway_id"]


def current_gateway_id(connection: sa.Connection) -> str | None:
    """None when there is something to create or upgrade."""
    known = _about_of(connection)
    is_current = known.get("schema_version") == str(len(MIGRATIONS))
    return known.get("gateway_id") if is_current else None


def _about_of(connection: sa.Connection) -> Mapping[str, str]:
    return {row.name: row.value for row in connection.execute(sa.select(about))}
