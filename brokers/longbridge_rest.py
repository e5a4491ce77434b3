"""LongPort's signed REST: one request, sent once, one answer within the caller's deadline.

The SDK's own HTTP client is not used, because (longbridge/openapi, tag 3.0.18, rust/crates/
httpclient/src/request.rs; tests/test_longport_simulator.py shows it) it posts an order again, up to
five times, after a 429 without JSON; waits 30 s, holding the GIL; and drops the granted expiry of a
renewed token. The signature is the documented one (open.longportapp.com/docs/how-to-access-api).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import ssl
import time
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from httptrading.brokers.sockets import acknowledge_at_once, drop_unsent_at_end

CONNECT_SECONDS = 5.0
IDLE_SECONDS = 30.0
"""A connection idle for longer is not used: a middle box may have forgotten it without a word, and
the first order on it would end as an unknown outcome."""
LARGEST_ANSWER = 32 * 1024 * 1024

UNREADABLE = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What reading an answer raises that is not as documented: of another shape, `Infinity` for a code,
nested without end."""

Query = Mapping[str, str | Sequence[str]]


class NotSent(Exception):
    """No connection: the request has not left this machine."""


class NoAnswer(Exception):
    """Sent, or partly sent, and the connection ended, or what came back makes no sense; then
    `status` is its HTTP status."""

    def __init__(self, what: str, status: int = 0) -> None:
        super().__init__(what)
        self.status = status


