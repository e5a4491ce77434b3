"""LongPort on the wire: the signed REST API and both WebSockets, over one `Exchange`.

One listening port serves `http_url`, `quote_ws_url` and `trade_ws_url`. Operations as recorded:
place, cancel, order, orders, fills, cash, positions, refresh, ping (a one-time password asked for
by anybody but the SDK), otp (by the SDK), status (market-status), connect (WebSocket and
authentication), quote, static, market (trading sessions), days, profile, subscribe.

Faults: `text` of a RATE_LIMIT fault "bare" gives a 429 without a JSON body; digits as `text` of a
GARBAGE fault give that HTTP status with a web page.

Facts: the SDK's source (longbridge/openapi, tag 3.0.18: rust/crates/httpclient/src/signature.rs,
request.rs, rust/src/trade/types.rs) and open.longportapp.com/docs (error codes, order, asset).
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, BinaryIO
from urllib.parse import parse_qs, urlsplit

from simulators import longport_wire as wire
from simulators.exchange import (
    Exchange,
    ExchangeOrder,
    Fault,
    FaultKind,
    OrderStatus,
    keep_port,
)

STATUS_WORDS = {
    OrderStatus.PENDING: "WaitToNew",
    OrderStatus.WORKING: "NewStatus",
    OrderStatus.PENDING_CANCEL: "PendingCancelStatus",
    OrderStatus.FILLED: "FilledStatus",
    OrderStatus.CANCELED: "CanceledStatus",
    OrderStatus.REJECTED: "RejectedStatus",
    OrderStatus.EXPIRED: "ExpiredStatus",
}
LIFECYCLES = {"RTH_ONLY": "RTH", "ANY_TIME": "ETH", "OVERNIGHT": "OVERNIGHT"}
CURRENCIES = {"US": "USD", "HK": "HKD", "SH": "CNY", "SZ": "CNY"}

# Market-local HHMM, as the documentation's sample of the trading-session request shows them.
INTRADAY, PRE, POST, OVERNIGHT = 0, 1, 2, 3
SESSIONS = {
    "US": [(930, 1600, INTRADAY), (400, 930, PRE), (1600, 2000, POST), (2000, 400, OVERNIGHT)],
    "HK": [(930, 1200, INTRADAY), (1300, 1600, INTRADAY)],
    "CN": [(930, 1130, INTRADAY), (1300, 1457, INTRADAY)],
}
# Commands of the quote socket: SDK's rust/src/quote/cmd_code.rs.
PROFILE, SESSION_LIST, DAYS, STATIC, QUOTE = 4, 8, 9, 10, 11
AUTH, RECONNECT = 2, 3
SUBSCRIBE, UNSUBSCRIBE, NOTIFY = 16, 17, 18


class Refusal(Exception):
    """An answer with a code other than zero."""

    def __init__(self, code: int, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.code, self.text, self.status = code, text, status


class Hang(Exception):
    """No answer, ever; the connection stays open."""


class Cut(Exception):
    """The connection is closed without an answer."""


@dataclass(eq=False)
class Connection:
    """One client connection; `kind` is rest, quote or trade."""

    socket: socket.socket
    stream: BinaryIO
    kind: str = "rest"
    authenticated: bool = False
    is_cut: bool = False
    topics: list[str] = field(default_factory=list)
    sending: threading.Lock = field(default_factory=threading.Lock)

    def send(self, opcode: int, payload: bytes) -> None:
        with self.sending, contextlib.suppress(OSError):
            wire.send_frame(self.socket, opcode, payload)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def ticker_of(symbol: str) -> tuple[str, str]:
    """LongPort's symbol as (region, ticker) of the exchange: HK padded, SH and SZ both CN."""
    code, _, market = symbol.rpartition(".")
    if market in ("SH", "SZ"):
        return "CN", code
    return market, code.zfill(5) if market == "HK" else code


def symbol_of(region: str, ticker: str) -> str:
    if region == "HK":
        return f"{ticker.lstrip('0')}.HK"
    if region == "CN":
        return f"{ticker}.{'SH' if ticker[0] in '569' else 'SZ'}"
    return f"{ticker}.{region}"


