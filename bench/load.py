"""A client that costs little, and the figures made of what it saw."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Connection:
    """One kept HTTP connection; requests are written as prepared bytes."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def send(self, request: bytes) -> None:
        """Asks, and does not wait for the answer."""
        self._socket.sendall(request)

    def ask(self, request: bytes) -> tuple[int, bytes]:
        self.send(request)
        while b"\r\n\r\n" not in self._buffer:
            self._read()
        head, _, rest = self._buffer.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        while len(rest) < length:
            self._buffer = b""
            self._read()
            rest += self._buffer
        self._buffer = rest[length:]
        return int(head.split(b" ", 2)[1]), rest[:length]

    def _read(self) -> None:
        data = self._socket.recv(65536)
        if not data:
            raise ConnectionError("the server closed the connection")
        self._buffer += data

    def close(self) -> None:
        self._socket.close()


def prepare(
    method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """A request's bytes."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1"]
    lines += [f"{name}: {text}" for name, text in (headers or {}).items()]
    data = b"" if body is None else json.dumps(body).encode()
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


def timed(call: Callable[[int], Any]) -> Callable[[int], float]:
    """The same call, which returns the seconds it took."""

    def measure(number: int) -> float:
        began = time.perf_counter()
        call(number)
        return time.perf_counter() - began

    return measure


def paced(call: Callable[[int], Any], per_second: float, seconds: float) -> list[float]:
    """Calls at a steady pace; the seconds each took."""
    [took] = in_turn([timed(call)], per_second, seconds)
    return took


def in_turn(
    calls: Sequence[Callable[[int], float]], per_second: float, seconds: float
) -> list[list[float]]:
    """Each call at a steady pace, one after the other, so that what slows the machine down for a
    while slows all of them; for each the seconds that its calls took, as they say themselves."""
    took: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for number in range(int(per_second * seconds)):
        for turn, call in enumerate(calls):
            wait = start + (number + turn / len(calls)) / per_second - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            took[turn].append(call(number))
    return took


def together(clients: int, seconds: float, make: Callable[[int], Callable[[], bool]]) -> Tally:
    """Threads that call as fast as they can; `make(n)` gives client n its call, which says whether
    it was answered well."""
    tally = Tally(seconds)
    barrier = threading.Barrier(clients)

    def run(number: int) -> None:
        call = make(number)
        good = bad = 0
        barrier.wait()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            if call():
                good += 1
            else:
                bad += 1
        with tally.lock:
            tally.good += good
            tally.bad += bad

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


class Tally:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.good = 0
        self.bad = 0
        self.lock = threading.Lock()

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.good / self.seconds


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def p50(values: Sequence[float]) -> float:
    return quantile(values, 0.5)


def p99(values: Sequence[float]) -> float:
    return quantile(values, 0.99)
