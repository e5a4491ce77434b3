"""Futu OpenD on the wire: 44-byte header, SHA-1, protobuf bodies, plain or RSA + AES.

The frame is that of futu/common/utils.py `_joint_head` and `parse_rsp`; the bodies are the SDK's
own generated modules, loaded without importing the SDK (which would write logs and take SIGINT).
One account model: a REAL universal account for HK, US and Stock Connect, and SIMULATE accounts, one
per market (https://openapi.futunn.com/futu-api-doc/qa/trade.html Q17), with the decoys a real list
has: a disabled account, an option account, an option position and a position closed today.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import secrets
import socket
import struct
import sys
import threading
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from Crypto.Cipher import AES, PKCS1_v1_5
from Crypto.PublicKey import RSA
from Crypto.Util.Padding import pad, unpad

from simulators.exchange import (
    Exchange,
    ExchangeOrder,
    Fault,
    FaultKind,
    OrderStatus,
    keep_port,
)

HEADER = struct.Struct("<1s1sI2B2I20s8s")
MARKET_ZONES = {
    "US": ZoneInfo("America/New_York"),
    "HK": ZoneInfo("Asia/Hong_Kong"),
    "CN": ZoneInfo("Asia/Shanghai"),
}
CURRENCIES = {"HKD": 1, "USD": 2, "CNH": 3}
REGION_CURRENCY = {"US": "USD", "HK": "HKD", "CN": "CNH"}
MARKETS = {"HK": 1, "US": 2, "CN": 3, "HKCC": 4}  # Trd_Common.TrdMarket
SECURITY_MARKETS = {"HK": 1, "US": 2, "SH": 31, "SZ": 32}  # Trd_Common.TrdSecMarket
QUOTE_MARKETS = {1: "HK", 11: "US", 21: "CN", 22: "CN"}  # Qot_Common.QotMarket
SIMULATE, REAL = 0, 1
STATUS = {
    OrderStatus.PENDING: (2, 2),  # SUBMITTING
    OrderStatus.WORKING: (5, 10),  # SUBMITTED, FILLED_PART
    OrderStatus.PENDING_CANCEL: (13, 12),
    OrderStatus.FILLED: (11, 11),
    OrderStatus.CANCELED: (15, 14),
    OrderStatus.REJECTED: (21, 21),
    OrderStatus.EXPIRED: (22, 22),  # DISABLED
}
LIMITS = {  # operation → requests, seconds, gap, words; per account (quote: per login)
    "place": (15, 30.0, 0.02, "下单频率太高，请求失败，每30秒最多15次。"),
    "cancel": (20, 30.0, 0.04, "修改订单频率太高，请求失败，每30秒最多20次。"),
    "history": (10, 30.0, 0.0, "获取历史订单列表频率太高，请求失败，每30秒最多10次。"),
    "unlock": (10, 30.0, 0.0, "解锁交易频率太高，请求失败，每30秒最多10次。"),
    "quote": (60, 30.0, 0.0, "获取市场快照频率太高，请求失败，每30秒最多60次。"),
}
REFRESHED = {"cash", "positions", "orders", "order"}  # limited to 10 / 30 s with refreshCache only


def _load(name: str) -> Any:
    """One of the SDK's generated modules, e.g. `Trd_PlaceOrder_pb2`."""
    for package in ("futu", "moomoo"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            folder = str(Path(spec.submodule_search_locations[0], "common", "pb"))
            if folder not in sys.path:
                sys.path.append(folder)
            return importlib.import_module(f"{name}_pb2")
    raise RuntimeError("neither futu-api nor moomoo-api is installed")


PROTOCOLS = {
    1001: "InitConnect",
    1002: "GetGlobalState",
    1004: "KeepAlive",
    2001: "Trd_GetAccList",
    2005: "Trd_UnlockTrade",
    2008: "Trd_SubAccPush",
    2101: "Trd_GetFunds",
    2102: "Trd_GetPositionList",
    2201: "Trd_GetOrderList",
    2202: "Trd_PlaceOrder",
    2205: "Trd_ModifyOrder",
    2211: "Trd_GetOrderFillList",
    2221: "Trd_GetHistoryOrderList",
    2222: "Trd_GetHistoryOrderFillList",
    3203: "Qot_GetSecuritySnapshot",
}
NOTIFY, ORDER_PUSH, FILL_PUSH = 1003, 2208, 2218


@dataclass(frozen=True)
class Account:
    """One trading account as GetAccList shows it."""

    acc_id: int
    env: int
    markets: tuple[str, ...]
    sim_type: int = 0  # 1 stock, 2 option, 4 stock and option
    firm: int = 1  # FUTUSECURITIES
    active: bool = True
    acc_type: int = 2  # margin; 1 cash, 6 derivatives (of FUTUJP)
    role: int = 1  # normal; 2 master, 3 IPO


ACCOUNTS = (
    Account(281756455980000009, REAL, ("HK",), active=False),
    Account(281756478396547854, REAL, ("HK", "US", "HKCC")),
    Account(8377516, SIMULATE, ("HK",), sim_type=1, firm=0),
    Account(10741586, SIMULATE, ("US",), sim_type=2, firm=0),
    Account(10741587, SIMULATE, ("US",), sim_type=4, firm=0),
    Account(8377517, SIMULATE, ("CN",), sim_type=1, firm=0),
)


@dataclass(eq=False)
class Connection:
    """One client; `cipher` is the AES key and IV after an encrypted InitConnect."""

    sock: socket.socket
    conn_id: int
    cipher: tuple[bytes, bytes] | None = None
    accounts: set[int] = field(default_factory=set)  # subscribed to order pushes
    serials: set[int] = field(default_factory=set)
    push_serials: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    writing: threading.Lock = field(default_factory=threading.Lock)

    def close(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class Refused(Exception):
    """OpenD says no, in the words of the exception."""


class OpenD:
    """An OpenD that translates to the calls of an `Exchange`.

    `deaf`: everything is read, nothing answered. `states`: market → number (Qot_Common
    QotMarketState). `raw_status`: order id → OrderStatus number shown instead of the exchange's.
    `left_out`: fields that orders, fills and positions come without. `odd_quote`: fields of a
    snapshot that are told instead of the true ones. `busted`: fill ids that are shown as cancelled.
    `ret_type`, `ret_msg`: the RetType and words answered to orders, which are taken, or to the
    operation in `failing`.
    `holds_back`: what is sent waits until what was sent before is acknowledged (RFC 896).
    `locked`: REAL orders need UnlockTrade first. `enforce_limits`: too frequent requests are
    refused in OpenD's own words and listed in `violations`.
    """

    def __init__(
        self,
        exchange: Exchange,
        port: int = 0,
        *,
        rsa_key: Path | None = None,
        accounts: tuple[Account, ...] = ACCOUNTS,
        locked: bool = False,
        pin_md5: str = hashlib.md5(b"123456").hexdigest(),
        enforce_limits: bool = False,
    ) -> None:
        self.exchange = exchange
        self.port = port
        self.accounts = accounts
        self.locked = locked
        self.pin_md5 = pin_md5
        self.enforce_limits = enforce_limits
        self.keep_alive = 10  # seconds between the client's KeepAlives
        self.deaf = False
        self.holds_back = False
        self.logged_in = True
        self.states = {"US": 5, "HK": 3, "SH": 3, "SZ": 3}
        self.raw_status: dict[str, int] = {}
        self.left_out: set[str] = set()
        self.odd_quote: dict[str, Any] = {}
        self.busted: set[str] = set()
        self.limits = dict(LIMITS)
        self.violations: list[str] = []
        self.ret_type = 0
        self.ret_msg = ""
        self.failing = "place"
        self.resets = 0  # connections that the client has ended without a last word
        self._rsa = RSA.import_key(rsa_key.read_bytes()) if rsa_key else None
        self._restart_locked = locked
        self._port_is_kept = False
        self._listener: socket.socket | None = None
        self._accepting: threading.Thread | None = None
        self._connections: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self._timers: list[threading.Timer] = []
        self._conn_ids = itertools.count(1)  # small numbers, as the real one's
        self._lock = threading.Lock()
        self._times: dict[tuple[str, int], deque[float]] = defaultdict(deque)
        self._pushed_fills: dict[str, int] = {}
        self._answer: dict[int, Callable[[Connection, Any], dict[str, Any]]] = {
            1001: self._init_connect,
            1002: self._global_state,
            1004: lambda _connection, _request: {"time": int(time.time())},
            2001: self._account_list,
            2005: self._unlock,
            2008: self._subscribe,
            2101: self._funds,
            2102: self._positions,
            2201: self._orders,
            2202: self._place,
            2205: self._modify,
            2211: self._fills,
            2221: self._history,
            2222: self._fills,
            3203: self._snapshot,
        }

    # --- life -------------------------------------------------------------------------------
    def start(self) -> OpenD:
        if not self._port_is_kept:  # from now on, also while it is stopped
            self.port, self._port_is_kept = keep_port(self, self.port), True
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        self.locked = self._restart_locked  # the unlocked state does not survive a restart
        self.exchange.on_change.append(self.push)
        self._accepting = self._spawn(self._accept, listener)
        return self

    def stop(self) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self.exchange.on_change.remove(self.push)
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for timer in self._timers:
            timer.cancel()
        if self._accepting is not None:
            self._accepting.join(60)  # so that every connection is known, and cut
        self.cut()
        for thread in list(self._threads):
            thread.join(60)

    def __enter__(self) -> OpenD:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def cut(self) -> None:
        """Closes every connection now; new ones are welcome."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()

    def log_out(self) -> None:
        """Another device took the login: OpenD drops everybody and can do nothing until log_in."""
        self.logged_in = False
        self.notify_login()
        self.cut()

    def log_in(self) -> None:
        self.logged_in = True
        self.notify_login()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """OpenD is down within the block and back on the same port after it."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @property
    def connected(self) -> int:
        with self._lock:
            return len(self._connections)

    def _spawn(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, name="opend", daemon=True)
        self._threads.add(thread)
        thread.start()
        return thread

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _address = listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, not self.holds_back)
            connection = Connection(sock, next(self._conn_ids))
            with self._lock:
                self._connections.add(connection)
            self._spawn(self._serve, connection)

    def _serve(self, connection: Connection) -> None:
        try:
            with connection.sock.makefile("rb") as stream:
                while (head := stream.read(HEADER.size)) and len(head) == HEADER.size:
                    f, t, proto, fmt, _ver, serial, length, sha, _reserve = HEADER.unpack(head)
                    body = stream.read(length)
                    if (f, t, fmt) != (b"F", b"T", 0) or len(body) < length:
                        return
                    self._handle(connection, proto, serial, body, sha)
        except ConnectionResetError:
            self.resets += 1
        except (OSError, ValueError):
            pass  # cut, or bytes that are no packet: the real one closes the connection as well
        finally:
            with self._lock:
                self._connections.discard(connection)
            connection.close()
            self._threads.discard(threading.current_thread())

    # --- packets ----------------------------------------------------------------------------
    def _decrypt(self, connection: Connection, proto: int, body: bytes) -> bytes:
        if proto == 1001 and self._rsa:
            cipher = PKCS1_v1_5.new(self._rsa)
            chunks = (body[at : at + 128] for at in range(0, len(body), 128))
            return b"".join(cipher.decrypt(chunk, b"") for chunk in chunks)
        if connection.cipher:
            key, iv = connection.cipher
            return bytes(unpad(AES.new(key, AES.MODE_CBC, iv).decrypt(body), 16))
        return body

    def _encrypt(self, connection: Connection, proto: int, body: bytes) -> bytes:
        if proto == 1001 and self._rsa:
            cipher = PKCS1_v1_5.new(self._rsa)
            return b"".join(cipher.encrypt(body[at : at + 100]) for at in range(0, len(body), 100))
        if connection.cipher:
            key, iv = connection.cipher
            return bytes(AES.new(key, AES.MODE_CBC, iv).encrypt(pad(body, 16)))
        return body

    def _send(self, connection: Connection, proto: int, serial: int, body: bytes) -> None:
        if self.deaf:
            return
        sealed = self._encrypt(connection, proto, body)
        sha = hashlib.sha1(body).digest()
        head = HEADER.pack(b"F", b"T", proto, 0, 0, serial, len(sealed), sha, bytes(8))
        with connection.writing, suppress(OSError):
            connection.sock.sendall(head + sealed)

    def _garbage(self, connection: Connection, proto: int, serial: int, kind: str) -> None:
        """`kind`: "" a sound frame around nonsense, "sha" a false checksum, "frame" no frame."""
        noise = b"\xff" * 40  # never a message; random bytes are one now and then
        sha = bytes(20) if kind == "sha" else hashlib.sha1(noise).digest()
        head = HEADER.pack(b"F", b"T", proto, 0, 0, serial, len(noise), sha, bytes(8))
        with connection.writing, suppress(OSError):
            connection.sock.sendall(b"\xff" * 84 if kind == "frame" else head + noise)

    def _handle(
        self, connection: Connection, proto: int, serial: int, body: bytes, sha: bytes
    ) -> None:
        body = self._decrypt(connection, proto, body)
        if hashlib.sha1(body).digest() != sha:
            raise ValueError("checksum")
        if proto not in PROTOCOLS:
            raise ValueError(f"protocol {proto} is not simulated")
        module = _load(PROTOCOLS[proto])
        request = module.Request.FromString(body).c2s
        operation = self._operation(connection, proto, request)
        fault = self.exchange.receive(operation, **_fields(request))
        kind = fault.kind if fault else None
        if kind is FaultKind.CUT:
            connection.close()
        elif kind is FaultKind.GARBAGE and fault:
            self._garbage(connection, proto, serial, fault.text)
        elif kind is not FaultKind.HANG and not self.deaf:
            answer = self._answered(connection, proto, serial, operation, request, fault, module)
            if kind is FaultKind.ACCEPT_THEN_CUT:
                connection.close()
            elif kind is FaultKind.LATE and fault:
                timer = threading.Timer(
                    fault.seconds, self._send, (connection, proto, serial, answer)
                )
                timer.daemon = True
                self._timers.append(timer)
                timer.start()
            elif kind is not FaultKind.ACCEPT_THEN_HANG:
                self._send(connection, proto, serial, answer)

    def _answered(
        self,
        connection: Connection,
        proto: int,
        serial: int,
        operation: str,
        request: Any,
        fault: Fault | None,
        module: Any,
    ) -> bytes:
        response = module.Response()
        try:
            if fault and fault.kind is FaultKind.REFUSE:
                raise Refused(fault.text)
            if fault and fault.kind is FaultKind.RATE_LIMIT:
                words = LIMITS[operation][3] if operation in LIMITS else _too_often(10)
                raise Refused(fault.text or words)
            self._check_limit(operation, request)
            self._check_packet_id(connection, serial, request)
            response.retType = 0
            values = self._answer[proto](connection, request)
            if values:
                _fill(response.s2c, values)
            else:
                response.s2c.SetInParent()
            if self.ret_type and operation == self.failing:
                response = module.Response(retType=self.ret_type, retMsg=self.ret_msg)
        except Refused as refused:
            response = module.Response(retType=-1, retMsg=str(refused))
        sent: bytes = response.SerializePartialToString()
        return sent

    def _operation(self, connection: Connection, proto: int, request: Any) -> str:
        """The exchange's word for a request; a state asked on a trading connection is a ping."""
        if proto == 1002:
            return "ping" if connection.accounts else "market"
        if proto == 2201:
            return "order" if request.filterConditions.orderIDExList else "orders"
        if proto == 2205:
            return "cancel" if request.modifyOrderOp == 2 else "modify"
        return {
            1001: "connect",
            1004: "keepalive",
            2001: "accounts",
            2005: "unlock",
            2008: "subscribe",
            2101: "cash",
            2102: "positions",
            2202: "place",
            2211: "fills",
            2221: "history",
            2222: "fill history",
            3203: "quote",
        }[proto]

    def _check_limit(self, operation: str, request: Any) -> None:
        """Request n+1 must be more than 30 s after request 1 (qa/quote.html Q5)."""
        limit, seconds, gap, words = self.limits.get(operation, (0, 30.0, 0.0, ""))
        if operation in REFRESHED and request.refreshCache:
            limit, words = 10, _too_often(10)
        if not self.enforce_limits or not limit:
            return
        account = 0 if operation in ("quote", "unlock") else request.header.accID
        now = time.monotonic()
        times = self._times[operation, account]
        while times and now - times[0] > seconds:
            times.popleft()
        if len(times) >= limit or (times and now - times[-1] < gap):
            self.violations.append(operation)
            raise Refused(words)
        times.append(now)

    def _check_packet_id(self, connection: Connection, serial: int, request: Any) -> None:
        """Place and modify carry (connection id, serial number) against replays."""
        if "packetID" not in request.DESCRIPTOR.fields_by_name:
            return
        packet = request.packetID
        if packet.connID != connection.conn_id or packet.serialNo != serial:
            raise Refused("packetID 不正确")
        if serial in connection.serials:
            raise Refused("重复的请求")
        connection.serials.add(serial)

    # --- answers ----------------------------------------------------------------------------
    def _init_connect(self, connection: Connection, request: Any) -> dict[str, Any]:
        key, iv = secrets.token_hex(8), secrets.token_hex(8)
        if request.packetEncAlgo == 2:  # AES_CBC, from the next packet on
            if not self._rsa:
                raise Refused("未启用加密")
            connection.cipher = (key.encode(), iv.encode())
        elif self._rsa:
            raise Refused("需要加密")
        return {
            "serverVer": 1011,
            "loginUserID": 4000 + self.port,
            "connID": connection.conn_id,
            "connAESKey": key,
            "aesCBCiv": iv,
            "keepAliveInterval": self.keep_alive,
        }

    def _global_state(self, _connection: Connection, _request: Any) -> dict[str, Any]:
        return {
            "marketHK": self.states["HK"],
            "marketUS": self.states["US"],
            "marketSH": self.states["SH"],
            "marketSZ": self.states["SZ"],
            "marketHKFuture": 0,
            "qotLogined": self.logged_in,
            "trdLogined": self.logged_in,
            "serverVer": 1011,
            "serverBuildNo": 7108,
            "time": int(time.time()),
            "programStatus": {"type": 10 if self.logged_in else 11},
        }

    def _account_list(self, _connection: Connection, _request: Any) -> dict[str, Any]:
        self._need_login()
        return {
            "accList": [
                {
                    "trdEnv": account.env,
                    "accID": account.acc_id,
                    "trdMarketAuthList": [MARKETS[market] for market in account.markets],
                    "accType": account.acc_type,
                    "securityFirm": account.firm,
                    "simAccType": account.sim_type,
                    "accStatus": 0 if account.active else 1,
                    "accRole": account.role,
                }
                for account in self.accounts
            ]
        }

    def _unlock(self, _connection: Connection, request: Any) -> dict[str, Any]:
        self._need_login()
        if request.unlock and request.pwdMD5 != self.pin_md5:
            raise Refused("交易密码错误，您还有4次机会")
        self.locked = not request.unlock
        return {}

    def _subscribe(self, connection: Connection, request: Any) -> dict[str, Any]:
        connection.accounts.update(request.accIDList)
        return {}

    def _funds(self, _connection: Connection, request: Any) -> dict[str, Any]:
        account = self._account(request)
        with self.exchange.lock:
            cash = {
                "CNH" if name == "CNY" else name: float(amount)
                for name, amount in self.exchange.cash.items()
            }
        if account.env == SIMULATE:
            total = cash.get(REGION_CURRENCY[account.markets[0]], 0.0)
            listed = {}
        else:  # everything converted into one currency: never what a trader means by "my dollars"
            total = 7.77 + sum(cash.values())
            listed = cash
        zero = dict.fromkeys(
            ("power", "totalAssets", "marketVal", "frozenCash", "debtCash", "avlWithdrawalCash"), 0
        )
        infos = [
            {"currency": CURRENCIES[name], "cash": amount, "availableBalance": amount}
            for name, amount in listed.items()
        ]
        funds = {**zero, "cash": total, "currency": request.currency, "cashInfoList": infos}
        return {"header": _header(request), "funds": funds}

    def _positions(self, _connection: Connection, request: Any) -> dict[str, Any]:
        account = self._account(request)
        rows = []
        with self.exchange.lock:
            for number, held in enumerate(self.exchange.positions, 1):
                if (market := _trade_market(held.region, account.env)) in account.markets:
                    currency = "CNH" if held.currency == "CNY" else held.currency
                    rows.append(
                        {
                            "positionID": number,
                            "positionSide": 1 if held.qty < 0 else 0,
                            "code": held.ticker,
                            "qty": float(abs(held.qty)),
                            "secMarket": _security_market(held.region, held.ticker),
                            "trdMarket": MARKETS[market],
                            "currency": CURRENCIES[currency],
                        }
                    )
        if "US" in account.markets:
            for number, (code, qty) in enumerate((("AAPL261218C200000", 1), ("OLD", 0)), 90):
                decoy = {"positionID": number, "positionSide": 0, "code": code, "qty": qty}
                rows.append({**decoy, "secMarket": 2, "trdMarket": 2, "currency": 2})
        for row in rows:
            row.update(name=row["code"], canSellQty=row["qty"], price=1, val=1, plVal=0)
        return {"header": _header(request), "positionList": [self._shown(row) for row in rows]}

    def _place(self, _connection: Connection, request: Any) -> dict[str, Any]:
        account = self._account(request)
        if request.header.trdMarket not in (MARKETS[market] for market in account.markets):
            raise Refused("账户没有该市场的交易权限")
        if account.env == REAL and self.locked:
            raise Refused("Not unlock trade, please unlock first")
        region = {1: "HK", 2: "US"}.get(request.header.trdMarket, "CN")
        if request.secMarket != _security_market(region, request.code):
            raise Refused(f"未知股票 {request.code}")
        if account.env == SIMULATE and request.timeInForce != 0:
            raise Refused("模拟交易仅支持当日有效")
        market_order = request.orderType == 2
        order = ExchangeOrder(
            order_id=str(uuid.uuid4().int % 10**18),
            region=region,
            ticker=request.code,
            direction="BUY" if request.trdSide == 1 else "SELL",
            order_type="Market" if market_order else "Limit",
            price=None if market_order else Decimal(repr(request.price)),
            qty=Decimal(repr(request.qty)),
            time_in_force="GTC" if request.timeInForce == 1 else "DAY",
            lifecycle={2: "ETH", 4: "OVERNIGHT"}.get(request.session, "RTH"),
            mark=request.remark,
            account=str(account.acc_id),
            wire=_fields(request),
        )
        self.exchange.place(order)
        return {
            "header": _header(request),
            "orderID": int(order.order_id),
            "orderIDEx": order.order_id,
        }

    def _modify(self, _connection: Connection, request: Any) -> dict[str, Any]:
        account = self._account(request)
        with self.exchange.lock:
            order = self.exchange.orders.get(request.orderIDEx)
            if order is None or order.account != str(account.acc_id):
                raise Refused("订单不存在")
            if order.status.is_final:
                raise Refused("订单已完成，不能撤单")
            self.exchange.cancel(order.order_id)
        return {
            "header": _header(request),
            "orderID": int(order.order_id),
            "orderIDEx": order.order_id,
        }

    def _orders(self, _connection: Connection, request: Any) -> dict[str, Any]:
        """Open orders, and what was placed today."""
        account = self._account(request)
        wanted = set(request.filterConditions.orderIDExList)
        today = _midnight()
        with self.exchange.lock:
            rows = [
                self._shown(self._order_row(order))
                for order in self.exchange.orders.values()
                if order.account == str(account.acc_id)
                and (not wanted or order.order_id in wanted)
                and (not order.status.is_final or order.epoch >= today)
            ]
        return {"header": _header(request), "orderList": rows}

    def _history(self, _connection: Connection, request: Any) -> dict[str, Any]:
        """What is finished, by the day it was placed on; at most 90 days."""
        account = self._account(request)
        if _days(request) > 92:
            raise Refused("查询时间范围不能超过90天")
        with self.exchange.lock:
            rows = [
                self._shown(self._order_row(order))
                for order in self.exchange.orders.values()
                if order.account == str(account.acc_id)
                and order.status.is_final
                and _within(request, order.epoch, order.region)
            ]
        return {"header": _header(request), "orderList": rows}

    def _fills(self, _connection: Connection, request: Any) -> dict[str, Any]:
        """Executions of today or the days asked for; paper accounts tell none (qa/trade.html)."""
        account = self._account(request)
        if account.env == SIMULATE:
            raise Refused("模拟交易不支持成交数据")
        today, old = _midnight(), bool(request.filterConditions.beginTime)
        with self.exchange.lock:
            rows = [
                self._shown(_fill_row(order, at)) | {"status": int(fill.fill_id in self.busted)}
                for order in self.exchange.orders.values()
                if order.account == str(account.acc_id)
                for at, fill in enumerate(order.fills)
                if (_within(request, fill.epoch, order.region) if old else fill.epoch >= today)
            ]
        return {"header": _header(request), "orderFillList": rows}

    def _snapshot(self, _connection: Connection, request: Any) -> dict[str, Any]:
        self._need_login()
        rows = []
        for security in request.securityList:
            region = QUOTE_MARKETS.get(security.market, "")
            with self.exchange.lock:
                quote = self.exchange.quotes.get((region, security.code))
            if quote is None:
                raise Refused(f"未知股票 {security.code}")
            moment = datetime.fromtimestamp(quote.epoch, MARKET_ZONES[region])
            basic = (
                dict.fromkeys(("volume", "turnover", "turnoverRate"), 0)
                | {
                    "security": {"market": security.market, "code": security.code},
                    "type": 3,
                    "isSuspend": not quote.is_tradable,
                    "secStatus": 1 if quote.is_tradable else 9,  # NORMAL, SUSPENDED
                    "listTime": "1990-01-01",
                    "lotSize": 1,
                    "priceSpread": 0.01,
                    "updateTime": moment.strftime("%Y-%m-%d %H:%M:%S.%f")[:23],
                    "highPrice": float(quote.high_price),
                    "openPrice": float(quote.open_price),
                    "lowPrice": float(quote.low_price),
                    "lastClosePrice": float(quote.pre_close),
                    "curPrice": float(quote.latest),
                }
            )
            rows.append({"basic": basic | self.odd_quote})
        return {"snapshotList": rows}

    def _need_login(self) -> None:
        if not self.logged_in:
            raise Refused("FutuOpenD 未登录")

    def _account(self, request: Any) -> Account:
        self._need_login()
        for account in self.accounts:
            if (account.acc_id, account.env) == (request.header.accID, request.header.trdEnv):
                return account
        raise Refused(f"账户不存在 {request.header.accID}")

    def _shown(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in self.left_out}

    def _order_row(self, order: ExchangeOrder) -> dict[str, Any]:
        filled = order.filled
        status = STATUS[order.status][bool(filled)]
        zone = MARKET_ZONES[order.region]
        return {
            "trdSide": 1 if order.direction == "BUY" else 2,
            "orderType": 2 if order.order_type == "Market" else 1,
            "orderStatus": self.raw_status.get(order.order_id, status),
            "orderID": int(order.order_id),
            "orderIDEx": order.order_id,
            "code": order.ticker,
            "name": order.ticker,
            "qty": float(order.qty),
            "price": float(order.price or 0),
            "createTime": datetime.fromtimestamp(order.epoch, zone).strftime("%Y-%m-%d %H:%M:%S"),
            "updateTime": datetime.fromtimestamp(order.updated, zone).strftime("%Y-%m-%d %H:%M:%S"),
            "fillQty": float(filled),
            "fillAvgPrice": float(order.avg_price),
            "lastErrMsg": order.reason,
            "secMarket": _security_market(order.region, order.ticker),
            "remark": order.mark,
            "timeInForce": 1 if order.time_in_force == "GTC" else 0,
            "fillOutsideRTH": order.lifecycle == "ETH",
            "session": {"RTH": 1, "ETH": 2, "OVERNIGHT": 4}[order.lifecycle],
            "currency": CURRENCIES[REGION_CURRENCY[order.region]],
            "trdMarket": MARKETS[_trade_market(order.region, self._env(order))],
        }

    def _env(self, order: ExchangeOrder) -> int:
        return next(row.env for row in self.accounts if str(row.acc_id) == order.account)

    # --- pushes -----------------------------------------------------------------------------
    def push(self, order: ExchangeOrder) -> None:
        """Tells the subscribed connections how an order stands, and of executions not told yet."""
        if not order.account:
            return
        header = {"trdEnv": self._env(order), "accID": int(order.account), "trdMarket": 2}
        with self.exchange.lock:
            row = self._shown(self._order_row(order))
            told = self._pushed_fills.get(order.order_id, 0)
            fills = [self._shown(_fill_row(order, at)) for at in range(told, len(order.fills))]
            self._pushed_fills[order.order_id] = len(order.fills)
        self._tell(ORDER_PUSH, "Trd_UpdateOrder", int(order.account), header=header, order=row)
        for fill in fills if header["trdEnv"] == REAL else ():
            self._tell(
                FILL_PUSH, "Trd_UpdateOrderFill", int(order.account), header=header, orderFill=fill
            )

    def notify_login(self) -> None:
        """OpenD tells everybody whether it is logged in at the quote and trade servers."""
        status = {"qotLogined": self.logged_in, "trdLogined": self.logged_in}
        self._tell(NOTIFY, "Notify", None, type=3, connectStatus=status)

    def notify_program(self, status: int) -> None:
        """OpenD tells everybody its own state (Common.proto ProgramStatusType)."""
        self._tell(
            NOTIFY, "Notify", None, type=2, programStatus={"programStatus": {"type": status}}
        )

    def _tell(self, proto: int, name: str, account: int | None, **values: Any) -> None:
        response = _load(name).Response(retType=0)
        _fill(response.s2c, values)
        body = response.SerializeToString()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            if account is None or account in connection.accounts:
                self._send(connection, proto, next(connection.push_serials), body)


def _midnight() -> float:
    return datetime.now().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def _days(request: Any) -> float:
    begin, end = request.filterConditions.beginTime, request.filterConditions.endTime
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)) / timedelta(days=1)


