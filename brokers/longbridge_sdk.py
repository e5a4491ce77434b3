"""The longport SDK's two contexts: how they are made, and what their exceptions mean.

Every call of the SDK holds the GIL until it is answered, so this runs in child processes.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httptrading.brokers.longbridge_rest import Refused
from httptrading.brokers.longbridge_words import refusal
from httptrading.errors import BrokerUnavailable, HttpTradingError, Rejected, TimedOut


def load() -> Any:
    """The SDK's module; ImportError when it is not installed."""
    return importlib.import_module("longport.openapi")


@dataclass(frozen=True)
class Access:
    """What a context is made with; `urls` are Config's own address arguments."""

    app_key: str
    app_secret: str
    token: str
    urls: Mapping[str, str]
    token_file: Path

    def __repr__(self) -> str:
        return "<Access>"

    def config(self) -> Any:
        return load().Config(
            app_key=self.app_key,
            app_secret=self.app_secret,
            access_token=self.token,
            enable_print_quote_packages=False,
            **self.urls,
        )


def quote_context(access: Access) -> Any:
    """Connected; takes about a second (the SDK waits for its own limiter)."""
    with errors("quote", access.token_file, connecting=True):
        return load().QuoteContext(access.config())


@dataclass
class PushContext:
    """A TradeContext that reports order changes; its REST calls are not used."""

    context: Any
    socket: tuple[int, int] | None

    @property
    def is_broken(self) -> bool:
        """Whether the WebSocket it was made with is gone (the SDK makes another without a word)."""
        return self.socket is not None and socket_at(self.socket[0]) != self.socket[1]


def push_context(access: Access, on_order_changed: Callable[[Any], None]) -> PushContext:
    openapi = load()
    with errors("push", access.token_file, connecting=True):
        before = sockets()
        context = openapi.TradeContext(access.config())
        # The WebSocket is the last one made: the connection for the one-time password came first,
        # and is still there or has left its lower descriptor.
        socket = max(sockets() - before, default=None)
        # Before `subscribe`: the SDK locks up when it is set while pushes arrive.
        context.set_on_order_changed(on_order_changed)
        context.subscribe([openapi.TopicType.Private])
    return PushContext(context, socket)


@contextlib.contextmanager
def errors(connection: str, token_file: Path, *, connecting: bool = False) -> Iterator[None]:
    """The SDK's exceptions as errors of the tree; their text only where it is LongPort's own."""
    try:
        yield
    except load().OpenApiException as error:
        code, message = error.code, str(error.message)
        if code is not None:
            found = refusal(Refused(0, int(code), message), token_file)
            if isinstance(found, HttpTradingError) and not (
                connecting and isinstance(found, Rejected)
            ):
                raise found from None
        if not connecting:
            raise TimedOut("LongBridge's quote connection gave no answer") from None
        if "connections limitation" in message:
            raise BrokerUnavailable(
                "LongBridge allows no further connection of this account: close another program"
            ) from None
        raise BrokerUnavailable(
            f"LongBridge's {connection} connection cannot be made"
            + (f" (code {code})" if code is not None else "")
        ) from None


def sockets() -> set[tuple[int, int]]:
    """Descriptor and inode of each socket of this process; empty where that cannot be seen."""
    try:
        descriptors = [int(name) for name in os.listdir("/dev/fd")]
    except (OSError, ValueError):
        return set()
    return {(each, inode) for each in descriptors if (inode := socket_at(each)) is not None}


def socket_at(descriptor: int) -> int | None:
    """The inode of the socket with this descriptor."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_ino if stat.S_ISSOCK(found.st_mode) else None
