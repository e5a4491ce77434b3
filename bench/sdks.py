"""Each broker's SDK as its own documents use it: what a program without the gateway does."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from httptrading.brokers.tiger_http import device_id

Calls = Mapping[str, Callable[[int], Any]]
"""Operation → the SDK's call for it; the number makes one order differ from the next."""


def futu(args: Mapping[str, Any]) -> Calls:
    sdk: Any = importlib.import_module("futu")
    where = {"host": args["host"], "port": args["port"]}
    quotes = sdk.OpenQuoteContext(**where)
    trade = sdk.OpenSecTradeContext(
        filter_trdmarket=sdk.TrdMarket.NONE, security_firm=sdk.SecurityFirm.NONE, **where
    )

    def good(answer: Any) -> Any:
        code, found = answer
        if code != sdk.RET_OK:
            raise RuntimeError(found)
        return found

    accounts = good(trade.get_acc_list())
    usable = accounts[(accounts.trd_env == args["trade_env"]) & (accounts.acc_status == "ACTIVE")]
    account = {"trd_env": args["trade_env"], "acc_id": int(usable.acc_id.iloc[0])}
    good(trade.unlock_trade(password_md5=args["unlock_pin"]))

    def place(number: int) -> str:
        order = good(
            trade.place_order(
                price=price(number), qty=1, code="US.AAPL", trd_side=sdk.TrdSide.BUY, **account
            )
        )
        return str(order.order_id[0])

    order_id = place(0)
    return {
        "ping": lambda _: good(trade.get_global_state()),
        "cash": lambda _: good(trade.accinfo_query(currency="USD", refresh_cache=True, **account)),
        "positions": lambda _: good(trade.position_list_query(refresh_cache=True, **account)),
        "quote": lambda _: good(quotes.get_market_snapshot(["US.AAPL"])),
        "order": lambda _: good(
            trade.order_list_query(order_id=order_id, refresh_cache=True, **account)
        ),
        "place_order": place,
    }


def interactive_brokers(args: Mapping[str, Any]) -> Calls:
    sdk: Any = importlib.import_module("ib_insync")
    tws = sdk.IB()
    tws.connect(args["host"], args["port"], clientId=args["client_id"] + 1)
    contract = sdk.Stock("AAPL", "SMART", "USD")
    tws.qualifyContracts(contract)

    def place(number: int) -> Any:
        trade = tws.placeOrder(contract, sdk.LimitOrder("BUY", 1, price(number)))
        while trade.order.permId == 0:  # TWS has not confirmed it yet
            tws.waitOnUpdate()
        return trade

    perm_id = place(0).order.permId
    return {
        "ping": lambda _: tws.reqCurrentTime(),
        "cash": lambda _: tws.accountSummary(),
        "positions": lambda _: tws.reqPositions(),
        "quote": lambda _: tws.reqTickers(contract),
        "order": lambda _: next(one for one in tws.trades() if one.order.permId == perm_id),
        "place_order": place,
    }


def longbridge(args: Mapping[str, Any]) -> Calls:
    sdk: Any = importlib.import_module("longport.openapi")
    token = tomllib.loads(Path(args["token_file"]).read_text())["token"]
    config = sdk.Config(
        args["app_key"],
        args["app_secret"],
        token,
        http_url=args["http_url"],
        quote_ws_url=args["quote_ws_url"],
        trade_ws_url=args["trade_ws_url"],
        enable_print_quote_packages=False,
    )
    quotes, trade = sdk.QuoteContext(config), sdk.TradeContext(config)

    def place(number: int) -> Any:
        return trade.submit_order(
            "AAPL.US",
            sdk.OrderType.LO,
            sdk.OrderSide.Buy,
            Decimal(1),
            sdk.TimeInForceType.Day,
            submitted_price=Decimal(str(price(number))),
        )

    order_id = place(0).order_id
    return {
        "ping": lambda _: trade.account_balance(),
        "cash": lambda _: trade.account_balance("USD"),
        "positions": lambda _: trade.stock_positions(),
        "quote": lambda _: quotes.quote(["AAPL.US"]),
        "order": lambda _: trade.order_detail(order_id),
        "place_order": place,
    }


def tiger(args: Mapping[str, Any]) -> Calls:
    config_module: Any = importlib.import_module("tigeropen.tiger_open_config")
    sign: Any = importlib.import_module("tigeropen.common.util.signature_utils")
    contracts: Any = importlib.import_module("tigeropen.common.util.contract_utils")
    trade_module: Any = importlib.import_module("tigeropen.trade.trade_client")
    quote_module: Any = importlib.import_module("tigeropen.quote.quote_client")
    config = config_module.TigerOpenClientConfig(enable_dynamic_domain=False)
    config.tiger_id, config.account = args["tiger_id"], args["account"]
    # The gateway beside it is the same device, or they would take the quotes from each other.
    config._device_id = device_id(config.tiger_id)
    config.private_key = sign.read_private_key(args["pk_path"])
    config.tiger_public_key = args["tiger_public_key"]
    config.server_url = config.quote_server_url = args["server_url"]
    trade = trade_module.TradeClient(config)
    quotes = quote_module.QuoteClient(config)
    contract = contracts.stock_contract("AAPL", "USD")

    def place(number: int) -> int:
        # With a number reserved first: without it, nothing protects against a second sending.
        order = trade.create_order(
            config.account, contract, "BUY", "LMT", 1, limit_price=price(number)
        )
        return int(trade.place_order(order))

    order_id = place(0)
    return {
        "ping": lambda _: trade.get_managed_accounts(config.account),
        "cash": lambda _: trade.get_prime_assets(config.account, base_currency="USD"),
        "positions": lambda _: trade.get_positions(config.account, sec_type="STK"),
        "quote": lambda _: quotes.get_stock_briefs(["AAPL"]),
        "order": lambda _: trade.get_order(config.account, id=order_id),
        "place_order": place,
    }


def price(number: int) -> float:
    return (10000 + number) / 100


SDKS: Mapping[str, Callable[[Mapping[str, Any]], Calls]] = {
    "Futu": futu,
    "InteractiveBrokers": interactive_brokers,
    "LongBridge": longbridge,
    "Tiger": tiger,
}
