"""Tiger's side on loopback: the signed HTTP gateway and the push connection, on an `Exchange`.

Wire facts from tigeropen 3.8.0: requests are signed with the client's key over the sorted fields
(common/util/signature_utils.py), answers with the gateway's key over the request's timestamp only
(tiger_open_client.py `__parse_response`); push frames are a varint length and a protobuf message
(push/network/transport.py). Operations in the record: order_no, place, cancel, order, orders,
fills, cash, positions, ping (`accounts`), quote, quote_delay, market, grab, quote_permission,
license; connect and subscribe for push.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import enum
import itertools
import json
import socket
import ssl
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID
from tigeropen.push.pb.Request_pb2 import Request as PushRequest
from tigeropen.push.pb.Response_pb2 import Response as PushResponse
from tigeropen.push.pb.SocketCommon_pb2 import SocketCommon

from simulators.exchange import (
    Exchange,
    ExchangeOrder,
    Fault,
    FaultKind,
    OrderStatus,
    keep_port,
)

OPERATIONS = {
    "order_no": "order_no",
    "place_order": "place",
    "cancel_order": "cancel",
    "orders": "orders",
    "active_orders": "orders",
    "inactive_orders": "orders",
    "filled_orders": "orders",
    "order_transactions": "fills",
    "prime_assets": "cash",
    "assets": "cash",
    "positions": "positions",
    "accounts": "ping",
    "quote_real_time": "quote",
    "quote_delay": "quote_delay",
    "market_state": "market",
    "grab_quote_permission": "grab",
    "get_quote_permission": "quote_permission",
    "user_license": "license",
}

# docs.itigerup.com/docs/ratelimit, calls of one method in 60 s; the rest is in no list.
LIMITS = {
    **dict.fromkeys(
        ("order_no", "place_order", "cancel_order", "orders", "active_orders", "inactive_orders")
        + ("filled_orders", "quote_real_time"),
        120,
    ),
    **dict.fromkeys(("accounts", "assets", "prime_assets", "positions", "order_transactions"), 60),
    **dict.fromkeys(("grab_quote_permission", "get_quote_permission", "market_state"), 10),
}

WIRE_STATUS = {
    OrderStatus.PENDING: "Initial",
    OrderStatus.WORKING: "Submitted",
    OrderStatus.PENDING_CANCEL: "PendingCancel",
    OrderStatus.FILLED: "Filled",
    OrderStatus.CANCELED: "Cancelled",
    OrderStatus.REJECTED: "Inactive",
    OrderStatus.EXPIRED: "Invalid",
}

ORDER_NUMBERS = itertools.count(1001)
"""Of all gateways in the process: Tiger gives none twice, also not after a restart."""

DRIPPING = "X-Pace: a byte at a time\r\n"  # a header of answers that come so
CURRENCIES = ("USD", "HKD", "CNH", "SGD")  # docs.itigerup.com/docs/accounts, prime assets
CURRENCY = {"US": "USD", "HK": "HKD", "CN": "CNH"}
ORDER_DATA = SocketCommon.DataType.OrderStatus
ASSET_DATA = SocketCommon.DataType.Asset
POSITION_DATA = SocketCommon.DataType.Position
TOO_MANY = "too_many_requests:error.requestRateExceedLimit"
DENIED = "4000:permission denied(Current device does not have permission)"
NO_MARKET = (
    "4000:permission denied(Current user and device do not have permissions in the {market} market)"
)


class Spoil(enum.Enum):
    """What is wrong with an answer, beyond the exchange's faults."""

    UNSIGNED = "done, answered without a sign"
    WRONGLY_SIGNED = "done, signed with another key"
    NO_DATA = "done, code 0 without data"
    DRIPPING = "done, answered a byte at a time"
    SERVER_ERROR = "not done, HTTP 502"
    REDIRECT = "not done, HTTP 307 to another path of the same server"


