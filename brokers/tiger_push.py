"""Tiger's push connection: one per tiger_id in this process, shared by all its accounts.

Tiger allows one push connection per tiger_id and kicks the older one (code 4001). The SDK's
`PushClient` blocks through 60 attempts, does not subscribe again after a reconnect, fights
kick-outs for ever, checks no certificate and patches `ssl` for the whole process. So only its
lower layer (tigeropen/push/network: frames, heartbeats) is used, with a thread of our own around
it. News are a hint and no more: when push is down, orders are found by asking, and nothing waits.
"""

from __future__ import annotations

import contextlib
import logging
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from httptrading.brokers.tiger_http import QUIET

log = logging.getLogger("httptrading.tiger")

BACK_OFF = (0.3, 0.6, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses between attempts, in seconds."""

STEADY = 10.0
"""Seconds after which a connection has held. Attempts that are taken and cut again go on with
growing pauses: after each of them the orders are listed."""

HEARTBEAT_MS = 10_000  # the SDK's own figure; a connection is dead after 1.5 of them in silence
SOCKET_TIMEOUT = 30.0
WELCOME_TIMEOUT = 10.0
KICKED = 4001

CERTIFICATES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)
"""Where systems keep the certificates they trust, besides what Python knows."""


@dataclass(frozen=True)
class Address:
    """Where to connect as whom; accounts with equal ones share the connection."""

    tiger_id: str = field(repr=False)
    host: str
    port: int
    tls: bool


@dataclass(frozen=True, eq=False)
class Subscription:
    """One account's wish for news; the functions are called in the connection's thread."""

    account: str = field(repr=False)
    on_order: Callable[[Any], None]  # takes an OrderStatusData message
    on_holding: Callable[[Any], None]  # takes an AssetData or a PositionData message
    on_up: Callable[[], None]  # from now on; what came before, since the last list, is missed


_shared: dict[Address, SharedPush] = {}
_shared_lock = threading.Lock()


def subscribe(address: Address, private_key: str, subscription: Subscription) -> None:
    """Adds an account; the first one of an address starts the connection. Never waits."""
    with _shared_lock:
        push = _shared.get(address)
        if push is None:
            push = _shared[address] = SharedPush(address, private_key)
            push.start()
        push.add(subscription)


def unsubscribe(address: Address, subscription: Subscription) -> None:
    """Removes an account; the last one ends the connection. Never waits; twice is harmless."""
    with _shared_lock:
        push = _shared.get(address)
        if push is not None and push.remove(subscription):
            del _shared[address]
            push.stop()


def trusted_certificates() -> str | None:
    """A file of the certificates this system trusts; SSL_CERT_FILE goes first."""
    known = ssl.get_default_verify_paths().cafile
    return next((path for path in (known, *CERTIFICATES) if path and Path(path).is_file()), None)


class SharedPush:
    """The connection of one tiger_id and the thread that keeps it."""

    def __init__(self, address: Address, private_key: str) -> None:
        self._address = address
        self._private_key = private_key
        self._lock = threading.Lock()
        self._subscriptions: list[Subscription] = []
        self._session: _Session | None = None
        self._stopping = threading.Event()
        self._welcomes = 0

    def start(self) -> None:
        threading.Thread(target=self._live, name="httptrading-tiger-push", daemon=True).start()

    def stop(self) -> None:
        self._stopping.set()
        session = self._session
        if session is not None:
            session.sever()

    def add(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions.append(subscription)
            session = self._session
        if session is not None and session.settled.is_set():
            session.subscribe(subscription.account)
            subscription.on_up()

    def remove(self, subscription: Subscription) -> bool:
        """Whether none is left."""
        with self._lock:
            if subscription in self._subscriptions:
                self._subscriptions.remove(subscription)
            return not self._subscriptions

    def subscriptions(self, account: str | None = None) -> list[Subscription]:
        with self._lock:
            return [one for one in self._subscriptions if account in (None, one.account)]

    def welcomed(self, session: _Session) -> None:
        """Tiger took the connection: subscribe, and tell."""
        self._welcomes += 1
        for account in {one.account for one in self.subscriptions()}:
            session.subscribe(account)
        log.info("push connection to Tiger is up")
        for subscription in self.subscriptions():
            subscription.on_up()

    def _live(self) -> None:
        failures = 0
        while not self._stopping.is_set():
            began, welcomes = time.monotonic(), self._welcomes
            kicked = False
            try:
                kicked = self._connect_and_wait()
            except Exception as error:  # its text may hold the signed frame
                log.debug("push connection to Tiger: %s", type(error).__name__)
            with self._lock:
                self._session = None
            if kicked:
                log.warning(
                    "another program has taken over the push connection of this tiger_id; it is "
                    "left to it, order news come by asking until this service reconnects"
                )
                return
            held = self._welcomes > welcomes and time.monotonic() > began + STEADY
            failures = 0 if held else failures + 1
            if failures == 1:
                log.warning("push connection to Tiger is down; order news come by asking")
            pause = BACK_OFF[min(failures, len(BACK_OFF) - 1)] * random.uniform(0.7, 1.0)
            self._stopping.wait(pause)

    def _connect_and_wait(self) -> bool:
        """One life of the connection; True when another program has kicked it."""
        session = _Session(self, self._address)
        with self._lock:
            self._session = session
        try:
            session.connect(self._address)
            if not self._stopping.is_set():
                session.introduce(self._address.tiger_id, self._private_key)
                if session.settled.wait(WELCOME_TIMEOUT):
                    session.ended.wait()
        finally:
            session.sever()
        return session.kicked


class _Session:
    """One TCP connection; a listener of the SDK, whose `on_…` run in the SDK's receiver thread."""

    def __init__(self, push: SharedPush, address: Address) -> None:
        from tigeropen.push.network import connect, listener, protocal, transport

        # These modules log to the root logger, signed frames included (transport.py `transmit`).
        for module in (listener, protocal, transport):
            module.logging = QUIET
        self._push = push
        self.kicked = False
        self.settled = threading.Event()  # taken or refused by Tiger
        self.ended = threading.Event()
        self._connection = connect.PushConnection(
            [(address.host, address.port)],
            prefer_localhost=False,
            try_loopback_connect=False,
            reconnect_attempts_max=1,
            timeout=SOCKET_TIMEOUT,
            heartbeats=(HEARTBEAT_MS, HEARTBEAT_MS),
        )
        self._connection.set_listener("push", self)

    def connect(self, address: Address) -> None:
        if address.tls:
            certificates = trusted_certificates()
            if certificates is None:
                raise FileNotFoundError("no trusted certificates: set SSL_CERT_FILE")
            # With certificates given the SDK demands a valid one for this very host.
            self._connection.set_ssl([(address.host, address.port)], ca_certs=certificates)
        self._connection.transport.start()

    def introduce(self, tiger_id: str, private_key: str) -> None:
        from tigeropen.common.util.signature_utils import sign_with_rsa
        from tigeropen.push.pb.util import ProtoMessageUtil

        hello = ProtoMessageUtil.build_connect_message(
            tiger_id,
            sign_with_rsa(private_key, tiger_id, "utf-8"),
            send_interval=HEARTBEAT_MS,
            receive_interval=HEARTBEAT_MS,
        )
        self._connection.send_frame(hello)

    def subscribe(self, account: str) -> None:
        from tigeropen.push.pb.SocketCommon_pb2 import SocketCommon
        from tigeropen.push.pb.util import ProtoMessageUtil

        kinds = SocketCommon.DataType
        # A connection that breaks meanwhile is renewed, and subscribes then.
        with contextlib.suppress(Exception):
            for kind in (kinds.OrderStatus, kinds.Asset, kinds.Position):
                frame = ProtoMessageUtil.build_subscribe_trade_message(kind, account)
                self._connection.send_frame(frame)

    def sever(self) -> None:
        """Ends the connection at once. (The SDK's own `disconnect` waits for the server.)"""
        transport = self._connection.transport
        transport.running = False
        sock = transport.socket
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        transport.cleanup()  # its receiver thread closes the socket only once it has begun
        # The SDK forgets to tell its heartbeat thread, which would run for ever.
        self._connection.on_disconnected()
        self._end()

    def _end(self) -> None:
        self.ended.set()
        self.settled.set()

    # --- called by the SDK -------------------------------------------------------------------
    def on_connected(self, frame: Any) -> None:
        self.settled.set()
        self._push.welcomed(self)

    def on_disconnecting(self) -> None:  # the SDK's name for "is disconnected"
        self._end()

    def on_error(self, frame: Any) -> None:
        if frame.code == KICKED:
            self.kicked = True
        else:
            log.warning("Tiger's push connection reports error %s", int(frame.code))
        self._end()

    def on_message(self, frame: Any) -> None:
        from tigeropen.push.pb.SocketCommon_pb2 import SocketCommon

        kinds, body = SocketCommon.DataType, frame.body
        try:
            if body.dataType == kinds.OrderStatus:
                for one in self._push.subscriptions(body.orderStatusData.account):
                    one.on_order(body.orderStatusData)
            elif body.dataType in (kinds.Asset, kinds.Position):
                is_asset = body.dataType == kinds.Asset
                data = body.assetData if is_asset else body.positionData
                for one in self._push.subscriptions(data.account):
                    one.on_holding(data)
        except Exception as error:
            log.error("a push from Tiger could not be used: %s", type(error).__name__)