def _within(request: Any, epoch: float, region: str) -> bool:
    """Whether it lies in the days asked for, in the market's own time as all that is told."""
    told = datetime.fromtimestamp(epoch, MARKET_ZONES[region]).strftime("%Y-%m-%d %H:%M:%S")
    asked = request.filterConditions
    return bool(asked.beginTime <= told <= asked.endTime)


def _too_often(limit: int) -> str:
    return f"请求频率太高，请求失败，每30秒最多{limit}次。"


def _trade_market(region: str, env: int) -> str:
    """A-shares are HKCC (Stock Connect) in REAL and CN in SIMULATE (open_trade_context.py:365)."""
    return region if region != "CN" else ("HKCC" if env == REAL else "CN")


def _security_market(region: str, code: str) -> int:
    if region == "CN":
        return SECURITY_MARKETS["SH" if code.startswith(("5", "6", "9")) else "SZ"]
    return SECURITY_MARKETS[region]


def _header(request: Any) -> dict[str, Any]:
    return _fields(request.header)


def _fill_row(order: ExchangeOrder, at: int) -> dict[str, Any]:
    fill = order.fills[at]
    moment = datetime.fromtimestamp(fill.epoch, MARKET_ZONES[order.region])
    return {
        "trdSide": 1 if order.direction == "BUY" else 2,
        "fillID": int(fill.fill_id[1:]),
        "fillIDEx": fill.fill_id,
        "orderID": int(order.order_id),
        "orderIDEx": order.order_id,
        "code": order.ticker,
        "name": order.ticker,
        "qty": float(fill.qty),
        "price": float(fill.price),
        "createTime": moment.strftime("%Y-%m-%d %H:%M:%S"),
        "secMarket": _security_market(order.region, order.ticker),
    }


def _fields(message: Any) -> dict[str, Any]:
    """A message as the plain names and values that were set in it."""
    plain: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        repeated = not hasattr(value, "ListFields") and hasattr(value, "append")
        if repeated:
            plain[descriptor.name] = [_fields(v) if descriptor.message_type else v for v in value]
        else:
            plain[descriptor.name] = _fields(value) if descriptor.message_type else value
    return plain


def _fill(message: Any, values: dict[str, Any]) -> None:
    """The reverse of `_fields`."""
    for name, value in values.items():
        if isinstance(value, dict):
            getattr(message, name).SetInParent()
            _fill(getattr(message, name), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for row in value:
                _fill(getattr(message, name).add(), row)
        elif isinstance(value, list):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