class Refused(Exception):
    """LongPort's own answer with another code than 0; `message` is its words, without secrets."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(code)
        self.status = status
        self.code = code
        self.message = message


class LongPortRest:
    """One kept-alive connection; one request at a time, cancelled by cancelling its task."""

    def __init__(self, url: str, app_key: str, app_secret: str, token: Callable[[], str]) -> None:
        """`token()` is asked for each request, so that a renewed one is used at once."""
        self._url = urlsplit(url)
        self._app_key = app_key
        self._app_secret = app_secret
        self._token = token
        self._lock = asyncio.Lock()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._answered = 0.0  # when the connection was last known to work, monotonic

    async def request(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Mapping[str, str] | None = None,
    ) -> Any:
        """The `data` of the answer; NotSent, NoAnswer or Refused."""
        async with self._lock:
            reader, writer = await self._connected()
            request = self._signed(method, path, encode_query(query or {}), body)
            keep = False
            try:
                writer.write(request)
                acknowledge_at_once(writer.get_extra_info("socket"))
                await writer.drain()
                status, text, keep = await read_answer(reader)
                self._answered = time.monotonic()
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
                raise NoAnswer(type(error).__name__) from None
            finally:
                if not keep:  # also when cancelled: a late answer must not meet the next request
                    self.close()
        return read_envelope(status, text)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        try:
            if self._streams is not None:
                reader, writer = self._streams
                idle = time.monotonic() - self._answered > IDLE_SECONDS
                # Closed by the other side while idle, which is no reason to risk an order on it.
                if not (idle or writer.is_closing()) and await is_quiet(reader):
                    return self._streams
                self.close()
            async with asyncio.timeout(CONNECT_SECONDS):
                streams = await open_streams(self._url.scheme, *address(self._url.netloc))
                drop_unsent_at_end(streams[1].get_extra_info("socket"))
                self._streams = streams
        except asyncio.CancelledError:
            raise NotSent("no connection by the deadline") from None  # not "perhaps sent"
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            raise NotSent(type(error).__name__) from None
        return self._streams

    def _signed(self, method: str, path: str, query: str, body: Mapping[str, str] | None) -> bytes:
        """The bytes of the request. The timestamp has milliseconds, as the documentation shows:
        the server takes two equal requests with one timestamp for a repetition (403202)."""
        path = self._url.path.rstrip("/") + path
        data = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        token, moment = self._token(), f"{time.time():.3f}"
        names = "authorization;x-api-key;x-timestamp"
        values = f"authorization:{token}\nx-api-key:{self._app_key}\nx-timestamp:{moment}\n"
        digest = hashlib.sha1(data).hexdigest() if data else ""
        canonical = f"{method}|{path}|{query}|{values}|{names}|{digest}"
        text = f"HMAC-SHA256|{hashlib.sha1(canonical.encode()).hexdigest()}"
        proof = hmac.new(self._app_secret.encode(), text.encode(), hashlib.sha256).hexdigest()
        head = (
            f"{method} {path}{'?' + query if query else ''} HTTP/1.1\r\n"
            f"Host: {self._url.netloc}\r\n"
            "User-Agent: httptrading\r\nAccept: application/json\r\nAccept-Language: en\r\n"
            "Content-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(data)}\r\n"
            f"Authorization: {token}\r\nX-Api-Key: {self._app_key}\r\nX-Timestamp: {moment}\r\n"
            f"X-Api-Signature: HMAC-SHA256 SignedHeaders={names}, Signature={proof}\r\n\r\n"
        )
        return head.encode("latin-1") + data


def encode_query(query: Query) -> str:
    pairs = [
        (name, value)
        for name, values in query.items()
        for value in ([values] if isinstance(values, str) else values)
    ]
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs)


def address(netloc: str) -> tuple[str, int | None]:
    parts = urlsplit(f"//{netloc}")
    if not parts.hostname:
        raise ValueError("no host in the address")
    return parts.hostname, parts.port


async def open_streams(
    scheme: str, host: str, port: int | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection, through the proxy that the environment names for https (as the SDK does)."""
    secure = ssl.create_default_context() if scheme == "https" else None
    port = port or (443 if secure else 80)
    proxy = urllib.request.getproxies().get("https") if secure else None
    if proxy is None or urllib.request.proxy_bypass(host):
        return await asyncio.open_connection(host, port, ssl=secure, limit=LARGEST_ANSWER)
    login, _, netloc = urlsplit(proxy).netloc.rpartition("@")
    proxy_host, proxy_port = address(netloc)
    asked = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
    if login:
        asked += f"Proxy-Authorization: Basic {b64encode(unquote(login).encode()).decode()}\r\n"
    reader, writer = await asyncio.open_connection(
        proxy_host, proxy_port or 8080, limit=LARGEST_ANSWER
    )
    try:
        writer.write(f"{asked}\r\n".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        if answer.split(None, 2)[1] != b"200":
            raise ConnectionRefusedError
        await writer.start_tls(secure, server_hostname=host)  # type: ignore[arg-type]
    except BaseException:
        writer.transport.abort()
        raise
    return reader, writer


async def is_quiet(reader: asyncio.StreamReader) -> bool:
    """Whether nothing came since the last answer: no end, and nothing that would be taken for the
    next answer (RFC 9112, 9.2), like a proxy's 408 to an idle connection."""
    for _ in range(2):  # the loop looks at its sockets, and takes in what has come by now
        await asyncio.sleep(0)
    with contextlib.suppress(OSError):
        async with asyncio.timeout(0) as at_once:
            await reader.read(1)
    return at_once.expired()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status, body, and whether the connection may be used again (RFC 9112, 6.3)."""
    status = 100
    while status < 200:  # 1xx only announces the answer
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        version, code, *_ = head[0].split(" ", 2)
        status = int(code)
    headers = {
        name.strip().lower(): value.strip()
        for name, _, value in (line.partition(":") for line in head[1:])
    }
    keep = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    coding = headers.get("transfer-encoding", "").lower()
    if status in (204, 304):
        return status, b"", keep
    if coding.endswith("chunked"):
        return status, await read_chunks(reader), keep
    if "content-length" in headers and not coding:
        return status, await reader.readexactly(bounded(int(headers["content-length"]))), keep
    return status, await read_to_end(reader), False


async def read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while size := int((await reader.readline()).split(b";")[0], 16):
        bounded(len(body) + size)
        body += await reader.readexactly(size)
        await reader.readline()
    while (await reader.readline()).strip():
        pass
    return bytes(body)


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    while part := await reader.read(65536):
        body += part
        bounded(len(body))
    return bytes(body)


def bounded(size: int) -> int:
    if not 0 <= size <= LARGEST_ANSWER:
        raise ValueError("no answer is that large")
    return size


def read_envelope(status: int, text: bytes) -> Any:
    """`{"code": 0, "message": "", "data": …}`; anything else is Refused or NoAnswer.

    A 429 is a refusal also without the envelope: what limits the rate sits before the trading. A
    refusal that names an order contradicts itself: the order may be there.
    """
    try:
        envelope = json.loads(text)
        code = int(envelope["code"])
        message = str(envelope.get("message") or envelope.get("msg") or "")
    except UNREADABLE:
        if status == 429:
            raise Refused(429, 429000, "too many requests") from None
        raise NoAnswer(f"HTTP {status}", status) from None
    data = envelope.get("data")
    if code != 0 and isinstance(data, dict) and data.get("order_id"):
        raise NoAnswer(f"code {code}, and an order", status)
    if code != 0:
        raise Refused(status, code, message)
    if status >= 300:
        raise NoAnswer(f"HTTP {status}", status)
    return data