class Refused(Exception):
    """A business error of the gateway: its code and message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code, self.text = code, text


@dataclass(frozen=True)
class KeyPair:
    private: rsa.RSAPrivateKey

    @classmethod
    def make(cls) -> KeyPair:
        return cls(rsa.generate_private_key(public_exponent=65537, key_size=1024))

    @property
    def public_base64(self) -> str:
        """The public key as Tiger prints it: base64 of the DER, without PEM lines."""
        return base64.b64encode(
            self.private.public_key().public_bytes(
                serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        ).decode()

    def pem(self, form: serialization.PrivateFormat) -> bytes:
        return self.private.private_bytes(
            serialization.Encoding.PEM, form, serialization.NoEncryption()
        )

    @property
    def private_base64(self) -> str:
        """The private key as the SDK's configuration wants it: PKCS#1 without PEM lines."""
        lines = self.pem(serialization.PrivateFormat.TraditionalOpenSSL).decode().splitlines()
        return "".join(lines[1:-1])

    def sign(self, text: str) -> str:
        signed = self.private.sign(text.encode(), padding.PKCS1v15(), hashes.SHA1())
        return base64.b64encode(signed).decode()

    def verifies(self, text: str, sign: str) -> bool:
        try:
            self.private.public_key().verify(
                base64.b64decode(sign), text.encode(), padding.PKCS1v15(), hashes.SHA1()
            )
        except (InvalidSignature, ValueError):
            return False
        return True


CLIENT_KEYS, GATEWAY_KEYS, STRANGER_KEYS = KeyPair.make(), KeyPair.make(), KeyPair.make()


def self_signed_certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key, as files in `directory`."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tiger push on loopback")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    cert_path, key_path = directory / "push-cert.pem", directory / "push-key.pem"
    cert_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(KeyPair(key).pem(serialization.PrivateFormat.TraditionalOpenSSL))
    return cert_path, key_path


@dataclass(eq=False)
class PushSession:
    """One push connection: who it is for and what it subscribed to."""

    writer: asyncio.StreamWriter
    tiger_id: str = ""
    topics: set[tuple[int, str]] = field(default_factory=set)  # (data type, account or "")