class LongPort:
    """The server; a context manager. `port` 0 is any free one, kept over stop() and start()."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        app_key: str = "app-key",
        app_secret: str = "app-secret",
        token: str = "token-1",
        port: int = 0,
    ) -> None:
        self.exchange = exchange
        self.app_key, self.app_secret = app_key, app_secret
        self.tokens: dict[str, float] = {token: time.time() + 90 * 86400}
        """Access token → when it expires (epoch seconds); a token not in here is invalid."""
        self.grant_seconds = 90 * 86400.0
        """How long a refreshed token lives, whatever was asked for."""
        self.port = port
        self.deaf = False
        """Takes connections and reads, but never answers: a broker silent for ever."""
        self.deaf_kinds: set[str] = set()
        """The same for some of rest, quote, trade only."""
        self.connection_limit = 10
        self.connects: list[tuple[float, str]] = []
        """(monotonic time, kind) of every WebSocket that was opened."""
        self.hold_cancels = False
        """A cancelled order stays `PendingCancelStatus` until the test settles it."""
        self.status_words: dict[str, str] = {}
        """Order id → status in LongPort's words, instead of the one its exchange status gives."""
        self.market_codes: dict[str, int] | None = None
        """Market → code answered by market-status; None: this account has no such endpoint."""
        self.sessions: dict[str, list[tuple[int, int, int]]] = {
            market: list(periods) for market, periods in SESSIONS.items()
        }
        self.closed_days: set[date] = set()
        self.half_days: set[date] = set()
        self.trade_statuses: dict[str, int] = {}
        """Symbol → trade status of its quote (0 is normal)."""
        self.static_currencies: dict[str, str] = {}
        self.extended: dict[str, dict[str, Decimal]] = {}
        """Symbol → prices of its pre-market, post-market and overnight quote (pre, post, night)."""
        self.channels = {"US": "lb"}
        """Region → account channel of its positions; any other region is in `lb_papertrading`."""
        self.frozen_cash = Decimal("77.7")
        self.answers: dict[str, Callable[[Any], Any]] = {}
        """Operation → what becomes of its answer (REST: `data`, WebSocket: the message), which was
        done before. Bytes from a REST operation are the whole HTTP answer (`http_answer`)."""
        self.quote_rate = (10, 5)
        """(a second, burst) announced to the SDK for its own limiter."""
        self.orders_listed_after = 0.0
        self.unfamiliar = 0
        """So many requests for one order, or to cancel it, find it unknown, as LongPort's may for a
        moment after a placement (longbridge/openapi issue #9)."""
        self._ids = itertools.count(706388312699592704)
        self._sessions: dict[str, str] = {}
        self._passwords: set[str] = set()
        self._numbers = itertools.count(1)
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()
        self.let_go = threading.Event()
        """Set: an answer held by a LATE fault goes out, whatever its seconds. Each start makes a
        new one."""
        self._has_port = False
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()

    # --- life ---------------------------------------------------------------------------------
    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def quote_ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/quote"

    @property
    def trade_ws_url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/trade"

    def start(self) -> LongPort:
        self._stopping, self.let_go = threading.Event(), threading.Event()
        if not self._has_port:
            self.port, self._has_port = keep_port(self, self.port), True
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        self.exchange.on_change.append(self._push_order)
        self._spawn(self._accept, listener, self._stopping)
        self._spawn(self._heartbeat, self._stopping)
        return self

    def stop(self) -> None:
        """Closes the port and every connection, and waits for the threads."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._stopping.set()
        self.let_go.set()
        self.exchange.on_change.remove(self._push_order)
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(60)
        self._threads.clear()

    def __enter__(self) -> LongPort:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def cut(self, *kinds: str) -> None:
        """Closes every connection of these kinds (all without any), as a network would: what came
        on them and was not done by now never will be."""
        with self.exchange.lock:
            for connection in self.connected(*kinds):
                connection.is_cut = True
                connection.close()

    def connected(self, *kinds: str) -> list[Connection]:
        with self._lock:
            return [each for each in self._connections if not kinds or each.kind in kinds]

    def expire_token(self) -> None:
        with self._lock:
            self.tokens = dict.fromkeys(self.tokens, 0.0)

    def _spawn(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True, name="longport")
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket, stopping: threading.Event) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(client, client.makefile("rb"))
            with self._lock:
                if stopping.is_set():  # it came while everything was being cut
                    connection.stream.close()
                    client.close()
                    return
                self._connections.add(connection)
            with self.exchange.changed:
                self.exchange.changed.notify_all()
            self._spawn(self._serve, connection)

    def _heartbeat(self, stopping: threading.Event) -> None:
        # The SDK counts a connection without a ping for 120 s as dead.
        while not stopping.wait(20):
            if not self.deaf:
                for connection in self.connected("quote", "trade"):
                    connection.send(wire.PING, b"")

    def _is_deaf(self, connection: Connection) -> bool:
        return self.deaf or connection.kind in self.deaf_kinds

    def _serve(self, connection: Connection) -> None:
        try:
            while self._serve_request(connection):
                pass
        except Cut:
            pass
        except Hang:
            with contextlib.suppress(OSError, ValueError):
                while connection.stream.read(1):  # until the client gives up or we are cut
                    pass
        except (OSError, ValueError, http.client.HTTPException):
            pass
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            connection.stream.close()
            connection.socket.close()

    # --- HTTP ---------------------------------------------------------------------------------
    def _serve_request(self, connection: Connection) -> bool:
        line = connection.stream.readline().decode("latin-1").split()
        if len(line) != 3:
            return False
        method, target, _ = line
        headers = {
            name.lower(): value
            for name, value in http.client.parse_headers(connection.stream).items()
        }
        body = connection.stream.read(int(headers.get("content-length", "0")))
        url = urlsplit(target)
        if headers.get("upgrade", "").lower() == "websocket":
            connection.kind = url.path.strip("/")
            self._serve_websocket(connection, headers)
            return False
        if self._is_deaf(connection):
            raise Hang
        try:
            payload = self._answer(connection, method, url.path, url.query, headers, body)
            if isinstance(payload, bytes):
                connection.socket.sendall(payload)
                return False
            status, text = 200, json.dumps({"code": 0, "message": "success", "data": payload})
        except Refusal as refusal:
            status = refusal.status
            text = json.dumps({"code": refusal.code, "message": refusal.text, "data": None})
        except _Page as page:
            status, text = page.status, "<html><body>no envelope here</body></html>"
        head = (
            f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text.encode())}\r\n"
            "x-trace-id: simulated\r\n\r\n"
        )
        connection.socket.sendall(head.encode() + text.encode())
        return True

    def _answer(
        self,
        connection: Connection,
        method: str,
        path: str,
        query: str,
        headers: dict[str, str],
        body: bytes,
    ) -> Any:
        self._check_signature(method, path, query, headers, body)
        routes = {
            ("POST", "/v1/trade/order"): ("place", self._place),
            ("DELETE", "/v1/trade/order"): ("cancel", self._cancel),
            ("GET", "/v1/trade/order"): ("order", self._order_detail),
            ("GET", "/v1/trade/order/today"): ("orders", self._today),
            ("GET", "/v1/trade/order/history"): ("orders", self._history),
            ("GET", "/v1/trade/execution/today"): ("fills", self._executions),
            ("GET", "/v1/trade/execution/history"): ("fills", self._executions),
            ("GET", "/v1/asset/account"): ("cash", self._account),
            ("GET", "/v1/asset/stock"): ("positions", self._stock),
            ("GET", "/v1/token/refresh"): ("refresh", self._refresh),
            ("GET", "/v1/socket/token"): ("otp", self._one_time_password),
            ("GET", "/v1/quote/market-status"): ("status", self._market_status),
        }
        found = routes.get((method, path))
        if found is None:
            raise Refusal(404001, "no such api", 404)
        operation, handler = found
        if operation == "otp" and headers.get("user-agent") != "openapi-sdk":
            operation = "ping"
        fields: dict[str, Any] = {
            name: values if name == "status" else values[0]
            for name, values in parse_qs(query).items()
        }
        if body:
            fields.update(json.loads(body))
        fault = self.exchange.receive(operation, **fields, path=path, authorization=_token(headers))
        self._check_token(_token(headers))
        fields |= {"token": _token(headers), "path": path}
        change = self.answers.get(operation, _unchanged)
        return self._with_fault(connection, fault, lambda: change(handler(fields)))

    def _with_fault(
        self, connection: Connection, fault: Fault | None, do: Callable[[], Any]
    ) -> Any:
        """Does what was asked on the connection, or what the fault says."""

        def work() -> Any:
            with self.exchange.lock:
                if connection.is_cut:
                    raise Cut
                return do()

        if fault is None:
            return work()
        match fault.kind:
            case FaultKind.REFUSE:
                raise Refusal(603000, fault.text or "refused")
            case FaultKind.RATE_LIMIT if fault.text == "bare":
                raise _Page(429)
            case FaultKind.RATE_LIMIT:
                raise Refusal(429002, "api request is limited", 429)
            case FaultKind.HANG:
                raise Hang
            case FaultKind.GARBAGE:
                raise _Page(int(fault.text or "200"))
            case FaultKind.CUT:
                raise Cut
            case FaultKind.SLOW:
                self.let_go.wait(fault.seconds)
                with self.exchange.lock:
                    return do()
            case FaultKind.LATE:
                result = work()
                self.let_go.wait(fault.seconds)
                return result
            case FaultKind.ACCEPT_THEN_CUT:
                work()
                raise Cut
            case FaultKind.ACCEPT_THEN_HANG:
                work()
                raise Hang

    def _check_signature(
        self, method: str, path: str, query: str, headers: dict[str, str], body: bytes
    ) -> None:
        token, key, moment = _token(headers), headers.get("x-api-key"), headers.get("x-timestamp")
        if key != self.app_key:
            raise Refusal(403203, "apikey illegal", 403)
        if moment is None or abs(float(moment) - time.time()) > 300:
            raise Refusal(403201, "signature invalid", 403)
        signed = "authorization;x-api-key;x-timestamp"
        values = f"authorization:{token}\nx-api-key:{key}\nx-timestamp:{moment}\n"
        digest = hashlib.sha1(body).hexdigest() if body else ""
        canonical = f"{method}|{path}|{query}|{values}|{signed}|{digest}"
        text = f"HMAC-SHA256|{hashlib.sha1(canonical.encode()).hexdigest()}"
        proof = hmac.new(self.app_secret.encode(), text.encode(), hashlib.sha256).hexdigest()
        if (
            headers.get("x-api-signature")
            != f"HMAC-SHA256 SignedHeaders={signed}, Signature={proof}"
        ):
            raise Refusal(403201, "signature invalid", 403)

    def _check_token(self, token: str) -> None:
        with self._lock:
            expires = self.tokens.get(token)
        if expires is None:
            raise Refusal(401004, "token invalid", 401)
        if expires <= time.time():
            raise Refusal(401003, "token expired", 401)

    # --- REST: orders -------------------------------------------------------------------------
    def _place(self, fields: dict[str, Any]) -> dict[str, str]:
        symbol = fields["symbol"]
        market = symbol.rpartition(".")[2]
        if market not in ("US", "HK") or symbol.startswith("0"):
            raise Refusal(602001, "param check failed: symbol")
        if fields["order_type"] not in ("LO", "MO"):
            raise Refusal(602001, "param check failed: order_type")
        if (fields["order_type"] == "LO") != ("submitted_price" in fields):
            raise Refusal(602001, "param check failed: submitted_price")
        region, ticker = ticker_of(symbol)
        order = ExchangeOrder(
            order_id=str(next(self._ids)),
            region=region,
            ticker=ticker,
            direction=fields["side"].upper(),
            order_type="Limit" if fields["order_type"] == "LO" else "Market",
            price=Decimal(fields["submitted_price"]) if "submitted_price" in fields else None,
            qty=Decimal(fields["submitted_quantity"]),
            time_in_force={"Day": "DAY", "GTC": "GTC"}[fields["time_in_force"]],
            lifecycle=LIFECYCLES[fields.get("outside_rth", "RTH_ONLY")],
            mark=fields.get("remark", ""),
            wire={name: fields[name] for name in fields if name not in ("token", "path")},
        )
        self.exchange.place(order)
        return {"order_id": order.order_id}

    def _cancel(self, fields: dict[str, Any]) -> dict[str, str]:
        with self.exchange.lock:
            order = self._known_order(fields["order_id"])
            if order.status.is_final:
                raise Refusal(603015, "the order is finished and cannot be withdrawn")
            self.exchange.settle(order.order_id, OrderStatus.PENDING_CANCEL)
            if not self.hold_cancels:
                self.exchange.cancel(order.order_id)
        return {}

    def _known_order(self, order_id: str) -> ExchangeOrder:
        order = self.exchange.orders.get(order_id)
        if order is None or self.unfamiliar > 0:
            self.unfamiliar = max(0, self.unfamiliar - 1)
            raise Refusal(602001, "param check failed: order_id")
        return order

    def _order_detail(self, fields: dict[str, Any]) -> dict[str, Any]:
        order = self._known_order(fields["order_id"])
        nothing = {"free_status": "None", "deductions_status": "NONE"}
        nothing["platform_deducted_status"] = "NONE"
        for kind in ("free", "deductions", "platform_deducted"):
            nothing |= {f"{kind}_amount": "", f"{kind}_currency": ""}
        charges = {"items": [], "total_amount": "0", "currency": "USD"}
        return self._order(order) | nothing | {"history": [], "charge_detail": charges}

    def _order(self, order: ExchangeOrder) -> dict[str, Any]:
        return {
            "order_id": order.order_id,
            "status": self._status(order),
            "stock_name": order.ticker,
            "quantity": str(order.qty),
            "executed_quantity": str(order.filled),
            "price": "" if order.price is None else str(order.price),
            "executed_price": str(order.avg_price) if order.filled else "0.000",
            "submitted_at": str(int(order.epoch)),
            "side": order.direction.capitalize(),
            "symbol": symbol_of(order.region, order.ticker),
            "order_type": "LO" if order.order_type == "Limit" else "MO",
            "last_done": "",
            "trigger_price": "",
            "msg": order.reason,
            "tag": {"DAY": "Normal", "GTC": "Gtc"}[order.time_in_force],
            "time_in_force": {"DAY": "Day", "GTC": "GTC"}[order.time_in_force],
            "expire_date": "",
            "updated_at": str(int(order.updated)),
            "trigger_at": "0",
            "trailing_amount": "",
            "trailing_percent": "",
            "limit_offset": "",
            "trigger_status": "NOT_USED",
            "outside_rth": order.wire.get("outside_rth", "UnknownOutsideRth"),
            "currency": CURRENCIES[order.region],
            "remark": order.mark,
        }

    def _status(self, order: ExchangeOrder) -> str:
        if order.order_id in self.status_words:
            return self.status_words[order.order_id]
        if order.filled and order.status is OrderStatus.WORKING:
            return "PartialFilledStatus"
        if order.filled and order.status is OrderStatus.CANCELED:
            return "PartialWithdrawal"
        return STATUS_WORDS[order.status]

    def _today(self, fields: dict[str, Any]) -> dict[str, Any]:
        now = time.time()
        with self.exchange.lock:
            orders = [
                self._order(order)
                for order in self.exchange.orders.values()
                if now - 86400 < order.epoch <= now - self.orders_listed_after
                and fields.get("order_id") in (None, order.order_id)
            ]
        return {"orders": orders}

    def _history(self, fields: dict[str, Any]) -> dict[str, Any]:
        begin, end = float(fields.get("start_at", 0)), float(fields.get("end_at", 1e12))
        with self.exchange.lock:
            orders = [
                self._order(order)
                for order in self.exchange.orders.values()
                if begin <= order.epoch <= end
                and order.epoch < time.time() - 86400
                and self._status(order) in fields.get("status", [self._status(order)])
            ]
        return {"has_more": False, "orders": orders}

    def _executions(self, fields: dict[str, Any]) -> dict[str, Any]:
        with self.exchange.lock:
            trades = [
                {
                    "order_id": order.order_id,
                    "price": str(fill.price),
                    "quantity": str(fill.qty),
                    "symbol": symbol_of(order.region, order.ticker),
                    "trade_done_at": str(int(fill.epoch)),
                    "trade_id": fill.fill_id,
                }
                for order in self.exchange.orders.values()
                for fill in order.fills
                if fields.get("order_id") in (None, order.order_id)
                and (fields["path"].endswith("today") == (fill.epoch > time.time() - 86400))
            ]
        return {"has_more": False, "trades": trades}

    # --- REST: account and token --------------------------------------------------------------
    def _account(self, fields: dict[str, Any]) -> dict[str, Any]:
        infos = [
            {
                "withdraw_cash": str(amount),
                "available_cash": str(amount),
                "frozen_cash": str(self.frozen_cash),
                "settling_cash": "0",
                "currency": currency,
            }
            for currency, amount in self.exchange.cash.items()
        ]
        return {
            "list": [
                {
                    "total_cash": str(sum(self.exchange.cash.values()) + self.frozen_cash),
                    "max_finance_amount": "0",
                    "remaining_finance_amount": "0",
                    "risk_level": "1",
                    "margin_call": "0",
                    "currency": fields.get("currency", "HKD"),
                    "cash_infos": infos,
                    "net_assets": "0",
                    "init_margin": "0",
                    "maintenance_margin": "0",
                    "buy_power": "999999",
                    "frozen_transaction_fees": [],
                }
            ]
        }

    def _stock(self, fields: dict[str, Any]) -> dict[str, Any]:
        channels: dict[str, list[dict[str, str]]] = {}
        for held in self.exchange.positions:
            row = {
                "symbol": symbol_of(held.region, held.ticker),
                "symbol_name": held.ticker,
                "quantity": str(held.qty),
                "available_quantity": str(held.qty),
                "currency": held.currency,
                "cost_price": "1",
                "market": held.region,
                "init_quantity": "",
            }
            channels.setdefault(self.channels.get(held.region, "lb_papertrading"), []).append(row)
        return {
            "list": [
                {"account_channel": channel, "stock_info": rows}
                for channel, rows in channels.items()
            ]
        }

    def _refresh(self, fields: dict[str, Any]) -> dict[str, Any]:
        now = time.time()
        with self._lock:
            del self.tokens[fields["token"]]  # the old token dies at once
            token = f"token-{1 + next(self._numbers)}"
            self.tokens[token] = now + self.grant_seconds
        return {
            "token": token,
            "expired_at": _iso(now + self.grant_seconds),
            "issued_at": _iso(now),
            "account_info": {"member_id": 1, "aaid": 1, "account_channel": "lb"},
        }

    def _one_time_password(self, fields: dict[str, Any]) -> dict[str, Any]:
        online = len(self.connected("quote", "trade"))
        password = f"otp-{next(self._numbers)}"
        with self._lock:
            self._passwords.add(password)
        return {"otp": password, "limit": self.connection_limit, "online": online}

    def _market_status(self, fields: dict[str, Any]) -> dict[str, Any]:
        if self.market_codes is None:
            raise Refusal(404001, "no such api", 404)
        return {
            "market_time": [
                {
                    "market": market,
                    "trade_status": code,
                    "timestamp": str(int(time.time())),
                    "delay_trade_status": code,
                    "delay_timestamp": "0",
                    "sub_status": 0,
                    "delay_sub_status": 0,
                }
                for market, code in self.market_codes.items()
            ]
        }

    # --- WebSocket ----------------------------------------------------------------------------
    def _serve_websocket(self, connection: Connection, headers: dict[str, str]) -> None:
        self.connects.append((time.monotonic(), connection.kind))
        if self._is_deaf(connection):
            raise Hang
        accept = wire.accept_key(headers["sec-websocket-key"])
        head = (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
        )
        connection.socket.sendall(head.encode())
        while (frame := wire.read_frame(connection.stream)) is not None:
            opcode, payload = frame
            if opcode == wire.CLOSE:
                return
            if opcode != wire.BINARY:
                continue
            if self._is_deaf(connection):
                raise Hang
            command, request_id, body = wire.read_request(payload)
            try:
                answer, status = self._command(connection, command, body), 0
            except Refusal as refusal:
                answer, status = wire.message([(1, refusal.code), (2, refusal.text)]), 7
            except Hang:
                continue  # this one request is never answered; the others are
            except _Page:
                connection.send(wire.BINARY, b"\xff")
                continue
            connection.send(wire.BINARY, wire.response(command, request_id, answer, status))

    def _command(self, connection: Connection, command: int, body: bytes) -> bytes:
        quote_commands: dict[int, tuple[str, Callable[[bytes], bytes]]] = {
            PROFILE: ("profile", self._profile),
            SESSION_LIST: ("market", self._session_list),
            DAYS: ("days", self._days),
            STATIC: ("static", self._static),
            QUOTE: ("quote", self._quotes),
        }
        if command in (AUTH, RECONNECT):
            fault = self.exchange.receive(
                "connect", which=connection.kind, how="auth" if command == AUTH else "reconnect"
            )
            done = self._with_fault(
                connection, fault, lambda: self._authenticate(connection, command, body)
            )
        elif not connection.authenticated:
            raise Refusal(5, "not authenticated")
        elif connection.kind == "trade" and command in (SUBSCRIBE, UNSUBSCRIBE):
            topics = wire.texts(body, 1)
            fault = self.exchange.receive("subscribe", topics=topics)
            done = self._with_fault(
                connection, fault, lambda: self._subscribe(connection, command, topics)
            )
        elif connection.kind == "quote" and command in quote_commands:
            operation, handler = quote_commands[command]
            fields = {"symbols": wire.texts(body, 1)} if command in (QUOTE, STATIC) else {}
            fault = self.exchange.receive(operation, **fields)
            change = self.answers.get(operation, _unchanged)
            done = self._with_fault(connection, fault, lambda: change(handler(body)))
        else:
            raise Refusal(3, f"unknown command {command}")
        assert isinstance(done, bytes)
        return done

    def _authenticate(self, connection: Connection, command: int, body: bytes) -> bytes:
        given = wire.text(body, 1)
        with self._lock:
            online = sum(each.authenticated for each in self._connections)
            if online >= self.connection_limit:
                raise Refusal(5, "connections limitation is hit")
            if command == AUTH:
                if given not in self._passwords:
                    raise Refusal(5, "one-time password is not known")
                self._passwords.discard(given)
            elif self._sessions.get(given) != connection.kind:
                raise Refusal(5, "session is not known")
            connection.authenticated = True
            session = f"session-{next(self._numbers)}"
            self._sessions[session] = connection.kind
        expires = int((time.time() + 3600) * 1000)
        return wire.message(
            [(1, session), (2, expires), (3, self.connection_limit), (4, online + 1)]
        )

    def forget_sessions(self) -> None:
        """A reconnecting client needs a new one-time password."""
        with self._lock:
            self._sessions.clear()

    def _subscribe(self, connection: Connection, command: int, topics: list[str]) -> bytes:
        if command == SUBSCRIBE:
            connection.topics = sorted({*connection.topics, *topics})
            success: Iterable[tuple[int, str]] = [(1, topic) for topic in topics]
        else:
            connection.topics = [topic for topic in connection.topics if topic not in topics]
            success = []
        return wire.message([*success, *((3, topic) for topic in connection.topics)])

    def _push_order(self, order: ExchangeOrder) -> None:
        """Tells subscribed clients; runs under the exchange's lock, so it only writes."""
        row = self._order(order)
        data = {
            "side": row["side"],
            "stock_name": row["stock_name"],
            "submitted_quantity": row["quantity"],
            "symbol": row["symbol"],
            "order_type": row["order_type"],
            "submitted_price": row["price"] or "0",
            "executed_quantity": row["executed_quantity"],
            "executed_price": row["executed_price"],
            "order_id": row["order_id"],
            "currency": row["currency"],
            "status": row["status"],
            "submitted_at": row["submitted_at"],
            "updated_at": row["updated_at"],
            "trigger_price": "",
            "msg": row["msg"],
            "tag": row["tag"],
            "trigger_status": "NOT_USED",
            "trigger_at": "",
            "trailing_amount": "",
            "trailing_percent": "",
            "limit_offset": "",
            "account_no": "simulated",
            "last_share": str(order.fills[-1].qty) if order.fills else "",
            "last_price": str(order.fills[-1].price) if order.fills else "",
            "remark": row["remark"],
        }
        event = json.dumps({"event": "order_changed_lb", "data": data})
        body = wire.message([(1, "private"), (2, 1), (3, 1), (4, event)])
        for connection in self.connected("trade"):
            if "private" in connection.topics and not self._is_deaf(connection):
                connection.send(wire.BINARY, wire.push(NOTIFY, body))

    # --- quote socket -------------------------------------------------------------------------
    def _profile(self, body: bytes) -> bytes:
        rate, burst = self.quote_rate
        limits = [
            (5, wire.message([(1, command), (2, rate), (3, burst)]))
            for command in (SESSION_LIST, DAYS, STATIC, QUOTE)
        ]
        return wire.message([(1, 1), (2, "LV1"), (3, 500), (4, 100), *limits])

    def _session_list(self, body: bytes) -> bytes:
        markets = []
        for market, periods in self.sessions.items():
            rows = [
                (2, wire.message([(1, begin), (2, end), (3, kind)])) for begin, end, kind in periods
            ]
            markets.append((1, wire.message([(1, market), *rows])))
        return wire.message(markets)

    def _days(self, body: bytes) -> bytes:
        begin, end = (
            datetime.strptime(wire.text(body, number), "%Y%m%d").date() for number in (2, 3)
        )
        days = [begin + timedelta(days=offset) for offset in range((end - begin).days + 1)]
        open_days = [day for day in days if day.weekday() < 5 and day not in self.closed_days]
        rows: list[tuple[int, str]] = [
            (2 if day in self.half_days else 1, f"{day:%Y%m%d}") for day in open_days
        ]
        return wire.message(rows)

    def _static(self, body: bytes) -> bytes:
        rows = []
        for symbol in wire.texts(body, 1):
            if ticker_of(symbol) not in self.exchange.quotes:
                continue
            currency = self.static_currencies.get(
                symbol, CURRENCIES.get(symbol.rpartition(".")[2], "USD")
            )
            rows.append((1, wire.message([(1, symbol), (3, symbol), (7, currency), (8, 100)])))
        return wire.message(rows)

    def _quotes(self, body: bytes) -> bytes:
        rows = []
        for symbol in wire.texts(body, 1):
            quote = self.exchange.quotes.get(ticker_of(symbol))
            if quote is None:
                raise Refusal(301600, "invalid request")
            status = self.trade_statuses.get(symbol, 0 if quote.is_tradable else 1)
            extended = self.extended.get(symbol, {})
            others = [
                (number, wire.message([(1, str(extended[name])), (2, int(quote.epoch))]))
                for number, name in ((11, "pre"), (12, "post"), (13, "night"))
                if name in extended
            ]
            values: list[tuple[int, wire.Scalar]] = [
                (1, symbol),
                (2, str(quote.latest)),
                (3, str(quote.pre_close)),
                (4, str(quote.open_price)),
                (5, str(quote.high_price)),
                (6, str(quote.low_price)),
                (7, int(quote.epoch)),
                (8, 1000),
                (9, "100000"),
                (10, status),
                *others,
            ]
            rows.append((1, wire.message(values)))
        return wire.message(rows)


class _Page(Exception):
    """An HTTP answer that is not the JSON envelope (on a WebSocket: bytes that mean nothing)."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def http_answer(status: int, text: str) -> bytes:
    """A whole HTTP answer, with the end of its connection."""
    head = f"HTTP/1.1 {status} {http.client.responses.get(status, 'Unknown')}\r\n"
    return f"{head}Content-Length: {len(text.encode())}\r\nConnection: close\r\n\r\n{text}".encode()


def _unchanged(answer: Any) -> Any:
    return answer


def _token(headers: dict[str, str]) -> str:
    return headers.get("authorization", "")


def _iso(epoch: float) -> str:
    return (
        datetime.fromtimestamp(epoch, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )
