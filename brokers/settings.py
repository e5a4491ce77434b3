"""`InstanceSettings`: one configured account, as the configuration hands it to the workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from httptrading.brokers.base import BaseBroker, Window

EACH_CURRENCY = "*"
"""The key of `max_order_value` for a limit that holds in each currency without one of its own."""


@dataclass(frozen=True)
class InstanceSettings:
    """A prototype broker and how the gateway treats it; the defaults are those of the documents."""

    broker: BaseBroker
    """The prototype, constructed with its arguments, instance id and tokens; never connected."""

    isolation: str | None = None
    """"thread" or "process"; None: what the broker class says, or "process" with `python`."""

    python: str | None = None
    """Interpreter of the child process; None: the one that runs the service."""

    windows: Mapping[str, Window] = field(default_factory=dict)
    """Window name → limit, in place of the broker's own figure (a broker raised yours, say)."""

    ages: Mapping[str, float] = field(default_factory=dict)
    """Read operation → how old (seconds) an answer from memory may be; 0: always ask."""

    deadline: float = 10.0
    """Seconds a call may take when the request has no `HT-TIMEOUT`; 1 to 30."""

    hard_limit: float = 5.0
    """Seconds that a call may run, whatever its deadline, before its worker can count as stuck; it
    is replaced when both have passed, or before, when a read beyond it would make an order late."""

    connect_timeout: float = 15.0
    """Seconds after which an attempt to connect is abandoned."""

    queue_size: int = 64
    """Calls that may wait for a worker; one more is answered 503 at once."""

    read_only: bool = False
    """True: placing and cancelling orders is refused."""

    max_order_value: Mapping[str, Decimal] = field(default_factory=dict)
    """Currency (or `EACH_CURRENCY`) → the largest value an order may have; empty: no limit."""

    def largest_order(self, currency: str) -> Decimal | None:
        """The limit on one order's value in this currency; None: no limit."""
        return self.max_order_value.get(currency, self.max_order_value.get(EACH_CURRENCY))

    @property
    def where(self) -> str:
        """The isolation that holds: configured, implied by `python`, or the broker's own."""
        return self.isolation or ("process" if self.python else self.broker.isolation)
