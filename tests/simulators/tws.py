"""A TWS/IB Gateway on the wire: the socket protocol in front of an `Exchange`.

Framing and field orders are those that ib_insync 0.9.86 and ib_async 2.1.0 write and read
(their `client.py` and `decoder.py`), for server versions 176 to 178. The simulator answers from one
thread of its own; scripting it from tests is safe from any thread.

What it does as the real one is said to do, because earlier gateways broke on it:
- several client ids; an id in use is refused (326) and the socket closed;
- an order belongs to its client id: pushes go there, others get 10147 when they cancel it;
- the account-wide permId comes with the first push, not with the request;
- completed orders carry neither order id nor client id, filled ones a total quantity of 0;
- error codes that sound fatal and are not (10349, 399), a refusal that comes after `Inactive`;
- more than 50 messages within a second are answered by error 100, the third time by a cut.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from simulators.exchange import (
    Exchange,
    ExchangeFill,
    ExchangeOrder,
    Fault,
    FaultKind,
    OrderStatus,
    keep_port,
)
from simulators.tws_wire import (
    COMPLETED_ORDER,
    CONTRACT_FIELDS,
    OPEN_ORDER,
    OPERATIONS,
    ORDER_CONTRACT,
    ORDER_DEFAULTS,
    PLACE_FIELDS,
    WIRE_STATUS,
    written,
)

REGION_BY_CURRENCY = {"USD": "US", "HKD": "HK", "CNH": "CN"}
# (time zone, trading sessions, liquid sessions) of an ordinary day, in the exchange's local time.
SESSIONS = {
    "US": ("US/Eastern", ["0400-2000"], ["0930-1600"]),
    "HK": ("Hongkong", ["0900-1200", "1300-1610"], ["0930-1200", "1300-1600"]),
    "CN": ("Asia/Shanghai", ["0915-1130", "1300-1500"], ["0930-1130", "1300-1500"]),
}
RATE_TEXT = "Max rate of messages per second has been exceeded"
UNKNOWN_CONTRACT = "No security definition has been found for the request"


@dataclass(frozen=True)
class Listing:
    """One security as reqContractDetails describes it."""

    con_id: int
    symbol: str  # the broker's spelling: "BRK B", "700"
    currency: str
    primary_exchange: str
    exchanges: str  # validExchanges
    long_name: str = ""

    @property
    def region(self) -> str:
        if self.primary_exchange == "SEHK":  # some counters trade in CNH
            return "HK"
        return REGION_BY_CURRENCY.get(self.currency, self.currency)

    @property
    def ticker(self) -> str:
        """The spelling of the unified interface: BRK.B, 00700."""
        return self.symbol.zfill(5) if self.region == "HK" else self.symbol.replace(" ", ".")


US_EXCHANGES = "SMART,AMEX,NYSE,CBOE,ISLAND,OVERNIGHT,NASDAQ,ARCA"
LISTINGS = (
    Listing(756733, "SPY", "USD", "ARCA", US_EXCHANGES, "SPDR S&P 500 ETF TRUST"),
    Listing(265598, "AAPL", "USD", "NASDAQ", US_EXCHANGES, "APPLE INC"),
    Listing(320227571, "QQQ", "USD", "NASDAQ", US_EXCHANGES, "INVESCO QQQ TRUST SERIES 1"),
    Listing(72063691, "BRK B", "USD", "NYSE", US_EXCHANGES, "BERKSHIRE HATHAWAY INC-CL B"),
    Listing(152791428, "700", "HKD", "SEHK", "SEHK,SMART", "TENCENT HOLDINGS LTD"),
    Listing(53246785, "5", "HKD", "SEHK", "SEHK,SMART", "HSBC HOLDINGS PLC"),
    Listing(138180201, "600519", "CNH", "SEHKNTL", "SEHKNTL", "KWEICHOW MOUTAI CO LTD-A"),
    Listing(271895427, "000001", "CNH", "SEHKSZSE", "SEHKSZSE", "PING AN BANK CO LTD-A"),
    # One symbol and currency on two primary exchanges: ambiguous unless the caller chooses.
    Listing(11111, "TWIN", "USD", "NYSE", US_EXCHANGES, "TWIN INDUSTRIES"),
    Listing(22222, "TWIN", "USD", "PINK", "SMART,PINK", "TWIN HOLDINGS"),
)


class Tws:
    """A simulated TWS; `with Tws(exchange) as tws:` listens on `tws.host`, `tws.port`."""

    host = "127.0.0.1"
    # Its day is far from both its ends, whenever the tests run: yesterday's orders are not listed.
    timezone = f"Etc/GMT{datetime.now(UTC).hour - 12:+d}"

    def __init__(
        self,
        exchange: Exchange,
        port: int = 0,
        *,
        accounts: Iterable[str] = ("DU1234567",),
        base_currency: str = "USD",
        server_version: int = 178,
    ) -> None:
        self.exchange = exchange
        self.port = port
        self.accounts = list(accounts)
        self.base_currency = base_currency
        self.server_version = server_version
        # --- switches of the script ---
        self.unanswered: set[str] = set()  # requests of which it says nothing
        self.deaf = False  # takes everything in, answers nothing
        # What is sent waits until what was sent before is acknowledged (RFC 896).
        self.holds_back = False
        self.linked = True  # the connection between TWS and IB's servers
        self.tells_outage = True  # a connection made during one (2110), not only the open ones
        self.live_data = True  # the account may see live quotes
        self.delayed_data = True  # … delayed ones
        self.quote_advice: tuple[int, str] | None = None  # before the quote (10090 …)
        self.quote_error: tuple[int, str] | None = None  # instead of any quote (10197 …)
        self.snapshot_ends = True  # tickSnapshotEnd is sent (it may take 11 s at the real one)
        self.halted: set[tuple[str, str]] = set()
        self.ledger_prefix = ""  # "$LEDGER-" in newer TWS
        self.garbled = False  # openOrder comes without its last field
        self.order_messages: list[tuple[int, str]] = []  # sent with every accepted order
        self.execution_time = "%Y%m%d %H:%M:%S UTC"  # of a moment in UTC
        self.unnumbered: set[str] = set()  # orders of which TWS says the permId 0
        self.tells_completed = False  # completedOrder without being asked, as some TWS do
        self.only_executions = False  # all that is told of orders, in lists as well
        self.binding = "openOrder"  # what tells client 0 the API id of an order made by hand
        # Says what becomes of an order that was taken in, instead of what usually does.
        self.on_place: Callable[[_Connection, ExchangeOrder], None] | None = None
        self.held_client_ids: set[int] = set()  # in use by somebody else
        self.messages_per_second = 50
        self.now: Callable[[], float] = time.time
        self.closed_days: dict[str, set[str]] = {"US": set(), "HK": set(), "CN": set()}
        self.half_days: dict[str, dict[str, str]] = {}  # region -> date -> last minute HHMM
        self.overnight_listed = True
        self.listings = list(LISTINGS)
        # --- the record ---
        self.message_times: list[float] = []  # of every message of every client
        self.rate_violations = 0
        self.connections = 0
        self.resets = 0  # of those, that the client has ended without a last word
        self.fills_from = 0.0  # executions before this epoch are of an earlier day
        # --- the machinery ---
        self._perm_ids = itertools.count(1845203701)
        self._con_ids = itertools.count(900001)
        self._bound_ids = itertools.count(-1, -1)
        self._summaries: set[tuple[int, int]] = set()
        self._clients: set[_Connection] = set()
        self._told_fills: set[str] = set()
        self._collected: list[ExchangeOrder] | None = None
        self._port_is_kept = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # --- life -----------------------------------------------------------------------------
    def start(self) -> Tws:
        if not self._port_is_kept:  # from now on, also while it is stopped
            self.port, self._port_is_kept = keep_port(self, self.port), True
        ready = threading.Event()
        failure: list[BaseException] = []
        loop = asyncio.new_event_loop()

        def serve() -> None:
            asyncio.set_event_loop(loop)
            try:
                server = loop.run_until_complete(
                    loop.create_server(
                        lambda: _Connection(self), self.host, self.port, reuse_address=True
                    )
                )
            except OSError as error:
                failure.append(error)
                loop.close()
                ready.set()
                return
            ready.set()
            loop.run_forever()
            server.close()
            for client in list(self._clients):
                client.abort()
            # One turn for connection_lost, so that every socket is closed with the loop.
            loop.run_until_complete(asyncio.sleep(0))
            loop.run_until_complete(server.wait_closed())
            loop.close()

        self._thread = threading.Thread(target=serve, name="tws-simulator", daemon=True)
        self._thread.start()
        ready.wait()
        if failure:
            raise failure[0]
        self._loop = loop
        self.exchange.on_change.append(self._on_change)
        return self

    def stop(self) -> None:
        """Closes the port and every connection; `start()` opens the same port again."""
        if self._loop is None or self._thread is None:
            return
        self.exchange.on_change.remove(self._on_change)
        loop, self._loop = self._loop, None
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join(60)
        self._thread = None
        self._summaries.clear()

    def __enter__(self) -> Tws:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def restart(self, *, new_day: bool = False) -> None:
        """The nightly restart: all connections end, working orders live on under their permId."""
        self.stop()
        if new_day:
            self.fills_from = time.time()
        self.start()

    def cut(self) -> None:
        """Every connection breaks at once; the port stays open."""
        self.do(lambda: [client.abort() for client in list(self._clients)])

    # --- what a test makes it say and do --------------------------------------------------
    def say(self, code: int, text: str, request_id: int = -1) -> None:
        """Sends an error message to every client."""
        self.do(lambda: [client.error(request_id, code, text) for client in list(self._clients)])

    def link(self, up: bool, *, data_kept: bool = True) -> None:
        """IB's servers go away (1100) or come back (1102, or 1101 when subscriptions are lost)."""
        self.linked = up
        if not up:
            self.say(1100, "Connectivity between IB and Trader Workstation has been lost.")
        elif data_kept:
            self.say(
                1102,
                "Connectivity between IB and Trader Workstation has been restored - "
                "data maintained.",
            )
        else:
            self.say(
                1101,
                "Connectivity between IB and Trader Workstation has been restored - data lost.",
            )

    def list_security(
        self, symbol: str, currency: str = "USD", primary_exchange: str = "NASDAQ"
    ) -> Listing:
        exchanges = US_EXCHANGES if currency == "USD" else primary_exchange
        listing = Listing(next(self._con_ids), symbol, currency, primary_exchange, exchanges)
        self.listings.append(listing)
        return listing

    def place_elsewhere(
        self, ticker: str, qty: int, price: str, *, client_id: int = 0, order_id: int = 0
    ) -> ExchangeOrder:
        """An order of another API client, or (client id 0, order id 0) one made by hand in TWS."""
        wire = {
            **dict.fromkeys(PLACE_FIELDS, ""),
            "orderId": order_id,
            "clientId": client_id,
            "exchange": "SMART",
            "orderType": "LMT",
            "tif": "DAY",
            "outsideRth": "0",
        }
        return self.exchange.place(
            ExchangeOrder(
                order_id=str(next(self._perm_ids)),
                region="US",
                ticker=ticker,
                direction="BUY",
                order_type="Limit",
                price=Decimal(price),
                qty=Decimal(qty),
                time_in_force="DAY",
                lifecycle="RTH",
                account=self.accounts[0],
                wire=wire,
            )
        )

    def most_messages_in(self, seconds: float) -> int:
        """The largest number of API messages within any window of that length."""
        most, start = 0, 0
        for end, moment in enumerate(self.message_times):
            while moment - self.message_times[start] >= seconds:
                start += 1
            most = max(most, end - start + 1)
        return most

    @property
    def client_ids(self) -> set[int]:
        return {client.client_id for client in set(self._clients) if client.started}

    # --- pushes ---------------------------------------------------------------------------
    def do(self, action: Callable[[], object]) -> None:
        """Runs an action, of a client, say, in the simulator's thread and waits for it."""
        loop = self._loop
        if loop is None:
            return
        done = threading.Event()

        def run() -> None:
            try:
                action()
            finally:
                done.set()

        loop.call_soon_threadsafe(run)
        done.wait(60)

    def _on_change(self, order: ExchangeOrder) -> None:
        snapshot = replace(order, fills=list(order.fills))
        if self._collected is not None and threading.current_thread() is self._thread:
            self._collected.append(snapshot)
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._push, snapshot)

    def _push(self, order: ExchangeOrder) -> None:
        """Tells the owner of an order what became of it."""
        for client in list(self._clients):
            if client.started and client.client_id == order.wire["clientId"]:
                if client.binds:
                    client._bind()
                if order.wire["orderId"]:
                    client.tell_order(order)

    # --- answers that need the whole ------------------------------------------------------
    def find_listings(self, contract: dict[str, str]) -> list[Listing]:
        """What reqContractDetails finds for a (partial) contract."""
        self._list_quoted()
        exchange = contract["exchange"]

        def fits(listing: Listing) -> bool:
            if int(contract["conId"] or 0):
                return listing.con_id == int(contract["conId"])
            return (
                contract["secType"] == "STK"
                and listing.symbol == contract["symbol"].upper()
                and contract["currency"] in ("", listing.currency)
                and contract["primaryExchange"] in ("", listing.primary_exchange)
                and (not exchange or exchange in listing.exchanges.split(","))
                and (exchange != "OVERNIGHT" or self.overnight_listed)
            )

        return [listing for listing in self.listings if fits(listing)]

    def _list_quoted(self) -> None:
        """Every security that the test gave a price or a position exists."""
        with self.exchange.lock:
            wanted = set(self.exchange.quotes)
            wanted |= {(held.region, held.ticker) for held in self.exchange.positions}
        for region, ticker in wanted:
            if any((each.region, each.ticker) == (region, ticker) for each in self.listings):
                continue
            if region == "HK":
                self.list_security(ticker.lstrip("0"), "HKD", "SEHK")
            elif region == "CN":
                shanghai = ticker.startswith(("6", "5", "9"))
                self.list_security(ticker, "CNH", "SEHKNTL" if shanghai else "SEHKSZSE")
            else:
                self.list_security(ticker.replace(".", " "))

    def listing_of(self, region: str, ticker: str) -> Listing:
        self._list_quoted()
        for listing in self.listings:
            if (listing.region, listing.ticker) == (region, ticker):
                return listing
        raise AssertionError(f"{region}.{ticker} is not listed at the simulator")

    def hours(self, listing: Listing, exchange: str) -> tuple[str, str, str]:
        """(time zone, tradingHours, liquidHours) for six days from today, as TWS writes them."""
        zone, trading, liquid = SESSIONS.get(listing.region, SESSIONS["US"])
        today = datetime.fromtimestamp(self.now(), ZoneInfo(zone)).date()
        days = [today + timedelta(days=n) for n in range(6)]
        closed = self.closed_days.get(listing.region, set())
        halves = self.half_days.get(listing.region, {})
        written: list[list[str]] = [[], []]
        for day in days:
            date = day.strftime("%Y%m%d")
            if exchange == "OVERNIGHT":
                following = day + timedelta(days=1)
                opens = following.weekday() < 5 and following.strftime("%Y%m%d") not in closed
                text = f"{date}:2000-{following.strftime('%Y%m%d')}:0350"
                for part in written:
                    part.append(text if opens else f"{date}:CLOSED")
                continue
            for part, sessions in zip(written, (trading, liquid), strict=True):
                if day.weekday() >= 5 or date in closed:
                    part.append(f"{date}:CLOSED")
                    continue
                last = halves.get(date, "2400")
                if sessions is trading and listing.region == "US" and date in halves:
                    last = "1700"
                for session in sessions:
                    begin, end = session.split("-")
                    if begin < last:
                        part.append(f"{date}:{begin}-{date}:{min(end, last)}")
        return zone, ";".join(written[0]), ";".join(written[1])


