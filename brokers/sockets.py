"""What connections to more than one broker need of TCP."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Options(Protocol):
    """A socket, or asyncio's view of one."""

    def setsockopt(self, level: int, optname: int, value: int | bytes, /) -> None: ...


def acknowledge_at_once(connection: Options) -> None:
    """To be set with each request, or with what has come, as the option does not last (tcp(7)).

    A server that writes head and body of an answer apart, or a push before an answer, holds the
    second back until the first is acknowledged (RFC 896), which Linux delays by 40 ms on a
    connection that was used before.
    """
    if hasattr(socket, "TCP_QUICKACK"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def drop_unsent_at_end(connection: Options) -> None:
    """Closed, also by the end of its process, the connection sends nothing more (socket(7)).

    The system would otherwise go on for minutes (tcp(7), tcp_orphan_retries): an order that was
    given up in an outage would reach the broker when its lists had long shown that it is not there.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def in_one_piece(connection: Options) -> Iterator[None]:
    """What is written inside leaves together at its end (TCP_CORK, tcp(7)).

    http.client writes head and body of a request apart: the broker would be woken for each, which
    costs an order at Tiger, two requests, some 1 ms.
    """
    if hasattr(socket, "TCP_CORK"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
        yield
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    else:
        yield
