"""Built-in adapters for simulators that list an order at once: settlement need not wait long."""

from __future__ import annotations

from httptrading.brokers.interactive_brokers import InteractiveBrokers
from httptrading.brokers.tiger import Tiger

LISTING_DELAY = 0.5


class QuickInteractiveBrokers(InteractiveBrokers):
    listing_delay = LISTING_DELAY


class QuickTiger(Tiger):
    listing_delay = LISTING_DELAY
    booked_within = 0.0
