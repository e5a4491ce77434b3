"""A custom broker whose answers take longer than proxies usually wait, and with some seconds to
spare on a machine that stands still, less than a request may."""

import asyncio

from httptrading.brokers.base import BaseBroker
from httptrading.brokers.registry import broker_register
from httptrading.model import Cash

SECONDS = 24.0


@broker_register("slow", "Slow broker")
class SlowBroker(BaseBroker):
    async def cash(self) -> Cash:
        await asyncio.sleep(SECONDS)
        return Cash("USD", 1)