class TigerGateway:
    """The simulated Tiger; a context manager. Every public method may be called from any thread."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        tiger_id: str = "20150001",
        accounts: Iterable[str] = ("12345678",),
        secret_key: str = "",
        push_certificate: tuple[Path, Path] | None = None,
        http_certificate: tuple[Path, Path] | None = None,
        heartbeat_ms: int = 10_000,
    ) -> None:
        self.exchange = exchange
        self.tiger_id, self.secret_key = tiger_id, secret_key
        self.accounts = tuple(accounts)
        self.push_certificate = push_certificate
        self.http_certificate = http_certificate
        self.heartbeat_ms = heartbeat_ms
        self.http_port = self.push_port = 0
        self.deaf = False  # requests and frames are taken in and never answered
        self.writes_apart = False  # an answer's body waits until its head is acknowledged
        self.enforce_limits = True
        # Or "code": HTTP 200 with code 4; "account": said from behind the gateway
        self.rate_limit_form = "http"
        self.sign_refusals = False
        self.primary_device: str | None = None  # who may read quotes
        self.quote_markets = {"US", "HK"}
        self.market_states = {"US": "TRADING", "HK": "MARKET_CLOSED", "CN": "MIDDLE_CLOSE"}
        self.currency_assets = True  # False: prime_assets tells the segment's total only
        self.wire_status: dict[str, str | int] = {}  # order id → status instead of the usual one
        self.sec_type = "STK"  # of what is pushed
        self.refusals: dict[str, tuple[int, str]] = {}  # operation → code and words, every time
        self.rewrites: dict[str, Callable[[Any], Any]] = {}  # operation → what becomes of its data
        self.push_sessions: list[PushSession] = []
        self.http_connections = 0
        self._spoilt: dict[str, deque[Spoil]] = defaultdict(deque)
        self._calls: dict[str, deque[float]] = defaultdict(deque)
        self._order_numbers: dict[tuple[str, int], str] = {}  # (account, number) → order id
        self.last_number = 0
        self._last_id = 40139406481165312
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # --- life -----------------------------------------------------------------------------
    @property
    def server_url(self) -> str:
        scheme = "https" if self.http_certificate else "http"
        return f"{scheme}://127.0.0.1:{self.http_port}/gateway"

    @property
    def public_key(self) -> str:
        return GATEWAY_KEYS.public_base64

    def write_key(self, directory: Path, *, pkcs8: bool = False) -> Path:
        """The client's private key as a PEM file, as Tiger's site hands it out."""
        form = serialization.PrivateFormat
        path = directory / ("tiger-pk8.pem" if pkcs8 else "tiger-pk1.pem")
        path.write_bytes(CLIENT_KEYS.pem(form.PKCS8 if pkcs8 else form.TraditionalOpenSSL))
        return path

    def start(self) -> TigerGateway:
        """Listens; a second start uses the ports of the first."""
        if not self.http_port:
            self.http_port, self.push_port = keep_port(self), keep_port(self)
        ready = threading.Event()
        failure: list[BaseException] = []
        self._thread = threading.Thread(
            target=self._run, args=(ready, failure), name="tiger-gateway", daemon=True
        )
        self._thread.start()
        if not ready.wait(60):
            raise TimeoutError("the simulated gateway does not start")
        if failure:
            raise failure[0]
        self.exchange.on_change.append(self._order_changed)
        return self

    def stop(self) -> None:
        """Closes the ports and every connection."""
        if self._loop is None or self._thread is None:
            return
        self.exchange.on_change.remove(self._order_changed)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop = self._thread = None

    def __enter__(self) -> TigerGateway:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def cut(self) -> None:
        """Breaks every connection, HTTP and push."""
        self._in_loop(self._abort_all)

    def cut_push(self) -> None:
        self._in_loop(lambda: [s.writer.transport.abort() for s in self.push_sessions])

    def _run(self, ready: threading.Event, failure: list[BaseException]) -> None:
        loop = self._loop = asyncio.new_event_loop()
        try:
            http = loop.run_until_complete(
                asyncio.start_server(
                    self._track(self._http),
                    "127.0.0.1",
                    self.http_port,
                    ssl=_tls(self.http_certificate),
                )
            )
            push = loop.run_until_complete(
                asyncio.start_server(
                    self._track(self._push),
                    "127.0.0.1",
                    self.push_port,
                    ssl=_tls(self.push_certificate),
                )
            )
        except BaseException as error:
            failure.append(error)
            loop.close()
            ready.set()
            return
        ready.set()
        loop.run_forever()
        loop.run_until_complete(self._close(http, push))
        loop.close()

    async def _close(self, *servers: asyncio.Server) -> None:
        for server in servers:
            server.close()
        # Connections that are just being accepted begin first, so that they can be ended as well.
        for _ in range(5):
            await asyncio.sleep(0)
        self._abort_all()
        me = asyncio.current_task()
        while tasks := [task for task in asyncio.all_tasks() if task is not me]:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._abort_all()
        await asyncio.sleep(0)  # lets the transports close their sockets

    def _track(self, serve: Callable[..., Any]) -> Callable[..., Any]:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._writers.add(writer)
            try:
                await serve(reader, writer)
            except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass  # the client went away, or the gateway stops
            finally:
                self._writers.discard(writer)
                writer.transport.abort()

        return connected

    def _abort_all(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    def _in_loop(self, action: Callable[[], Any]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # stopped meanwhile
                self._loop.call_soon_threadsafe(action)

    # --- the script -----------------------------------------------------------------------
    def spoil(self, operation: str, what: Spoil, *, times: int = 1) -> None:
        """The next `times` answers to this operation are spoilt like this."""
        with self.exchange.lock:
            self._spoilt[operation].extend([what] * times)

    def take_quotes_away(self) -> None:
        """Another device grabs the quote permission."""
        self.primary_device = "somebody else's phone"

    def push_asset(self, account: str, *, worth: float = 0) -> None:
        """Tells subscribers that the account's money, or what it is worth in all, changed."""
        frame = PushResponse(command=SocketCommon.Command.MESSAGE)
        frame.body.dataType = ASSET_DATA
        data = frame.body.assetData
        data.account, data.currency, data.segType = account, "USD", "S"
        data.cashBalance = float(self.exchange.cash.get("USD", 0))
        data.netLiquidation = worth
        data.timestamp = int(time.time() * 1000)
        self._in_loop(lambda: self._broadcast(ASSET_DATA, account, frame))

    def push_position(self, account: str, symbol: str, qty: str, *, price: float) -> None:
        """Tells subscribers how much the account holds, at this price."""
        frame = PushResponse(command=SocketCommon.Command.MESSAGE)
        frame.body.dataType = POSITION_DATA
        data = frame.body.positionData
        data.account, data.symbol, data.identifier = account, symbol, symbol
        data.market, data.currency, data.segType, data.secType = "US", "USD", "S", "STK"
        data.position, data.positionScale = scaled(Decimal(qty))
        data.positionQty, data.latestPrice = float(qty), price
        data.marketValue = float(qty) * price
        data.timestamp = int(time.time() * 1000)
        self._in_loop(lambda: self._broadcast(POSITION_DATA, account, frame))

    # --- HTTP -----------------------------------------------------------------------------
    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.http_connections += 1
        while True:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            except asyncio.IncompleteReadError:
                return
            headers = dict(
                line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line
            )
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            answer = await self._answer(body)
            if answer is None:
                return
            status, extra, payload = answer
            text = (
                f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\n{extra}"
                f"Content-Length: {len(payload)}\r\n\r\n".encode()
                + payload
            )
            if extra == DRIPPING:
                for byte in text:
                    writer.write(bytes([byte]))
                    await writer.drain()
                    await asyncio.sleep(0.3)
            elif self.writes_apart:  # as Python's own http.server does
                server = writer.get_extra_info("socket")
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
                writer.write(text.removesuffix(payload))
                writer.write(payload)
            else:
                writer.write(text)
            await writer.drain()

    async def _answer(self, body: bytes) -> tuple[int, str, bytes] | None:
        """Status, more header lines and payload; None to cut the connection."""
        try:
            request = json.loads(body)
            method = request["method"]
            biz = json.loads(request.get("biz_content") or "{}")
        except (ValueError, KeyError, TypeError):
            return 400, "", b"not a request"
        operation = OPERATIONS.get(method, method)
        if method == "orders" and (biz.get("id") or biz.get("order_id")):
            operation = "order"
        fault = self.exchange.receive(
            operation, method=method, device_id=request.get("device_id"), **biz
        )
        if self.deaf or (fault and fault.kind is FaultKind.HANG):
            await asyncio.Event().wait()
        if fault and fault.kind is FaultKind.CUT:
            return None
        if fault and fault.kind is FaultKind.SLOW:
            await asyncio.sleep(fault.seconds)
        if fault and fault.kind is FaultKind.GARBAGE:
            return 200, "", b"<html>\xff maintenance</html>"
        with self.exchange.lock:
            spoil = self._spoilt[operation].popleft() if self._spoilt[operation] else None
        if spoil is Spoil.SERVER_ERROR:
            return 502, "", b"bad gateway"
        if spoil is Spoil.REDIRECT:
            return 307, f"Location: {self.server_url}/elsewhere\r\n", b""
        limited = (fault and fault.kind is FaultKind.RATE_LIMIT) or self._too_often(method)
        if limited and self.rate_limit_form == "http":
            return 429, "", b'{"code":5,"message":"rate limit error"}'
        content = self._content(request, method, operation, biz, fault, bool(limited))
        if fault and fault.kind is FaultKind.ACCEPT_THEN_CUT:
            return None
        if fault and fault.kind is FaultKind.ACCEPT_THEN_HANG:
            await asyncio.Event().wait()
        if fault and fault.kind is FaultKind.LATE:
            await asyncio.sleep(fault.seconds)
        if spoil is Spoil.NO_DATA:
            content.pop("data", None)
        keys = STRANGER_KEYS if spoil is Spoil.WRONGLY_SIGNED else GATEWAY_KEYS
        if content["code"] and not self.sign_refusals:
            pass  # as in the examples of docs.itigerup.com/docs/accounts and the FAQ
        elif spoil is not Spoil.UNSIGNED:
            content["sign"] = keys.sign(str(request.get("timestamp")))
        drip = DRIPPING if spoil is Spoil.DRIPPING else ""
        return 200, drip, json.dumps(content).encode()

    def _content(
        self,
        request: dict[str, Any],
        method: str,
        operation: str,
        biz: dict[str, Any],
        fault: Fault | None,
        limited: bool,
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {"timestamp": int(time.time() * 1000)}
        try:
            self._authenticate(request, method, biz)
            if limited and self.rate_limit_form == "account":
                raise Refused(1200, f"standard account response error({TOO_MANY})")
            if limited:
                limit = LIMITS.get(method, 60)
                raise Refused(
                    4,
                    f"rate limit error(current limiting interface:{method}, "
                    f"up to {limit} times per minute)",
                )
            if fault and fault.kind is FaultKind.REFUSE:
                raise Refused(1200, fault.text or "Orders cannot be placed at this moment")
            if operation in self.refusals:
                raise Refused(*self.refusals[operation])
            handler = getattr(self, f"_do_{method}", None)
            if handler is None:
                raise Refused(1, f"no such method: {method}")
            with self.exchange.lock:
                data = self.rewrites.get(operation, lambda data: data)(handler(biz, request))
        except Refused as refusal:
            return answer | {"code": refusal.code, "message": refusal.text}
        return answer | {"code": 0, "message": "success", "data": data}

    def _too_often(self, method: str) -> bool:
        calls, now = self._calls[method], time.monotonic()
        while calls and now - calls[0] >= 60:
            calls.popleft()
        if self.enforce_limits and len(calls) >= LIMITS.get(method, 1_000_000):
            return True
        calls.append(now)
        return False

    def _authenticate(self, request: dict[str, Any], method: str, biz: dict[str, Any]) -> None:
        signed = "&".join(
            f"{key}={value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
            for key, value in sorted(request.items())
            if key != "sign"
        )
        if request.get("tiger_id") != self.tiger_id:
            raise Refused(1000, "common param error(failed to get developer information)")
        if not CLIENT_KEYS.verifies(signed, str(request.get("sign", ""))):
            raise Refused(1000, "common param error(failed to verify signature, please make sure)")
        if "account" in biz and biz["account"] not in self.accounts:
            raise Refused(1010, f"biz param error(account '{biz['account']}' is not authorized)")
        if self.secret_key and "account" in biz and biz.get("secret_key") != self.secret_key:
            raise Refused(1010, "biz param error(secret_key is wrong)")

    # --- the methods ------------------------------------------------------------------------
    def _do_user_license(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        return {"license": "TBNZ"}

    def _do_accounts(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        # docs.itigerup.com/docs/accounts, `account`: "不支持传入模拟账号，不传会返回全部账号".
        if account_kind(biz.get("account") or "") == "PAPER":
            raise Refused(1010, "biz param error(paper accounts are not supported)")
        return {
            "items": [
                {
                    "account": account,
                    "capability": "RegTMargin",
                    "status": "Funded",
                    "accountType": account_kind(account),
                }
                for account in self.accounts
                if biz.get("account") in (None, account)
            ]
        }

    def _do_order_no(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        self.last_number = next(ORDER_NUMBERS)
        return {"orderId": self.last_number}

    def _do_place_order(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        number = int(biz.get("order_id") or 0)
        if number and (biz["account"], number) in self._order_numbers:
            raise Refused(1100, "global account response error(TRADE DUPLICATE ORDER ID)")
        order = self._order_of(biz)
        if not number:
            number = self.last_number = next(ORDER_NUMBERS)
        self._order_numbers[biz["account"], number] = order.order_id
        order.wire = dict(biz, order_id=number)
        self.exchange.place(order)
        return {"id": int(order.order_id), "orderId": number, "subIds": [], "orders": []}

    def _order_of(self, biz: dict[str, Any]) -> ExchangeOrder:
        kind, symbol, currency = biz.get("order_type"), str(biz["symbol"]), biz.get("currency")
        region = {"USD": "US", "HKD": "HK"}.get(str(currency))
        session = biz.get("trading_session_type")
        outside = bool(biz.get("outside_rth", region == "US"))
        tif = biz.get("time_in_force", "DAY")
        price = biz.get("limit_price")
        if region is None or biz.get("sec_type") != "STK":
            raise Refused(1200, "standard account response error(We don't support trading of this)")
        if region == "HK" and not (symbol.isdigit() and len(symbol) == 5):
            raise Refused(1000, f"common param error(invalid symbols: {symbol})")
        if kind not in ("LMT", "MKT") or (kind == "LMT") != (price is not None):
            raise Refused(1010, "biz param error(field 'limit_price' or 'order_type' is wrong)")
        if kind == "MKT" and (outside or session == "OVERNIGHT"):
            raise Refused(1200, "You cannot place market or stop order during pre-market")
        if tif == "GTC" and (kind == "MKT" or account_kind(biz["account"]) == "PAPER"):
            raise Refused(1200, "standard account response error(time_in_force GTC not supported)")
        if session == "OVERNIGHT" and region != "US":
            raise Refused(1200, "standard account response error(no overnight trading)")
        qty = Decimal(biz["total_quantity"]).scaleb(-int(biz.get("total_quantity_scale") or 0))
        if qty <= 0:
            raise Refused(1010, "biz param error(field 'total_quantity' must be positive)")
        lifecycle = "OVERNIGHT" if session == "OVERNIGHT" else "ETH" if outside else "RTH"
        self._last_id += 4097
        return ExchangeOrder(
            order_id=str(self._last_id),
            region=region,
            ticker=symbol,
            direction=biz["action"],
            order_type="Limit" if kind == "LMT" else "Market",
            price=None if price is None else Decimal(str(price)),
            qty=qty,
            time_in_force=tif,
            lifecycle=lifecycle,
            mark=biz.get("user_mark", ""),
            account=biz["account"],
        )

    def _find(self, biz: dict[str, Any]) -> ExchangeOrder | None:
        order_id = str(biz.get("id") or "")
        if not order_id:
            number = int(biz.get("order_id") or 0)
            order_id = self._order_numbers.get((biz["account"], number), "")
        order = self.exchange.orders.get(order_id)
        return order if order and order.account == biz["account"] else None

    def _do_cancel_order(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        order = self._find(biz)
        if order is None:
            raise Refused(1200, "standard account response error(order is not exist)")
        if order.status.is_final:
            raise Refused(1200, "standard account response error(order cannot be cancelled)")
        if order.status is OrderStatus.WORKING:
            self.exchange.settle(order.order_id, OrderStatus.CANCELED)
        return {"id": int(order.order_id)}

    def _do_orders(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        if biz.get("id") or biz.get("order_id"):
            order = self._find(biz)
            return {"items": [self._wire_order(order)] if order else []}
        return self._listing(biz, lambda order: True)

    def _do_active_orders(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        return self._listing(biz, lambda order: not order.status.is_final)

    def _do_inactive_orders(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        return self._listing(
            biz, lambda order: order.status.is_final and order.status is not OrderStatus.FILLED
        )

    def _do_filled_orders(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        return self._listing(biz, lambda order: order.status is OrderStatus.FILLED)

    def _listing(self, biz: dict[str, Any], wanted: Callable[[ExchangeOrder], bool]) -> Any:
        since, until = biz.get("start_date") or 0, biz.get("end_date") or float("inf")
        listed = sorted(
            (
                order
                for order in self.exchange.orders.values()
                if order.account == biz["account"]
                and wanted(order)
                and since <= order.epoch * 1000 < until
            ),
            key=lambda order: order.epoch,
            reverse=True,
        )
        start, limit = int(biz.get("page_token") or 0), min(int(biz.get("limit") or 100), 300)
        more = start + limit < len(listed)
        return {
            "items": [self._wire_order(order) for order in listed[start : start + limit]],
            "nextPageToken": str(start + limit) if more else "",
        }

    def _wire_order(self, order: ExchangeOrder) -> dict[str, Any]:
        qty, qty_scale = scaled(order.qty)
        filled, filled_scale = scaled(order.filled)
        number = order.wire.get("order_id", 0)
        return {
            "id": int(order.order_id),
            "orderId": number,
            "account": order.account,
            "symbol": order.ticker,
            "market": order.region,
            "currency": CURRENCY[order.region],
            "secType": "STK",
            "action": order.direction,
            "orderType": "LMT" if order.order_type == "Limit" else "MKT",
            "limitPrice": None if order.price is None else float(order.price),
            "totalQuantity": qty,
            "totalQuantityScale": qty_scale,
            "filledQuantity": filled,
            "filledQuantityScale": filled_scale,
            "avgFillPrice": float(order.avg_price),
            "timeInForce": order.time_in_force,
            "outsideRth": order.lifecycle != "RTH",
            "tradingSessionType": {"ETH": "PRE_RTH_POST"}.get(order.lifecycle, order.lifecycle),
            "status": self.wire_status.get(order.order_id, WIRE_STATUS[order.status]),
            "remark": order.reason or None,
            "userMark": order.mark,
            "openTime": int(order.epoch * 1000),
            "latestTime": int(order.updated * 1000),
            "updateTime": int(order.updated * 1000),
            "source": "OpenApi",
            "isOpen": True,
            "canModify": not order.status.is_final,
        }

    def _do_order_transactions(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        wanted = str(biz.get("order_id") or "")
        items = []
        for order in self.exchange.orders.values():
            if order.account != biz["account"] or (wanted and order.order_id != wanted):
                continue
            for number, fill in enumerate(order.fills):
                qty, scale = scaled(fill.qty)
                items.append(
                    {
                        "id": int(order.order_id) + number + 1,
                        "orderId": int(order.order_id),
                        "accountId": order.account,
                        "symbol": order.ticker,
                        "currency": CURRENCY[order.region],
                        "market": order.region,
                        "secType": "STK",
                        "action": order.direction,
                        "filledQuantity": qty,
                        "filledQuantityScale": scale,
                        "filledPrice": float(fill.price),
                        "filledAmount": float(fill.qty * fill.price),
                        "transactedAt": f"{datetime.fromtimestamp(fill.epoch):%Y-%m-%d %H:%M:%S}",
                        "transactionTime": int(fill.epoch * 1000),
                    }
                )
        start, limit = int(biz.get("page_token") or 0), int(biz.get("limit") or 20)
        more = start + limit < len(items)
        return {
            "items": items[start : start + limit],
            "nextPageToken": str(start + limit) if more else "",
        }

    def _do_prime_assets(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        if account_kind(biz["account"]) == "GLOBAL":
            raise Refused(1010, "biz param error(prime_assets is not for global accounts)")
        # Part of the balance is locked by orders, so that balance and available money differ.
        currencies = [
            {
                "currency": currency,
                "cashBalance": float(amount + 50),
                "cashAvailableForTrade": float(amount),
            }
            for currency, amount in self.exchange.cash.items()
        ]
        base = biz.get("base_currency") or "USD"
        if base not in CURRENCIES:
            raise Refused(1010, "biz param error(field 'base_currency' is not supported)")
        segment: dict[str, Any] = {
            "category": "S",
            "currency": base,
            "capability": "RegTMargin",
            "cashBalance": float(self.exchange.cash.get(base, Decimal(0)) + 50),
            "cashAvailableForTrade": float(self.exchange.cash.get(base, Decimal(0))),
            "buyingPower": 123456.78,
            "currencyAssets": currencies if self.currency_assets else [],
        }
        return {
            "accountId": biz["account"],
            "updateTimestamp": int(time.time() * 1000),
            "segments": [segment],
        }

    def _do_assets(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        if account_kind(biz["account"]) != "GLOBAL":
            raise Refused(1010, "biz param error(assets is for global accounts only)")
        cash = self.exchange.cash
        item: dict[str, Any] = {
            "account": biz["account"],
            "currency": "USD",
            "availableFunds": float(cash.get("USD", 0)),
            "cashValue": float(cash.get("USD", Decimal(0)) + 50),
            "buyingPower": 123456.78,
        }
        if biz.get("market_value"):
            item["marketValues"] = [
                {"currency": currency, "cashBalance": float(amount), "exchangeRate": 1.0}
                for currency, amount in cash.items()
            ]
        return {"items": [item]}

    def _do_positions(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        items = []
        for position in self.exchange.positions:
            qty, scale = scaled(position.qty)
            items.append(
                {
                    "account": biz["account"],
                    "symbol": position.ticker,
                    "market": position.region,
                    "currency": position.currency,
                    "secType": "STK",
                    "position": qty,
                    "positionScale": scale,
                    "positionQty": float(position.qty),
                    "salableQty": float(position.qty),
                    "averageCost": 100.5,
                }
            )
        return {"items": items}

    def _do_grab_quote_permission(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        self.primary_device = request["device_id"]
        return self._permissions()

    def _do_get_quote_permission(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        return self._permissions() if self.primary_device == request["device_id"] else []

    def _permissions(self) -> list[dict[str, Any]]:
        names = {"US": "usQuoteBasic", "HK": "hkStockQuoteLv2"}
        return [{"name": names[market], "expireAt": -1} for market in sorted(self.quote_markets)]

    def _do_quote_real_time(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        if self.primary_device != request["device_id"]:
            raise Refused(4, DENIED)
        found = []
        for symbol in biz.get("symbols", []):
            market = "HK" if symbol.isdigit() else "US"
            if market not in self.quote_markets:
                raise Refused(4, NO_MARKET.format(market=market))
            quote = self.exchange.quotes.get((market, symbol))
            if quote is None:
                raise Refused(1000, f"common param error(invalid symbols: {symbol})")
            found.append(
                {
                    "symbol": symbol,
                    "open": float(quote.open_price),
                    "high": float(quote.high_price),
                    "low": float(quote.low_price),
                    "close": float(quote.latest),
                    "preClose": float(quote.pre_close),
                    "latestPrice": float(quote.latest),
                    "latestTime": int(quote.epoch * 1000),
                    "volume": 1000,
                    "status": "NORMAL" if quote.is_tradable else "HALTED",
                }
            )
        return found

    def _do_market_state(self, biz: dict[str, Any], request: dict[str, Any]) -> Any:
        return [
            {
                "market": market,
                "marketStatus": state.replace("_", " ").title(),
                "status": state,
                "openTime": "11-23 09:30:00 EST" if market == "US" else "11-23 09:30:00",
            }
            for market, state in self.market_states.items()
            if biz.get("market", "ALL") in ("ALL", market)
        ]

    # --- push -------------------------------------------------------------------------------
    async def _push(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = PushSession(writer)
        try:
            while True:
                frame = PushRequest.FromString(await self._read_frame(reader))
                self._frame_arrived(session, frame)
        finally:
            if session in self.push_sessions:
                self.push_sessions.remove(session)
            with self.exchange.changed:
                self.exchange.changed.notify_all()

    @staticmethod
    async def _read_frame(reader: asyncio.StreamReader) -> bytes:
        length = shift = 0
        while True:
            byte = (await reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return await reader.readexactly(length)

    def _frame_arrived(self, session: PushSession, frame: Any) -> None:
        command = SocketCommon.Command
        if frame.command == command.CONNECT:
            fault = self.exchange.receive("connect", tiger_id=frame.connect.tigerId)
            if fault and fault.kind is FaultKind.CUT:
                session.writer.transport.abort()
            if self.deaf or fault:
                return
            self._connect(session, frame)
        elif frame.command in (command.SUBSCRIBE, command.UNSUBSCRIBE):
            topic = (frame.subscribe.dataType, frame.subscribe.account)
            if frame.command == command.SUBSCRIBE:
                session.topics.add(topic)
                self.exchange.receive("subscribe", data_type=topic[0], account=topic[1])
            else:
                session.topics.discard(topic)
            code = 112 if frame.command == command.SUBSCRIBE else 113
            self._send(session, PushResponse(command=command.MESSAGE, id=frame.id, code=code))
        elif frame.command == command.HEARTBEAT:
            self._send(session, PushResponse(command=command.HEARTBEAT, id=frame.id))
        elif frame.command == command.DISCONNECT:
            self._send(session, PushResponse(command=command.DISCONNECT, id=frame.id))
            session.writer.close()

    def _connect(self, session: PushSession, frame: Any) -> None:
        command = SocketCommon.Command
        tiger_id = frame.connect.tigerId
        if tiger_id != self.tiger_id or not CLIENT_KEYS.verifies(tiger_id, frame.connect.sign):
            self._send(session, PushResponse(command=command.ERROR, code=4000, msg="sign error"))
            session.writer.close()
            return
        for older in [s for s in self.push_sessions if s.tiger_id == tiger_id]:
            kick = PushResponse(
                command=command.ERROR, code=4001, msg="kick out by a new connection"
            )
            self._send(older, kick)
            older.writer.close()
            self.push_sessions.remove(older)
        session.tiger_id = tiger_id
        self.push_sessions.append(session)
        beat = f"{self.heartbeat_ms},{self.heartbeat_ms}"
        hello = json.dumps({"version": "3", "heart-beat": beat})
        self._send(session, PushResponse(command=command.CONNECTED, id=frame.id, msg=hello))

    def _send(self, session: PushSession, frame: Any) -> None:
        if self.deaf or session.writer.is_closing():
            return
        payload = frame.SerializeToString()
        length, header = len(payload), b""
        while length > 0x7F:
            header += bytes([length & 0x7F | 0x80])
            length >>= 7
        session.writer.write(header + bytes([length]) + payload)

    def _order_changed(self, order: ExchangeOrder) -> None:
        """Called by the exchange, under its lock, in any thread."""
        frame = PushResponse(command=SocketCommon.Command.MESSAGE)
        frame.body.dataType = ORDER_DATA
        data = frame.body.orderStatusData
        data.id, data.account, data.symbol = int(order.order_id), order.account, order.ticker
        data.market, data.currency = order.region, CURRENCY[order.region]
        data.secType, data.segType, data.action = self.sec_type, "S", order.direction
        data.orderType = "LMT" if order.order_type == "Limit" else "MKT"
        data.totalQuantity, data.totalQuantityScale = scaled(order.qty)
        data.filledQuantity, data.filledQuantityScale = scaled(order.filled)
        data.avgFillPrice = float(order.avg_price)
        data.limitPrice = float(order.price or 0)
        data.status = str(self.wire_status.get(order.order_id, WIRE_STATUS[order.status]))
        data.outsideRth = order.lifecycle != "RTH"
        data.canCancel = not order.status.is_final
        data.errorMsg, data.userMark = order.reason, order.mark
        data.timeInForce, data.source = order.time_in_force, "openapi"
        data.openTime = int(order.epoch * 1000)
        data.updateTime = data.latestTime = data.timestamp = int(order.updated * 1000)
        self._in_loop(lambda: self._broadcast(ORDER_DATA, order.account, frame))

    def _broadcast(self, data_type: int, account: str, frame: Any) -> None:
        for session in list(self.push_sessions):
            if (data_type, account) in session.topics or (data_type, "") in session.topics:
                self._send(session, frame)


def _tls(certificate: tuple[Path, Path] | None) -> ssl.SSLContext | None:
    if certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


def account_kind(account: str) -> str:
    """GLOBAL for U…, PAPER for 17 digits and more (common/util/account_util.py), else STANDARD."""
    if account.startswith("U"):
        return "GLOBAL"
    return "PAPER" if account.isdigit() and len(account) >= 17 else "STANDARD"


def scaled(amount: Decimal) -> tuple[int, int]:
    """Tiger's quantities: 1.11 is (111, 2)."""
    digits = -int(amount.normalize().as_tuple().exponent)
    scale = max(digits, 0)
    return int(amount.scaleb(scale)), scale