class _Connection(asyncio.Protocol):
    """One API client's socket."""

    def __init__(self, tws: Tws) -> None:
        self.tws = tws
        self.exchange = tws.exchange
        self.version = 0
        self.client_id = -1
        self.started = False
        self.muted = False
        self.market_data_type = 1
        self.account_updates = ""
        self.binds = False  # by reqAutoOpenOrders
        self._data = b""
        self._said_api = False
        self._times: list[float] = []
        self._late: list[list[str]] | None = None  # messages behind one that is answered late
        self._late_action: Callable[[], object] = lambda: None
        self._gathered: list[bytes] | None = None  # messages that go out as one
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, not self.tws.holds_back)
        self.tws._clients.add(self)
        self.tws.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.tws._clients.discard(self)
        self.tws.resets += isinstance(exc, ConnectionResetError)
        if self._late is not None:  # read already: done before the next connection is served
            self._late = None
            self._late_action()
        self.tws._summaries = {
            each for each in self.tws._summaries if each[0] != self.client_id or not self.started
        }

    def abort(self) -> None:
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self._data += data
        if not self._said_api:
            if len(self._data) < 4:
                return
            if not self._data.startswith(b"API\0"):
                self.abort()
                return
            self._data, self._said_api = self._data[4:], True
        while len(self._data) >= 4:
            size = struct.unpack(">I", self._data[:4])[0]
            if len(self._data) < 4 + size:
                return
            frame, self._data = self._data[4 : 4 + size], self._data[4 + size :]
            if self.transport.is_closing():
                return
            if not self.version:
                self._shake_hands(frame.decode())
            elif self._late is not None:
                self._late.append(frame.decode().split("\0")[:-1])
            else:
                self._receive(frame.decode().split("\0")[:-1])

    def send(self, *fields: object) -> None:
        if self.muted or self.tws.deaf or self.transport.is_closing():
            return
        message = b"".join(f"{written(field)}\0".encode() for field in fields)
        message = struct.pack(">I", len(message)) + message
        if self._gathered is not None:
            self._gathered.append(message)
        else:
            self.transport.write(message)

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """What is sent inside arrives together, however slowly this thread runs."""
        self._gathered = gathered = []
        try:
            yield
        finally:
            self._gathered = None
        if gathered and not self.transport.is_closing():
            self.transport.write(b"".join(gathered))

    def error(self, request_id: int, code: int, text: str) -> None:
        self.send(4, 2, request_id, code, text, "")

    def _shake_hands(self, offer: str) -> None:
        newest = int(offer.split()[0].split("..")[1])
        self.version = min(newest, self.tws.server_version)
        self.send(self.version, datetime.now(UTC).strftime("%Y%m%d %H:%M:%S UTC"))

    # --- dispatch -------------------------------------------------------------------------
    def _receive(self, fields: list[str]) -> None:
        self.tws.message_times.append(time.monotonic())
        number = int(fields[0])
        operation = OPERATIONS.get(number, f"message {number}")
        action, record = self._request(number, fields[1:])
        fault = self.exchange.receive(operation, clientId=self.client_id, **record)
        if self._too_fast():
            self.error(int(record.get("reqId", record.get("orderId", -1)) or -1), 100, RATE_TEXT)
            return
        if record.get("request") in self.tws.unanswered:
            return
        if fault is None:
            action()
        else:
            self._go_wrong(fault, operation, record, action)

    def _too_fast(self) -> bool:
        now = time.monotonic()
        self._times = [moment for moment in self._times if now - moment < 1.0] + [now]
        if len(self._times) <= self.tws.messages_per_second:
            return False
        self.tws.rate_violations += 1
        if self.tws.rate_violations >= 3:
            self.abort()
        return True

    def _go_wrong(
        self, fault: Fault, operation: str, record: dict[str, Any], action: Callable[[], object]
    ) -> None:
        request_id = int(record.get("reqId", record.get("orderId", -1)) or -1)
        match fault.kind:
            case FaultKind.REFUSE:
                code, text = _code_and_text(fault.text, 201 if operation == "place" else 321)
                self.error(request_id, code, text)
            case FaultKind.RATE_LIMIT:
                self.error(request_id, 100, fault.text or RATE_TEXT)
            case FaultKind.HANG:
                pass
            case FaultKind.LATE:
                # TWS takes one client's messages in their order.
                self._late, self._late_action = [], action
                asyncio.get_running_loop().call_later(fault.seconds, self._catch_up)
            case FaultKind.GARBAGE:
                # Not even framed: whatever follows is unreadable for the client.
                self.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            case FaultKind.CUT:
                self.abort()
            case FaultKind.ACCEPT_THEN_CUT | FaultKind.ACCEPT_THEN_HANG:
                self.muted = True
                action()
                self.muted = False
                if fault.kind is FaultKind.ACCEPT_THEN_CUT:
                    self.abort()

    def _catch_up(self) -> None:
        if self._late is None:
            return  # the connection ended meanwhile
        waiting, self._late = self._late, None
        self._late_action()
        for fields in waiting:
            if self._late is not None:
                self._late.append(fields)
            elif not self.transport.is_closing():
                self._receive(fields)

    def _request(
        self, number: int, fields: list[str]
    ) -> tuple[Callable[[], object], dict[str, Any]]:
        """What to do about a message, and what to write into the record."""
        match number:
            case 71:
                return lambda: self._start(int(fields[1])), {"id": int(fields[1])}
            case 49:
                return lambda: self.send(49, 1, int(self.tws.now())), {}
            case 1:
                contract = dict(zip(CONTRACT_FIELDS, fields[2:14], strict=False))
                record = {"reqId": fields[1], **contract, "snapshot": fields[16]}
                return lambda: self._quote(int(fields[1]), contract), record
            case 3:
                wire: dict[str, Any] = dict(zip(PLACE_FIELDS, fields, strict=False))
                return lambda: self._place(wire), {**wire, "fieldCount": len(fields)}
            case 4:
                return lambda: self._cancel(int(fields[1])), {"orderId": fields[1]}
            case 15:
                return lambda: setattr(self, "binds", True), {}
            case 5:
                return lambda: self._open_orders(own=True), {"request": "reqOpenOrders"}
            case 16:
                return lambda: self._open_orders(own=False), {"request": "reqAllOpenOrders"}
            case 99:
                return self._completed_orders, {"request": "reqCompletedOrders"}
            case 7:
                record = {"reqId": fields[1], "request": "reqExecutions"}
                return lambda: self._executions(int(fields[1])), record
            case 9:
                contract = dict(zip(CONTRACT_FIELDS, fields[2:14], strict=False))
                record = {"reqId": fields[1], **contract}
                return lambda: self._contract_details(int(fields[1]), contract), record
            case 61:
                return self._positions, {}
            case 6:
                return lambda: self._account_updates(fields), {"request": "reqAccountUpdates"}
            case 76:
                record = {"reqId": fields[1], "request": "reqAccountUpdatesMulti"}
                return lambda: self._account_updates_multi(int(fields[1]), fields[2]), record
            case 62:
                record = {"reqId": fields[1], "tags": fields[3], "request": "reqAccountSummary"}
                return lambda: self._account_summary(int(fields[1])), record
            case 63:
                return (
                    lambda: self.tws._summaries.discard((self.client_id, int(fields[1]))),
                    {"reqId": fields[1]},
                )
            case 59:
                return lambda: setattr(self, "market_data_type", int(fields[1])), {
                    "type": int(fields[1])
                }
            case _:
                return lambda: None, {"fields": fields}

    # --- session --------------------------------------------------------------------------
    def _start(self, client_id: int) -> None:
        taken = client_id in self.tws.client_ids or client_id in self.tws.held_client_ids
        if taken:
            self.error(
                -1,
                326,
                "Unable to connect as the client id is already in use. "
                "Retry with a unique client id.",
            )
            self.transport.close()
            return
        self.client_id = client_id
        self.started = not self.tws.deaf
        self.send(15, 1, ",".join(self.tws.accounts))
        self.send(9, 1, self._next_order_id())
        if self.tws.linked or not self.tws.tells_outage:
            self.error(-1, 2104, "Market data farm connection is OK:usfarm")
            self.error(-1, 2106, "HMDS data farm connection is OK:ushmds")
            self.error(-1, 2158, "Sec-def data farm connection is OK:secdefnj")
        else:
            self.error(
                -1,
                2110,
                "Connectivity between Trader Workstation and server is broken. "
                "It will be restored automatically.",
            )

    def _next_order_id(self) -> int:
        with self.exchange.lock:
            used = [
                int(order.wire["orderId"])
                for order in self.exchange.orders.values()
                if order.wire["clientId"] == self.client_id
            ]
        return max(used, default=0) + 1

    # --- orders ---------------------------------------------------------------------------
    def _place(self, wire: dict[str, Any]) -> None:
        order_id = int(wire["orderId"])
        refusal = self._refusal(wire)
        if refusal is not None:
            self.error(order_id, *refusal)
            return
        listing = self.tws.find_listings(wire)[0]
        overnight = wire["exchange"] == "OVERNIGHT"
        lifecycle = "OVERNIGHT" if overnight else "ETH" if wire["outsideRth"] == "1" else "RTH"
        order = ExchangeOrder(
            order_id=str(next(self.tws._perm_ids)),
            region=listing.region,
            ticker=listing.ticker,
            direction=wire["action"],
            order_type="Limit" if wire["orderType"] == "LMT" else "Market",
            price=Decimal(wire["lmtPrice"]) if wire["lmtPrice"] else None,
            qty=Decimal(wire["totalQuantity"]),
            time_in_force=wire["tif"],
            lifecycle=lifecycle,
            mark=wire["orderRef"],
            account=wire["account"] or self.tws.accounts[0],
            wire={**wire, "orderId": order_id, "clientId": self.client_id},
        )
        if self.tws.on_place is not None:
            with self.exchange.lock:
                self.exchange.orders[order.order_id] = order
            self.tws.on_place(self, order)
            return
        self.tws._collected = changes = []
        try:
            self.exchange.place(order)
        finally:
            self.tws._collected = None
        for number, change in enumerate(changes):
            self.tell_order(change)
            if not number:
                for code, text in self.tws.order_messages:
                    self.error(order_id, code, text)

    def _refusal(self, wire: dict[str, Any]) -> tuple[int, str] | None:
        """TWS's own validation; None when the order is taken in."""
        with self.exchange.lock:
            used = any(
                order.wire["clientId"] == self.client_id
                and int(order.wire["orderId"]) == int(wire["orderId"])
                for order in self.exchange.orders.values()
            )
        if used:
            return 103, "Duplicate order id"
        if not wire["account"] and len(self.tws.accounts) > 1:
            return 435, "You must specify an account."
        if wire["account"] and wire["account"] not in self.tws.accounts:
            return 321, "Error validating request:-'bW' : cause - Invalid account code"
        if not self.tws.find_listings(wire):
            return 200, UNKNOWN_CONTRACT
        if Decimal(wire["totalQuantity"]) % 1:
            return 10243, "Fractional-sized order cannot be placed via API."
        if wire["orderType"] == "LMT" and not wire["lmtPrice"]:
            return 321, "Error validating request:-'bV' : cause - The price is missing"
        if wire["exchange"] == "OVERNIGHT":
            if wire["orderType"] != "LMT" or wire["tif"] != "DAY":
                return 201, "Order rejected - reason:Overnight takes DAY limit orders only"
        return None

    def _cancel(self, order_id: int) -> None:
        order = self._own(order_id)
        if order is None:
            self.error(
                order_id, 10147, f"OrderId {order_id} that needs to be cancelled is not found."
            )
        elif order.status.is_final:
            self.error(
                order_id,
                10148,
                f"OrderId {order_id} that needs to be cancelled can not be cancelled, "
                f"state: {WIRE_STATUS[order.status]}.",
            )
        else:
            self.tws._collected = changes = []
            try:
                self.exchange.cancel(order.order_id)
            finally:
                self.tws._collected = None
            for change in changes:
                self.tell_order(change)

    def _own(self, order_id: int) -> ExchangeOrder | None:
        with self.exchange.lock:
            for order in self.exchange.orders.values():
                if (order.wire["clientId"], order.wire["orderId"]) == (self.client_id, order_id):
                    return order
        return None

    def tell_order(self, order: ExchangeOrder) -> None:
        """openOrder, new executions, orderStatus, and the error that goes with the end."""
        if not self.tws.only_executions:
            self.open_order(order)
        for fill in order.fills:
            if fill.fill_id not in self.tws._told_fills:
                self.tws._told_fills.add(fill.fill_id)
                self._execution(-1, order, fill)
        if self.tws.only_executions:
            return
        if self.tws.tells_completed and order.status.is_final:
            self._completed_order(order)
        self._order_status(order)
        order_id = order.wire["orderId"]
        if order.status is OrderStatus.REJECTED:
            code, text = _code_and_text(order.reason, 201)
            self.error(order_id, code, f"Order rejected - reason:{text}")
        elif order.status in (OrderStatus.CANCELED, OrderStatus.EXPIRED):
            self.error(order_id, 202, f"Order Canceled - reason:{order.reason}")

    def say(self, order: ExchangeOrder, status: str) -> None:
        """openOrder and orderStatus with any status word."""
        self.open_order(order, status)
        self._order_status(order, status)

    def _order_status(self, order: ExchangeOrder, status: str = "") -> None:
        last = order.fills[-1].price if order.fills else 0
        self.send(
            *(3, order.wire["orderId"], status or WIRE_STATUS[order.status], order.filled),
            *(order.qty - order.filled, order.avg_price, self._perm_id(order), 0, last),
            *(order.wire["clientId"], "", 0),
        )

    def open_order(self, order: ExchangeOrder, status: str = "") -> None:
        order_id = order.wire["orderId"]
        if self.tws.binding != "openOrder":
            order_id = max(0, order_id)
        values = {**self._order_values(order), "orderId": order_id}
        if status:
            values["status"] = status
        self._send_named(5, OPEN_ORDER, values)

    def _perm_id(self, order: ExchangeOrder) -> str:
        return "0" if order.order_id in self.tws.unnumbered else order.order_id

    def _order_values(self, order: ExchangeOrder) -> dict[str, object]:
        """The fields of openOrder and completedOrder that say something."""
        wire = order.wire
        return {
            **dict(zip(ORDER_CONTRACT, self._contract(order), strict=True)),
            "action": order.direction,
            "totalQuantity": order.qty,
            "orderType": wire["orderType"],
            "lmtPrice": order.price or 0,
            "tif": wire["tif"],
            "account": order.account,
            "orderRef": order.mark,
            "clientId": wire["clientId"],
            "permId": self._perm_id(order),
            "outsideRth": wire["outsideRth"] or 0,
            "status": WIRE_STATUS[order.status],
        }

    def _send_named(self, number: int, names: list[str], values: dict[str, object]) -> None:
        if self.version >= 177:
            names = [name for name in names if name != "faProfile"]
        if self.tws.garbled:
            names = names[:-1]
        self.send(number, *(values.get(name, ORDER_DEFAULTS.get(name, "")) for name in names))

    def _contract(self, order: ExchangeOrder) -> list[object]:
        listing = self.tws.listing_of(order.region, order.ticker)
        symbol = listing.symbol
        exchange = order.wire["exchange"] or "SMART"
        return [
            *(listing.con_id, symbol, "STK", "", 0, "?", "", exchange),
            *(listing.currency, symbol, symbol),
        ]

    def _bind(self) -> None:
        """Orders made by hand become client 0's, under negative ids (TWS's default)."""
        for order in self._listed():
            if not order.wire["orderId"] and not order.status.is_final:
                order.wire["orderId"] = next(self.tws._bound_ids)
                self.send(100, order.order_id, self.client_id, order.wire["orderId"])

    def _open_orders(self, *, own: bool) -> None:
        if own and self.client_id == 0:
            self._bind()
        for order in self._listed():
            if order.status.is_final or (own and order.wire["clientId"] != self.client_id):
                continue
            self.open_order(order)
            self._order_status(order)
        self.send(53, 1)

    def _listed(self) -> list[ExchangeOrder]:
        if self.tws.only_executions:
            return []
        with self.exchange.lock:
            return [replace(order) for order in self.exchange.orders.values()]

    def _completed_orders(self) -> None:
        for order in self._listed():
            if order.status.is_final:
                self._completed_order(order)
        self.send(102)

    def _completed_order(self, order: ExchangeOrder) -> None:
        filled = order.status is OrderStatus.FILLED
        if filled:
            text = f"Filled Size: {order.filled}"
        elif order.status is OrderStatus.REJECTED:
            text = f"Order rejected - reason:{_code_and_text(order.reason, 201)[1]}"
        else:
            text = order.reason or "Cancelled by Trader"
        values = {
            **self._order_values(order),
            "totalQuantity": 0 if filled else order.qty,
            "filledQuantity": order.filled,
            "completedTime": datetime.now(UTC).strftime("%Y%m%d %H:%M:%S UTC"),
            "completedStatus": text,
        }
        self._send_named(101, COMPLETED_ORDER, values)

    def _executions(self, request_id: int) -> None:
        with self.exchange.lock:
            orders = [replace(order, fills=list(order.fills)) for order in self._all_orders()]
        for order in orders:
            for fill in order.fills:
                if fill.epoch >= self.tws.fills_from:
                    self._execution(request_id, order, fill)
            if self.tws.tells_completed and order.status.is_final:
                self._completed_order(order)
        self.send(55, 1, request_id)

    def _all_orders(self) -> Iterable[ExchangeOrder]:
        return self.exchange.orders.values()

    def _execution(self, request_id: int, order: ExchangeOrder, fill: ExchangeFill) -> None:
        before = order.fills[: order.fills.index(fill) + 1]
        shares = sum((each.qty for each in before), Decimal(0))
        average = sum((each.qty * each.price for each in before), Decimal(0)) / shares
        moment = datetime.fromtimestamp(fill.epoch, UTC).strftime(self.tws.execution_time)
        self.send(
            *(11, request_id, order.wire["orderId"], *self._contract(order), fill.fill_id, moment),
            *(order.account, "ISLAND", "BOT" if order.direction == "BUY" else "SLD", fill.qty),
            *(fill.price, order.order_id, order.wire["clientId"], 0, shares, average, order.mark),
            *("", "", "", 2),
            *([""] if self.version >= 178 else []),  # pendingPriceRevision
        )

    # --- account --------------------------------------------------------------------------
    def _positions(self) -> None:
        with self.exchange.lock:
            held = list(self.exchange.positions)
        for position in held:
            listing = self.tws.listing_of(position.region, position.ticker)
            # No exchange here: only reqContractDetails knows the primary one.
            self.send(
                *(
                    61,
                    3,
                    self.tws.accounts[0],
                    listing.con_id,
                    listing.symbol,
                    "STK",
                    "",
                    0,
                    "",
                    "",
                ),
                *("", position.currency, listing.symbol, listing.symbol, position.qty, 100),
            )
        self.send(62, 1)

    def _ledger(self) -> Iterable[tuple[str, str, str]]:
        """(tag, value, currency) for every currency, and the total in the base currency."""
        with self.exchange.lock:
            cash = dict(self.exchange.cash)
        prefix = self.tws.ledger_prefix
        for currency, amount in cash.items():
            yield prefix + "CashBalance", str(amount), currency
            yield prefix + "TotalCashBalance", str(amount), currency
            yield prefix + "ExchangeRate", "1.00", currency
        yield prefix + "CashBalance", str(sum(cash.values(), Decimal(0))), "BASE"

    def _account_updates(self, fields: list[str]) -> None:
        subscribe, account = fields[1] == "1", fields[2] or self.tws.accounts[0]
        self.account_updates = account if subscribe else ""
        if not subscribe:
            return
        self.send(6, 2, "AccountCode", account, "", account)
        self.send(6, 2, "NetLiquidation", "100000", self.tws.base_currency, account)
        for tag, value, currency in self._ledger():
            self.send(6, 2, tag, value, currency, account)
        self.send(8, 1, "12:00")
        self.send(54, 1, account)

    def _account_updates_multi(self, request_id: int, account: str) -> None:
        for tag, value, currency in self._ledger():
            self.send(73, 1, request_id, account, "", tag, value, currency)
        self.send(74, 1, request_id)

    def _account_summary(self, request_id: int) -> None:
        mine = {each for each in self.tws._summaries if each[0] == self.client_id}
        if len(mine) >= 2:
            self.error(
                request_id,
                322,
                "Error processing request:-'bS' : cause - Maximum number of account summary "
                "requests exceeded",
            )
            return
        self.tws._summaries.add((self.client_id, request_id))
        for account in self.tws.accounts:
            first = account == self.tws.accounts[0]
            for tag, value, currency in self._ledger():
                # The simulator's money lies in the first account.
                self.send(63, 1, request_id, account, tag, value if first else "0", currency)
        self.send(64, 1, request_id)

    # --- market data ----------------------------------------------------------------------
    def _contract_details(self, request_id: int, contract: dict[str, str]) -> None:
        found = self.tws.find_listings(contract)
        if not found:
            self.error(request_id, 200, UNKNOWN_CONTRACT)
            return
        for listing in found:
            exchange = contract["exchange"] or listing.primary_exchange
            zone, trading, liquid = self.tws.hours(listing, exchange)
            self.send(
                *(10, request_id, listing.symbol, "STK", "", 0, "", exchange, listing.currency),
                *(listing.symbol, listing.symbol, listing.symbol, listing.con_id, "0.01", ""),
                *("ACTIVETIM,LMT,MKT", listing.exchanges, 1, 0, listing.long_name),
                *(listing.primary_exchange, "", "", "", "", zone, trading, liquid, "", "", 0),
                *(1, "", "", "26", "", "COMMON", 1, 1, 100),
            )
        self.send(52, 1, request_id)

    def _quote(self, request_id: int, contract: dict[str, str]) -> None:
        found = self.tws.find_listings(contract)
        if self.tws.quote_advice is not None:
            self.error(request_id, *self.tws.quote_advice)
        if not found:
            self.error(request_id, 200, UNKNOWN_CONTRACT)
        elif self.tws.quote_error is not None:
            self.error(request_id, *self.tws.quote_error)
        elif self.tws.live_data:
            self._ticks(request_id, found[0], delayed=False)
        elif self.market_data_type < 3:
            self.error(
                request_id,
                354,
                "Requested market data is not subscribed.Delayed market data is available.",
            )
        elif self.tws.delayed_data:
            self.error(
                request_id,
                10167,
                "Requested market data is not subscribed. Displaying delayed market data.",
            )
            self._ticks(request_id, found[0], delayed=True)
        else:
            self.error(
                request_id,
                10168,
                "Requested market data is not subscribed. Delayed market data is not enabled.",
            )

    def _ticks(self, request_id: int, listing: Listing, *, delayed: bool) -> None:
        quote = self.exchange.quote(listing.region, listing.ticker)
        halted = (listing.region, listing.ticker) in self.tws.halted or not quote.is_tradable
        last, high, low, close, open_ = (68, 72, 73, 75, 76) if delayed else (4, 6, 7, 9, 14)
        with self.as_one():
            self.send(58, 1, request_id, 3 if delayed else 1)
            # Bid and ask without a price: -1 means "none".
            self.send(1, 6, request_id, 66 if delayed else 1, -1, 0, 0)
            for tick, price in (
                (last, quote.latest),
                (high, quote.high_price),
                (low, quote.low_price),
                (close, quote.pre_close),
                (open_, quote.open_price),
            ):
                self.send(1, 6, request_id, tick, price, 100, 0)
            self.send(46, 6, request_id, 88 if delayed else 45, int(quote.epoch))
            self.send(45, 6, request_id, 90 if delayed else 49, 1 if halted else 0)
            if self.tws.snapshot_ends:
                self.send(57, 1, request_id)


def _code_and_text(text: str, default: int) -> tuple[int, str]:
    """A scripted refusal may start with IB's code: "201 Order rejected"."""
    first, _, rest = text.partition(" ")
    return (int(first), rest) if first.isdigit() else (default, text or "refused by the simulator")
