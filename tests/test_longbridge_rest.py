"""LongPort's signed REST: what is sent, what counts as sent, connections, proxies and TLS."""

import asyncio
import contextlib
import datetime
import http.server
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from httptrading.brokers import longbridge_rest
from httptrading.brokers.longbridge_rest import (
    LongPortRest,
    NoAnswer,
    NotSent,
    Refused,
    read_answer,
)
from simulators.exchange import Exchange, FaultKind
from simulators.longport import LongPort

OK = b'{"code":0,"message":"","data":{"a":1}}'
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting succeeds also on a machine that stands still for seconds."""
    monkeypatch.setattr(longbridge_rest, "CONNECT_SECONDS", 60.0)


@pytest.fixture
def server() -> Iterator[LongPort]:
    with LongPort(Exchange()) as server:
        yield server


def client(url: str, token: str = "token-1", secret: str = "app-secret") -> LongPortRest:
    return LongPortRest(url, "app-key", secret, lambda: token)


def answer(head: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {head}\r\n\r\n".encode() + body


@contextlib.asynccontextmanager
async def answering(*answers: bytes | None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives these answers in turn (None: it closes instead); its address, and the
    heads of what came in, an empty one for each new connection."""
    came: list[bytes] = []
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(b"")
        with contextlib.suppress(OSError, EOFError):
            while left:
                came.append(await reader.readuntil(b"\r\n\r\n"))
                given = left.pop(0)
                if given is None:
                    break
                writer.write(given)
                await writer.drain()
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}", came
    finally:
        listening.close()


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await work()
            while len(asyncio.all_tasks()) > 1:  # connections are still being closed
                await asyncio.sleep(0)
            for _ in range(3):
                await asyncio.sleep(0)

    asyncio.run(bounded())


def test_requests_are_signed_as_the_sdk_signs_them(server: LongPort) -> None:
    """The simulator's check is the one that the SDK's own requests pass."""

    async def work() -> None:
        rest = client(server.http_url)
        data = await rest.request("GET", "/v1/asset/account", {"currency": "USD"})
        assert data["list"][0]["cash_infos"][0]["available_cash"] == "30877.499"
        body = {
            "symbol": "AAPL.US",
            "order_type": "LO",
            "side": "Buy",
            "submitted_quantity": "1",
            "time_in_force": "Day",
            "submitted_price": "1.50",
            "remark": 'ü "x"',
        }
        placed = await rest.request("POST", "/v1/trade/order", None, body)
        order = server.exchange.orders[placed["order_id"]]
        assert (order.mark, order.wire["submitted_price"]) == ('ü "x"', "1.50")
        await rest.request("DELETE", "/v1/trade/order", {"order_id": placed["order_id"]})
        assert len(server.connected("rest")) == 1, "one connection for all of them"
        rest.close()
        for other, code in (
            (client(server.http_url, secret="other"), 403201),
            (client(server.http_url, token="other"), 401004),
        ):
            with pytest.raises(Refused) as refused:
                await other.request("GET", "/v1/asset/stock")
            assert refused.value.code == code
            other.close()

    run(work)


def test_every_framing_of_an_answer() -> None:
    async def work() -> None:
        chunks = b"5;x=y\r\n" + OK[:5] + b"\r\n%x\r\n" % (len(OK) - 5) + OK[5:] + b"\r\n0\r\n\r\n"
        async with answering(
            answer(f"200 OK\r\ncontent-length: {len(OK)}", OK),
            answer("200 OK\r\nTransfer-Encoding: chunked", chunks),
            answer(f"200 OK\r\nContent-Length: {len(OK)}\r\nConnection: Close", OK),
            answer(f"200\r\nContent-Length: {len(OK)}", OK),
        ) as (url, came):
            rest = client(url)
            for _ in range(4):
                assert await rest.request("GET", "/v1/x") == {"a": 1}
            rest.close()
        assert [head == b"" for head in came] == [True, False, False, False, True, False]

    run(work)


@pytest.mark.parametrize(
    "head",
    ["200 OK\r\nConnection: close", "200 OK", "200 OK\r\nTransfer-Encoding: identity"],
)
def test_an_answer_that_ends_with_its_connection_is_read_to_the_end(head: str) -> None:
    async def work() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(answer(head, OK[:9]))
        reading = asyncio.create_task(read_answer(reader))
        while reader._buffer:  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        reader.feed_data(OK[9:])
        reader.feed_eof()
        assert await reading == (200, OK, False)

    run(work)


