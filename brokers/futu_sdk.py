"""The futu SDK (or its twin moomoo) made fit for a gateway: quiet, bounded, one request per call.

What the SDK does otherwise (futu-api 10.11, paths below `futu/`): its constructors retry for ever
(common/open_context_base.py:92), it reconnects by itself after 6 s, its import takes over SIGINT
(`__init__.py`:132) and logs below `$HOME` and to stdout (common/ft_logger.py:71), every trade call
first asks for the account list and placing is followed by up to three order queries
(trade/open_trade_context.py:247,623), each answer of one row is made a pandas table of up to 120
columns, which holds the interpreter for 5 to 20 ms, and errors are mere texts.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from httptrading.brokers.sockets import acknowledge_at_once, drop_unsent_at_end
from httptrading.errors import BrokerUnavailable

PROBE_SECONDS = 3.0
CONNECT_SECONDS = 10.0
"""What an OpenD may take for a connection, InitConnect and GetAccList, which is asked twice."""

KEEP_ALIVE_SECONDS, SILENT_SECONDS = 8.0, 20.0
"""We ask so often whether OpenD is there; a connection silent for longer is dead. The SDK asks at
OpenD's own pace otherwise (InitConnect's keepAliveInterval), which may be slower than that."""

NOT_SENT = {"Connect timeout", "Connection closed", "Context status bad"}
"""The SDK's texts that mean that no request left it (open_context_base.py:293-305)."""

READY = ("READY", "N/A")
"""The SDK's words for an OpenD that can be asked; an older one does not tell."""


class _Unpacked(Exception):
    """Leaves a function of the SDK with what it got, before it does more with that."""

    def __init__(self, found: Any) -> None:
        super().__init__()
        self.found = found


_importing = threading.Lock()
_key_of: dict[str, str] = {}  # SDK package → the key file its process-wide settings hold


def load(package: str, home: Path) -> ModuleType:
    """Imports the SDK with its logs below `home`; stdout, SIGINT and `HOME` stay as they were."""
    importlib.import_module("pandas")  # the slow part of the import, before HOME is touched
    with _importing:
        if package in sys.modules:
            return sys.modules[package]
        main = threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(signal.SIGINT) if main else None
        before = {name: os.environ.get(name) for name in ("HOME", "appdata")}
        os.environ.update(dict.fromkeys(before, str(home)))
        try:
            sdk = importlib.import_module(package)
        except TypeError:  # protobuf found the same file names with another content
            raise BrokerUnavailable(
                "futu-api and moomoo-api of different versions cannot share a process: "
                "set isolation = process for one of them"
            ) from None
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            if main and handler is not None:
                signal.signal(signal.SIGINT, handler)
        sdk.SysConfig.set_all_thread_daemon(True)
        sdk.SysConfig.enable_console_log(False)
        sdk.common.ft_logger.logger.file_level = logging.WARNING
        sdk.common.utils.print = lambda *_: None  # binary2pb prints what it cannot parse
    return sdk


def use_key(sdk: ModuleType, pk_path: str) -> None:
    """Sets the RSA key for InitConnect ("": none). The SDK keeps one per process, and encrypts
    with it whenever it is set (common/utils.py:929): a second one must not come in."""
    if _key_of.setdefault(sdk.__name__, pk_path) != pk_path:
        raise BrokerUnavailable(
            "Instances with different pk_path cannot share a process: set isolation = process"
        )
    if not pk_path or sdk.SysConfig.INIT_RSA_FILE == pk_path:
        return
    try:
        key = importlib.import_module("Crypto.PublicKey.RSA").import_key(Path(pk_path).read_bytes())
    except (OSError, ValueError, IndexError, TypeError):
        key = None
    if key is None or not key.has_private() or key.size_in_bits() != 1024:
        raise BrokerUnavailable(
            "pk_path is not the RSA private key that OpenD uses (PEM, 1024 bit, no password)"
        )
    sdk.SysConfig.set_init_rsa_file(pk_path)
    sdk.SysConfig.RSA_OBJ = key  # so that the SDK does not open (and never close) the file


