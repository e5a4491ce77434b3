"""The OpenD simulator, driven by the real futu SDK: what it says is what the SDK understands."""

import hashlib
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest
from Crypto.PublicKey import RSA

from httptrading.brokers import futu_sdk
from simulators.exchange import Exchange, ExchangePosition, FaultKind
from simulators.opend import ACCOUNTS, OpenD

REAL_ACCOUNT = ACCOUNTS[1].acc_id

# The SDK never closes the key file it reads (common/sys_config.py `_read_rsa_keys`).
pytestmark = pytest.mark.filterwarnings(
    r"ignore:.*key\.pem:pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(scope="module")
def sdk(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return futu_sdk.load("futu", tmp_path_factory.mktemp("home"))


@pytest.fixture(params=["plain", "encrypted"])
def key(request: pytest.FixtureRequest, sdk: ModuleType, tmp_path: Path):
    if request.param == "plain":
        yield None
        return
    path = tmp_path / "key.pem"
    path.write_bytes(RSA.generate(1024).export_key())
    sdk.SysConfig.set_init_rsa_file(str(path))
    yield path
    sdk.SysConfig.set_init_rsa_file("")


@pytest.fixture
def exchange() -> Exchange:
    return Exchange()


def test_one_order_from_placing_to_its_fill(
    sdk: ModuleType, key: Path | None, exchange: Exchange
) -> None:
    pushed: list[tuple[str, str, float]] = []

    class Orders(sdk.TradeOrderHandlerBase):  # type: ignore[misc, name-defined]
        def on_recv_rsp(self, rsp_pb):  # type: ignore[no-untyped-def]
            ret, table = super().on_recv_rsp(rsp_pb)
            row = table.iloc[0]
            with exchange.changed:
                pushed.append((row.order_status, row.remark, row.dealt_qty))
                exchange.changed.notify_all()
            return ret, table

    with OpenD(exchange, rsa_key=key, locked=True) as opend:
        context = sdk.OpenSecTradeContext(
            sdk.TrdMarket.NONE, "127.0.0.1", opend.port, is_encrypt=key is not None
        )
        try:
            context.set_handler(Orders())
            order = dict(
                price=200.01,
                qty=12,
                code="US.BRK.B",
                trd_side="BUY",
                acc_id=REAL_ACCOUNT,
                remark="tag-1",
                session="ETH",
                time_in_force="GTC",
            )
            ret, text = context.place_order(**order)
            assert (ret, text) == (-1, "Not unlock trade, please unlock first")
            pin = hashlib.md5(b"123456").hexdigest()
            assert context.unlock_trade(password_md5="0" * 32)[0] == -1
            assert context.unlock_trade(password_md5=pin)[0] == 0
            ret, table = context.place_order(**order)
            assert ret == 0, table
            placed = exchange.orders[table.order_id[0]]
            assert (placed.ticker, placed.price, placed.mark, placed.lifecycle) == (
                "BRK.B",
                Decimal("200.01"),
                "tag-1",
                "ETH",
            )
            exchange.fill(placed.order_id, 12, "200")
            exchange.wait_for(lambda: ("FILLED_ALL", "tag-1", 12.0) in pushed)
            ret, text = context.modify_order("CANCEL", placed.order_id, 0, 0, acc_id=REAL_ACCOUNT)
            assert (ret, text) == (-1, "订单已完成，不能撤单")
            ret, table = context.history_order_list_query(acc_id=REAL_ACCOUNT)
            assert list(table.dealt_avg_price) == [200.0]
        finally:
            context.close()


def test_accounts_money_holdings_and_quotes(
    sdk: ModuleType, key: Path | None, exchange: Exchange
) -> None:
    exchange.positions.append(ExchangePosition("CN", "600519", "CNY", Decimal(-100)))
    exchange.quote("CN", "000001", latest=Decimal("11.53"))
    with OpenD(exchange, rsa_key=key) as opend:
        where = {"host": "127.0.0.1", "port": opend.port, "is_encrypt": key is not None}
        trade = sdk.OpenSecTradeContext(sdk.TrdMarket.NONE, **where)
        quote = sdk.OpenQuoteContext(**where)
        try:
            assert len(trade.get_acc_list()[1]) == len(ACCOUNTS)
            funds = trade.accinfo_query(acc_id=REAL_ACCOUNT)[1]
            assert (funds.us_cash[0], funds.hk_cash[0]) == (30877.499, 1000.5)
            paper = trade.accinfo_query("SIMULATE", ACCOUNTS[2].acc_id)[1]
            assert (paper.cash[0], paper.us_cash[0]) == (1000.5, "N/A")
            held = trade.position_list_query(acc_id=REAL_ACCOUNT)[1].iloc[0]
            assert (held.code, held.qty, held.position_side) == ("SH.600519", 100.0, "SHORT")
            assert quote.get_market_snapshot(["SZ.000001"])[1].last_price[0] == 11.53
            assert quote.get_market_snapshot(["US.NONE"]) == (-1, "未知股票 NONE")
            state = quote.get_global_state()[1]
            assert (state["market_us"], state["trd_logined"]) == ("AFTERNOON", True)
        finally:
            trade.close()
            quote.close()
    assert [request.operation for request in exchange.received("market")] == ["market"]


def test_faults_reach_the_client_and_a_restart_keeps_the_port(
    sdk: ModuleType, key: Path | None, exchange: Exchange
) -> None:
    with OpenD(exchange, rsa_key=key) as opend:
        where = {"host": "127.0.0.1", "port": opend.port, "is_encrypt": key is not None}
        context = sdk.OpenQuoteContext(**where)
        try:
            exchange.fault("market", FaultKind.REFUSE, text="no")
            exchange.fault("market", FaultKind.GARBAGE)
            exchange.fault("market", FaultKind.GARBAGE, text="sha")
            exchange.fault("market", FaultKind.LATE, seconds=0.2)
            exchange.fault("market", FaultKind.ACCEPT_THEN_CUT)
            answers = [context.get_global_state() for _ in range(5)]
        finally:
            context.close()
        assert [ret for ret, _ in answers] == [-1, -1, -1, 0, -1]
        assert (answers[0][1], answers[4][1]) == ("no", "Disconnect")
        with opend.stopped():
            assert opend.connected == 0
        context = sdk.OpenQuoteContext(**where)
        assert context.get_global_state()[0] == 0
        context.close()


def test_limits_are_enforced_in_the_brokers_words(sdk: ModuleType, exchange: Exchange) -> None:
    exchange.quote("US", "QQQ")
    with OpenD(exchange, enforce_limits=True) as opend:
        limit, _, gap, words = opend.limits["quote"]
        opend.limits["quote"] = (limit, 600.0, gap, words)  # longer than a slow machine asks
        context = sdk.OpenQuoteContext("127.0.0.1", opend.port)
        try:
            answers = [context.get_market_snapshot(["US.QQQ"]) for _ in range(61)]
        finally:
            context.close()
    assert [ret for ret, _ in answers] == [0] * 60 + [-1]
    assert answers[60][1] == "获取市场快照频率太高，请求失败，每30秒最多60次。"
    assert opend.violations == ["quote"]