def test_what_has_no_body_and_what_comes_before_an_answer() -> None:
    async def work() -> None:
        whole = answer(f"200 OK\r\nContent-Length: {len(OK)}", OK)
        async with answering(
            answer("204 No Content", b""),
            answer("304 Not Modified\r\nContent-Length: 40", b""),
            answer("100 Continue", answer("103 Early Hints\r\nLink: x", whole)),
        ) as (url, came):
            rest = client(url)
            for _ in range(2):
                with pytest.raises(NoAnswer):
                    await rest.request("GET", "/v1/x")
            assert await rest.request("GET", "/v1/x") == {"a": 1}
            rest.close()
        assert came.count(b"") == 1, "one connection for all of them"

    run(work)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ("200 OK", b"x" * 1025),
        ("200 OK\r\nContent-Length: 1025", b""),
        ("200 OK\r\nTransfer-Encoding: chunked", b"400\r\n" + b"x" * 1024 + b"\r\n1\r\nx\r\n"),
    ],
)
def test_no_answer_is_larger_than_allowed(
    monkeypatch: pytest.MonkeyPatch, head: str, body: bytes
) -> None:
    monkeypatch.setattr(longbridge_rest, "LARGEST_ANSWER", 1024)

    async def work() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(answer(head, body))
        reader.feed_eof()
        with pytest.raises(ValueError):
            await read_answer(reader)

    run(work)


@pytest.mark.parametrize(
    "given",
    [
        None,
        b"SSH-2.0-OpenSSH\r\n\r\n",
        answer("200 OK\r\nContent-Length: many", OK),
        answer("200 OK\r\nTransfer-Encoding: chunked", b"xyz\r\n"),
        answer("502 Bad Gateway\r\nContent-Length: 4", b"oops"),
    ],
)
def test_what_is_no_answer(given: bytes | None) -> None:
    async def work() -> None:
        async with answering(given, None) as (url, came):
            rest = client(url)
            with pytest.raises(NoAnswer):
                await rest.request("POST", "/v1/trade/order", None, {"a": "b"})
            rest.close()
        assert len([head for head in came if head]) == 1, "never sent again"

    run(work)


def test_a_connection_closed_while_idle_is_not_used(server: LongPort) -> None:
    async def work() -> None:
        rest = client(server.http_url)
        await rest.request("GET", "/v1/asset/stock")
        server.cut()  # the news of it is in the kernel, the loop has not looked
        await rest.request("GET", "/v1/asset/stock")
        rest.close()

    run(work)


@pytest.mark.parametrize(
    "stray",
    [
        answer("408 Request Timeout\r\nContent-Length: 0\r\nConnection: close", b""),
        answer(f"200 OK\r\nContent-Length: {len(OK)}", OK.replace(b"1", b"2")),
        b"\r\n",
    ],
)
def test_what_came_unasked_is_no_answer(stray: bytes) -> None:
    """RFC 9112, 9.2: never the next request's, and the connection is not used again."""

    async def work() -> None:
        whole = answer(f"200 OK\r\nContent-Length: {len(OK)}", OK)
        async with answering(whole + stray, whole) as (url, came):
            rest = client(url)
            await rest.request("GET", "/v1/x")
            assert await rest.request("POST", "/v1/trade/order", None, {"b": "c"}) == {"a": 1}
            assert [head == b"" for head in came] == [True, False, True, False]
            rest.close()

    run(work)