def probe(host: str, port: int) -> str:
    """The IPv4 address where something listens; the SDK's own attempts would never give up."""
    try:
        address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4]
        with socket.create_connection((str(address[0]), port), PROBE_SECONDS):
            return str(address[0])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no answer"
        raise BrokerUnavailable(
            f"OpenD does not listen at {host}:{port} ({reason}): start it, or correct host and port"
        ) from None


def open_context(
    base: type, lost: Callable[[str], None], keep: Callable[[Any], None], **arguments: Any
) -> Any:
    """Connects a context of the SDK class `base`; BrokerUnavailable within `CONNECT_SECONDS`.

    `keep` gets the context before it connects, so that another thread can close it. `lost` is
    called once when an open connection ends by itself.
    """
    if not hasattr(base, "_get_sync_query_processor"):
        raise BrokerUnavailable(
            "This version of the SDK is not known to send an order only once: "
            "pip install 'futu-api>=10.8,<10.12' (or moomoo-api)"
        )

    class Context(base):  # type: ignore[misc]
        """One attempt, one connection, one wire request per call, and what became of it."""

        _auto_reconnect = property(lambda self: False, lambda self, value: None)
        packed = False  # the last request was made and handed to the network
        answer: Any = None  # OpenD's (retType, retMsg) to the last request, or None
        live = False  # the constructor has succeeded
        unlisted = False  # but for the accounts, which it goes on without
        closing = False
        hurried = False  # inside `within`: no answer is no sign of a dead OpenD
        _accounts: Any = None
        _checked: dict[tuple[str, int], Any]  # (environment, account) → what the SDK made of it
        _leaves = False
        _query_timeout: float  # the SDK's

        def begin(self) -> None:
            self.packed, self.answer = False, None

        @contextmanager
        def within(self, seconds: float) -> Iterator[None]:
            """Each request inside times out after so many seconds; a later answer is dropped."""
            usual, self._query_timeout = self._query_timeout, seconds
            self.hurried = True
            try:
                yield
            finally:
                self._query_timeout, self.hurried = usual, False

        def _query_sync(self, pack_func: Any, unpack_func: Any, **values: Any) -> Any:
            """InitConnect only: what the SDK makes of a refusal is a line in its log."""

            def unpack(response: Any) -> Any:
                if response.HasField("retType") and response.retType:
                    self.answer = (response.retType, response.retMsg)
                return unpack_func(response)

            return super()._query_sync(pack_func, unpack, **values)

        def unpacked(self, function: Callable[..., Any], *args: Any, **values: Any) -> Any:
            """`function` of this context, left as soon as OpenD's answer is unpacked: its rows, or
            the id of an order placed. What the SDK would do after that are tables and queries."""
            self._leaves = True
            try:
                return function(*args, **values)
            except _Unpacked as answer:
                return 0, answer.found
            finally:
                self._leaves = False

        def _get_sync_query_processor(self, pack_func: Any, unpack_func: Any) -> Any:
            acc_id: int | None = None

            def pack(**values: Any) -> Any:
                nonlocal acc_id
                acc_id = values.get("acc_id")
                packed = pack_func(**values)
                self.packed = packed[0] == 0
                return packed

            def unpack(response: Any) -> Any:
                if not response.retType and not _is_about(acc_id, response.s2c):
                    return -1, "", None
                if response.HasField("retType"):  # else the SDK could not parse it
                    self.answer = (response.retType, response.retMsg)
                return unpack_func(response)

            ask = super()._get_sync_query_processor(pack, unpack)

            def asked(**values: Any) -> Any:
                ret, words, found = ask(**values)
                if ret == 0 and self._leaves:
                    raise _Unpacked(found)
                return ret, words, found

            return asked

        def get_acc_list(self) -> Any:
            """Asked once: the SDK wants it before every trade call."""
            if self._accounts is not None:
                return 0, self._accounts
            ret, found = super().get_acc_list()
            self.unlisted = self.unlisted or ret != 0
            return ret, found

        def keep_accounts(self) -> Any:
            ret, table = super().get_acc_list()
            self._accounts = table if ret == 0 else None
            self._checked = {}
            return ret, table

        def _check_acc_id_exist(self, trd_env: str, acc_id: int) -> Any:
            """Looked up once: the SDK searches its table before every trade call."""
            if (trd_env, acc_id) not in self._checked:
                self._checked[trd_env, acc_id] = super()._check_acc_id_exist(trd_env, acc_id)
            return self._checked[trd_env, acc_id]

        def on_recv(self, conn_id: int, data: bytes) -> None:
            with suppress(AttributeError, OSError):  # a version without it, or closed meanwhile
                acknowledge_at_once(self._net_mgr._get_conn(conn_id).sock)
            super().on_recv(conn_id, data)
            if self._recv_buf and not b"FT".startswith(self._recv_buf[:2]):
                self._net_mgr.close(conn_id)  # garbled: the SDK would wait for its end for ever

        def on_disconnect(self, conn_id: int, reason: Any, msg: str) -> None:
            super().on_disconnect(conn_id, reason, msg)
            if self.live and not self.closing:
                lost("The connection to OpenD ended")

    context = Context.__new__(Context)
    keep(context)
    watchdog = threading.Timer(CONNECT_SECONDS, close_context, (context,))
    watchdog.daemon = True
    watchdog.start()
    try:
        Context.__init__(context, **arguments)
    finally:
        watchdog.cancel()
        watchdog.join()  # one that has begun is seen below: nobody would be told of its closing
    context.live = True
    if context.status != "READY" or context.closing:
        close_context(context)
        if context.answer is not None and context.answer[0]:
            raise BrokerUnavailable(f"OpenD refuses the connection: {context.answer[1]}")
        raise BrokerUnavailable(
            "OpenD accepts connections but does not answer: it may be starting, or encryption is "
            "set up there and not here (pk_path), or the other way round"
        )
    with suppress(AttributeError, OSError):  # a version without it, or closed meanwhile
        drop_unsent_at_end(context._net_mgr._get_conn(context._conn_id).sock)
    context.set_sync_query_connect_timeout(0.2)
    context._keep_alive_interval = min(context._keep_alive_interval, KEEP_ALIVE_SECONDS)
    context._conn_alive_timeout = SILENT_SECONDS
    return context


