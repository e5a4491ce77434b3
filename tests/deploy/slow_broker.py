"""A custom broker whose quotes take almost as long as a request may."""

import asyncio

from httptrading.brokers.base import BaseBroker
from httptrading.brokers.registry import broker_register
from httptrading.model import Cash

SECONDS = 28.0


@broker_register("slow", "Slow broker")
class SlowBroker(BaseBroker):
    async def cash(self) -> Cash:
        await asyncio.sleep(SECONDS)
        return Cash("USD", 1)