def test_a_connection_idle_for_long_is_not_used(
    server: LongPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        rest = client(server.http_url)
        await rest.request("GET", "/v1/asset/stock")
        used = rest._streams
        await rest.request("GET", "/v1/asset/stock")
        assert rest._streams is used
        later = time.monotonic() + longbridge_rest.IDLE_SECONDS
        monkeypatch.setattr(longbridge_rest.time, "monotonic", lambda: later)
        await rest.request("GET", "/v1/asset/stock")
        assert rest._streams is not used
        monkeypatch.undo()
        rest.close()

    run(work)


class InTwoPieces(http.server.BaseHTTPRequestHandler):
    """Python's own server writes head and body apart: the second waits for the first's ACK."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(OK)))
        self.end_headers()
        self.wfile.write(OK)

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux delays acknowledgements")
def test_an_answer_in_two_pieces_is_not_held_up() -> None:
    """By 40 ms, if not always on a new connection."""

    async def work() -> None:
        rest = client(f"http://127.0.0.1:{server.server_port}")
        number, took, end = 0, 1.0, time.monotonic() + 60
        while number < 20 or took > 0.03:
            began = time.monotonic()
            assert began < end, "every answer is held up"
            assert await rest.request("GET", "/v1/asset/stock") == {"a": 1}
            number, took = number + 1, time.monotonic() - began
        rest.close()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), InTwoPieces) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            run(work)
        finally:
            server.shutdown()
            serving.join()


def test_cancelled_requests_leave_nothing_behind(server: LongPort) -> None:
    async def work() -> None:
        rest = client(server.http_url)
        server.exchange.fault("cash", FaultKind.LATE, seconds=60)
        asking = asyncio.create_task(rest.request("GET", "/v1/asset/account"))
        while not server.exchange.received("cash"):
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        server.let_go.set()
        data = await rest.request("GET", "/v1/asset/stock")
        assert data == {"list": []}, "not the late answer"
        rest.close()

    run(work)


def test_a_request_that_was_given_up_does_not_arrive_later() -> None:
    """As it would after an outage: here it waits for room at the server."""

    async def work() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the least there is
            listening.setblocking(False)
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            rest = client(f"http://127.0.0.1:{listening.getsockname()[1]}")
            order = {"remark": "x" * 8000}
            asking = asyncio.create_task(rest.request("POST", "/v1/trade/order", None, order))
            connection, _ = await loop.sock_accept(listening)
            with connection:
                came = len(await loop.sock_recv(connection, 1))
                while rest._streams is None or rest._streams[1].transport.get_write_buffer_size():
                    await asyncio.sleep(0)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                with contextlib.suppress(ConnectionResetError):
                    while part := await loop.sock_recv(connection, 65536):
                        came += len(part)
        assert came < 8000

    run(work)


def test_not_sent() -> None:
    async def work() -> None:
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            with pytest.raises(NotSent):
                await client(url).request("GET", "/v1/x")
        with pytest.raises(NotSent):
            await client("http://:1").request("GET", "/v1/x")
        with socket.socket() as full:
            # Its backlog is full, so that connecting goes on until the deadline.
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            address = full.getsockname()
            fillers = [socket.socket() for _ in range(3)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(address)
            with pytest.raises(NotSent):
                async with asyncio.timeout(0.3):
                    await client(f"http://127.0.0.1:{address[1]}").request(
                        "POST", "/v1/x", None, {}
                    )
            for filler in fillers:
                filler.close()

    run(work)


# --- TLS and proxies --------------------------------------------------------------------------
@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of its own for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulated")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


class Relay:
    """Takes TLS (`certificate`) or CONNECT requests and passes everything on to a port."""

    def __init__(self, port: int, certificate: Path | None = None) -> None:
        self.asked: list[str] = []
        self._target = port
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "Relay":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(60)

    def _accept(self) -> None:
        while True:
            try:
                client_side, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client_side,), daemon=True).start()

    def _serve(self, client_side: socket.socket) -> None:
        try:
            if self._context is not None:
                client_side = self._context.wrap_socket(client_side, server_side=True)
            else:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    byte = client_side.recv(1)
                    if not byte:
                        raise ConnectionResetError
                    head += byte
                self.asked.append(head.decode())
                client_side.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        except OSError:
            client_side.close()
            return
        target = socket.create_connection(("127.0.0.1", self._target))

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)

        back = threading.Thread(target=pump, args=(target, client_side), daemon=True)
        back.start()
        pump(client_side, target)
        back.join(10)
        client_side.close()
        target.close()


def test_tls_with_and_without_a_proxy(
    server: LongPort, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Relay(server.port, certificate) as secure, Relay(secure.port) as proxy:
        url = f"https://127.0.0.1:{secure.port}"

        async def ask() -> None:
            rest = client(url)
            try:
                for _ in range(2):
                    data = await rest.request("GET", "/v1/asset/stock")
                    assert data == {"list": []}
            finally:
                rest.close()

        async def refused() -> None:
            with pytest.raises(NotSent, match="SSL"):
                await ask()

        run(refused)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        run(ask)
        assert not proxy.asked
        monkeypatch.setenv("HTTPS_PROXY", f"http://us%40er:pass@127.0.0.1:{proxy.port}")
        run(ask)
        [head] = proxy.asked
        assert head.startswith(f"CONNECT 127.0.0.1:{secure.port} HTTP/1.1\r\n")
        assert "Proxy-Authorization: Basic dXNAZXI6cGFzcw==\r\n" in head
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        run(ask)
        assert len(proxy.asked) == 1