def _is_about(acc_id: int | None, answer: Any) -> bool:
    """Whether what is told of an account has its required fields, and is told of the one that was
    asked for. The SDK asks for neither: it would go on with a quantity of 0 or an empty list, or
    with another account's. (The header's trdEnv need not be the request's: see the samples of
    trade/get-position-list.html, where its accID always is.)"""
    if "header" not in answer.DESCRIPTOR.fields_by_name:
        return True
    told = answer.header.accID  # 0 names none
    return bool(answer.IsInitialized()) and (acc_id is None or told in (0, acc_id))


def row_handler(base: type, push: Any, on_row: Callable[[dict[str, Any], int], None]) -> Any:
    """A handler for the SDK's push class `base`: gets the row that `push` unpacks, and the
    account's id."""

    class Handler(base):  # type: ignore[misc]
        def on_recv_rsp(self, rsp_pb: Any) -> Any:
            ret, row = push.unpack_rsp(rsp_pb)
            if ret == 0:
                on_row(row, rsp_pb.s2c.header.accID)
            return ret, row

    return Handler()


def login_handler(sdk: Any, field: str, lost: Callable[[str], None]) -> Any:
    """`lost` is told when OpenD loses the login named by `field` (Notify.proto ConnectStatus), or
    when the program itself is no longer ready (ProgramStatus: logged out, wants a code …)."""

    class Handler(sdk.SysNotifyHandlerBase):  # type: ignore[misc]
        def on_recv_rsp(self, rsp_pb: Any) -> Any:
            state = rsp_pb.s2c
            out = state.HasField("connectStatus") and not getattr(state.connectStatus, field)
            if state.HasField("programStatus"):
                program = state.programStatus.programStatus.type
                out = out or sdk.ProgramStatusType.to_string2(program) not in READY
            if out:
                lost("OpenD is no longer logged in")
            return super().on_recv_rsp(rsp_pb)

    return Handler()


def close_context(context: Any) -> None:
    """Ends a context in any state, from any thread, without waiting; twice does no harm."""
    context.closing = True
    status = getattr(context, "_status", None)  # None: the constructor has not begun
    if status is None:
        return
    if status == "CONNECTING":  # closed now, the SDK would wait for ever for its own connect
        later = threading.Timer(0.2, close_context, (context,))
        later.daemon = True
        later.start()
        return
    context.close()
    if context.status != "READY":
        context._close_callback_executor()
