"""What connections to more than one broker need of TCP."""

from __future__ import annotations

import socket
from typing import Protocol


class Options(Protocol):
    """A socket, or asyncio's view of one."""

    def setsockopt(self, level: int, optname: int, value: int, /) -> None: ...


def acknowledge_at_once(connection: Options) -> None:
    """To be set with each request, or with what has come, as the option does not last (tcp(7)).

    A server that writes head and body of an answer apart, or a push before an answer, holds the
    second back until the first is acknowledged (RFC 896), which Linux delays by 40 ms on a
    connection that was used before.
    """
    if hasattr(socket, "TCP_QUICKACK"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
