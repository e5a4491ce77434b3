"""A broker for child processes: what it does wrong is asked for by the ticker of a contract.

Needs the standard library and httptrading's plain modules only, as an SDK's own interpreter has.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import pickle
import signal
import struct
import sys
import threading
import time
import types
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from httptrading.brokers.base import OPERATIONS, BaseBroker, Window
from httptrading.brokers.registry import broker_register
from httptrading.errors import BrokerUnavailable, OrderNotFound, Rejected
from httptrading.model import Cash, Contract, Fill, Order, OrderReport, Quote


class NoFunds(Rejected):
    """An error of the broker's own."""

    def __init__(self, needed: int, there: int) -> None:
        super().__init__(f"{needed} needed, {there} there")
        self.answer = threading.Lock()  # an SDK's object: it cannot leave the process


@broker_register("isolated", "隔离证券")
class IsolatedBroker(BaseBroker):
    """`broker_args["ledger"]`: the file that is the broker's order book. Beside it, `.down` closes
    the book, a quote of HELD waits for `.free`. `.closed` tells that a
    connection was, `.silent` that a quote of GIL is about to hold it."""

    listing_delay = 0.1
    windows = {"once": Window(1, 3600.0)}
    ages = {"quote": 0.0, "cash": 0.0}

    @property
    def ledger(self) -> Path:
        return Path(self.broker_args["ledger"])

    def connect(self) -> None:
        if Path(self.broker_args["ledger"] + ".down").exists():
            raise BrokerUnavailable("The book is closed")
        print("printed while connecting")

    def quote(self, contract: Contract) -> Quote:  # type: ignore[override]
        while contract.ticker == "HELD" and not Path(f"{self.ledger}.free").exists():
            time.sleep(0.02)
        if contract.ticker == "SDK":
            return of_an_sdk(contract)
        self._tell(contract.ticker)
        misbehave(contract.ticker)
        value = {
            "PID": os.getpid(),
            "PARENT": os.getppid(),
            "MINOR": sys.version_info.minor,
            "TOKENS": len(self.tokens),
        }
        price = value.get(contract.ticker, 1)
        kind = type("Quote", (Quote,), {}) if contract.ticker == "LOCAL" else Quote
        quote: Quote = kind(contract, "USD", True, price, 1, 1, 1, 1, datetime.now(UTC))
        if contract.ticker == "LOCK":
            object.__setattr__(quote, "answer", threading.Lock())  # an SDK's
        return quote

    def close(self) -> None:
        Path(f"{self.ledger}.closed").touch()

    def _tell(self, ticker: str) -> None:
        match ticker:
            case "NEWS":
                self.stale()
                self.report_fills(Fill("f1", "1000", 1, 12, datetime.now(UTC)))
                self.restored()
            case "LOST":
                self.lost("The line was cut")
            case "ONCE":
                self.take("once")
            case "GIL":
                Path(f"{self.ledger}.silent").touch()

    def ping(self) -> object:  # type: ignore[override]
        return threading.Lock()  # an SDK's answer to it

    def cash(self) -> Cash:  # type: ignore[override]
        return Cash("USD", 1)

    def place_order(self, contract, order_type, qty, mark, **kwargs):  # type: ignore[no-untyped-def,override]
        if contract.ticker == "REFUSE":
            raise Rejected("Not this one")
        if contract.ticker == "FUNDS":
            raise NoFunds(10, 5)
        number = str(1000 + len(self._lines()))
        with self.ledger.open("a") as file:
            file.write(json.dumps({"id": number, "qty": qty, "mark": mark}) + "\n")
        misbehave(contract.ticker)
        return number

    def recent_orders(self) -> list[OrderReport]:  # type: ignore[override]
        return [
            OrderReport(Order(line["id"], "USD", line["qty"]), mark=line["mark"])
            for line in self._lines()
        ]

    def order(self, order_id: str) -> OrderReport:  # type: ignore[override]
        for report in self.recent_orders():
            if report.order.order_id == order_id:
                return report
        raise OrderNotFound("The book does not have it")

    def cancel_order(self, order_id: str) -> object:  # type: ignore[override]
        self.report(OrderReport(Order(order_id, "USD", 12, is_canceled=True)))
        return threading.Lock()  # an SDK's answer to it

    def _lines(self) -> list[dict]:  # type: ignore[type-arg]
        if not self.ledger.exists():
            return []
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]


def of_an_sdk(contract: Contract) -> Quote:
    """In kinds that only this process knows, as numpy.float64 and pandas.Timestamp may be."""
    sdk = types.ModuleType("an_sdk")
    sys.modules["an_sdk"] = sdk
    for base in (float, int, str, datetime):
        setattr(sdk, base.__name__, type(base.__name__, (base,), {"__module__": "an_sdk"}))
    moment = sdk.datetime(2026, 1, 2, 3, 4, 5, 600_000, ZoneInfo("Asia/Hong_Kong"))
    return Quote(contract, sdk.str("USD"), True, sdk.float(12.25), sdk.int(12), 1, 1, 1, moment)


@broker_register("isolatedQuotes", "双连接证券")
class IsolatedQuotes(IsolatedBroker):
    """Its quotes have a connection of their own."""

    connections = {
        "trade": tuple(one for one in OPERATIONS if one != "quote"),
        "quote": ("quote",),
    }


def misbehave(ticker: str) -> None:
    pipe = int(sys.argv[2]) if len(sys.argv) > 2 and sys.argv[2].isdigit() else -1
    match ticker:
        case "HANG":
            time.sleep(600)
        case "GIL":
            ctypes.PyDLL(None).sleep(600)  # holds the GIL, as longport's blocking calls do
        case "KILL":
            os.kill(os.getpid(), signal.SIGKILL)
        case "STOP":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "EXIT":
            os._exit(3)
        case "SEGV":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        case "JUNK":
            os.write(pipe, struct.pack("!i", 5) + b"\x00junk")
            time.sleep(600)
        case "PART":
            os.write(pipe, struct.pack("!i", 1000) + b"and then nothing more")
            time.sleep(600)
        case "HUGE":
            os.write(pipe, struct.pack("!i", 0x7FFFFFFF) + b"x" * 100)
            time.sleep(600)
        case "LIE":
            message = pickle.dumps(("nonsense", 1, 2))
            os.write(pipe, struct.pack("!i", len(message)) + message)
            time.sleep(600)
        case "CLOSE":
            os.close(pipe)
            time.sleep(600)
        case "CANCEL":
            raise asyncio.CancelledError
        case "SAY":
            print("said on stdout by print", flush=True)
            os.write(1, b"said on stdout by write\n")
