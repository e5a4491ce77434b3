"""The sample of a broker of one's own, as the users' document has it, to the letter."""

SAMPLE = """
from httptrading import *
from httptrading.model import *


@broker_register('myApi', 'XX证券')
class MyTradingApi(BaseBroker):
    # 根据需要的功能实现接口
    # 如果 sdk 提供的方式会阻塞 eventloop, 需要使用 self.call_sync 方法传入阻塞方法
    async def place_order(
        self,
        contract: Contract,
        order_type: OrderType,
        time_in_force: TimeInForce,
        lifecycle: Lifecycle,
        direction: str,
        qty: int,
        price: float = None,
        **kwargs
    ) -> str:
        raise NotImplementedError

    async def order(self, order_id: str) -> Order:
        raise NotImplementedError

    async def cancel_order(self, order_id: str):
        raise NotImplementedError

    async def positions(self) -> list[Position]:
        raise NotImplementedError

    async def cash(self) -> Cash:
        raise NotImplementedError

    async def ping(self) -> bool:
        return True

    async def quote(self, contract: Contract) -> Quote:
        raise NotImplementedError

    async def market_status(self) -> dict[str, dict[str, MarketStatus]]:
        raise NotImplementedError
"""
