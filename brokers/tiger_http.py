"""One signed request to Tiger's gateway, one verified answer: the SDK's clients on our transport.

The SDK's own transport (tigeropen/common/util/web_utils.py) shares one urllib3 pool that repeats
after connect errors and follows redirects (a 307 sent an order twice), accepts answers without a
sign, and puts the whole signed request into its exceptions and its log. So the SDK signs requests
and parses answers here, and everything between the two is ours. No SDK is imported before
`make_clients()`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from httptrading.brokers.sockets import acknowledge_at_once, drop_unsent_at_end, in_one_piece
from httptrading.errors import BrokerUnavailable, Busy, HttpTradingError, RateLimited

log = logging.getLogger("httptrading.tiger")

_Result = TypeVar("_Result")

IDLE_LIMIT = 15.0
"""Seconds after which an unused connection is not trusted any more: a server that has just closed
it would leave an order's fate open for nothing."""

MOST_BYTES = 32 * 1024 * 1024
RETRY_AFTER = 10.0

QUIET = logging.Logger("tigeropen, silenced")
"""Given to the SDK in place of `tiger_openapi`, whose messages hold signed requests."""
QUIET.disabled = True


class NoAnswer(Exception):
    """Something was sent, and nothing intelligible came back; `late`: nothing at all in time."""

    def __init__(self, text: str, *, late: bool = False) -> None:
        super().__init__(text)
        self.text, self.late = text, late


class Unbelieved(NoAnswer):
    """An answer that Tiger's key has not signed."""


class Refused(Exception):
    """The gateway's own refusal (`ApiException` of the SDK): a code and its words."""

    def __init__(self, code: int, words: str) -> None:
        super().__init__(words)
        self.code, self.words = code, words


@dataclass(frozen=True)
class Credentials:
    """Who we are at Tiger; nothing of it is ever printed."""

    tiger_id: str = field(repr=False)
    account: str = field(repr=False)
    private_key: str = field(repr=False)  # PKCS#1 DER in base64
    secret_key: str = field(repr=False)  # of institutional traders, else ""
    public_key: str  # Tiger's, base64 or PEM; "": the one in the SDK
    server_url: str  # "": the SDK's


def read_private_key(path: str) -> str:
    """The key in the SDK's form, from any file Tiger's site hands out.

    PKCS#1 and PKCS#8, with and without PEM lines: the SDK's own reader takes the first only.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    try:
        text = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise BrokerUnavailable(
            f"The key file of pk_path cannot be read ({type(error).__name__}); "
            "check the path and its permissions"
        ) from None
    try:
        if b"-----BEGIN" in text:
            key = serialization.load_pem_private_key(text, None)
        else:
            key = serialization.load_der_private_key(base64.b64decode(text), None)
    except Exception:  # its text may quote the key
        key = None
    if not isinstance(key, RSAPrivateKey):
        raise BrokerUnavailable(
            "The file of pk_path holds no RSA private key; download it again from Tiger's site"
        )
    form = serialization.PrivateFormat.TraditionalOpenSSL
    plain = serialization.NoEncryption()
    return base64.b64encode(key.private_bytes(serialization.Encoding.DER, form, plain)).decode()


def device_id(tiger_id: str) -> str:
    """A stable stand-in for the MAC address that the SDK takes as the device.

    A container's MAC changes with every start, and with it the quote permission would be lost;
    two accounts of one tiger_id must be one device, or they take it from each other.
    """
    digits = hashlib.sha256(f"httptrading tiger device {tiger_id}".encode()).hexdigest()
    return ":".join(["02", *(digits[i : i + 2] for i in range(0, 10, 2))])


class _Deadlined(io.RawIOBase):
    """What a socket receives until a deadline: its own timeout begins anew with each piece."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, left: Callable[[], float]) -> None:
        self._raw, self._sock, self._left = raw, sock, left

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Any:
        self._sock.settimeout(self._left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _response_within(left: Callable[[], float]) -> type[http.client.HTTPResponse]:
    class Response(http.client.HTTPResponse):
        def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(sock, *args, **kwargs)
            self.fp = io.BufferedReader(_Deadlined(self.fp.detach(), sock, left))

    return Response


class Transport:
    """One keep-alive connection to the gateway, used by one thread; `abort()` by any.

    Sends each request once, follows no redirect, repeats nothing, and knows whether a failure
    came before anything was sent. Called by the SDK in place of its `do_post`.
    """

    def __init__(self, url: str, public_key: str) -> None:
        self._url = urlsplit(url)
        self._public_key = public_key
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        self._connection: http.client.HTTPConnection | None = None
        self._used = 0.0
        self._deadline = float("inf")
        self._aborted = False

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """All requests inside end within these seconds together."""
        outer = self._deadline
        self._deadline = min(outer, time.monotonic() + seconds)
        try:
            yield
        finally:
            self._deadline = outer

    def open(self) -> None:
        """Connects unless connected; BrokerUnavailable when that fails, and nothing was sent."""
        if self._connection is not None and self._usable(self._connection):
            return
        self.close()
        host, port = self._url.hostname or "", self._url.port
        left = self._left()
        connection = (
            http.client.HTTPSConnection(host, port, timeout=left, context=self._tls)
            if self._tls
            else http.client.HTTPConnection(host, port, timeout=left)
        )
        connection.response_class = _response_within(self._left_to_receive)
        connection.auto_open = 0  # it must not connect again behind our back
        self._connection = connection
        try:
            connection.connect()
            drop_unsent_at_end(connection.sock)
        except ssl.SSLCertVerificationError:
            self.close()
            raise BrokerUnavailable("The certificate of Tiger's gateway is not trusted") from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            self.close()
            raise BrokerUnavailable(
                f"Tiger's gateway cannot be reached ({type(error).__name__})"
            ) from None
        if self._aborted:
            self.close()
            raise BrokerUnavailable("The connection to Tiger was given up")
        self._used = time.monotonic()

    def __call__(
        self,
        request: Any,
        url: str,
        query_string: Any,
        headers: Mapping[str, str],
        params: Mapping[str, Any],
    ) -> bytes:
        """The verified body of the answer; signature of the SDK's `__do_post`."""
        body = json.dumps(params, allow_nan=False).encode()
        self.open()
        connection = self._connection
        assert connection is not None and connection.sock is not None
        try:
            connection.sock.settimeout(self._left())
            with in_one_piece(connection.sock):
                connection.request("POST", self._url.path or "/", body, dict(headers))
            acknowledge_at_once(connection.sock)
            response = connection.getresponse()
            answer = response.read(MOST_BYTES)
        except TimeoutError:
            self.close()
            raise NoAnswer("Tiger's gateway did not answer in time", late=True) from None
        except (OSError, http.client.HTTPException, ValueError):
            self.close()
            raise NoAnswer("The connection to Tiger's gateway broke") from None
        self._used = time.monotonic()
        if response.will_close or len(answer) == MOST_BYTES:
            self.close()
        if response.status == 429:
            raise rate_limited()
        if response.status != 200:
            raise NoAnswer(f"Tiger's gateway answered HTTP {response.status}")
        self._verify(answer, str(params["timestamp"]))
        return answer

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def abort(self) -> None:
        """Ends the request under way, from another thread, and allows no further one."""
        self._aborted = True
        connection = self._connection
        sock = connection.sock if connection is not None else None
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if self._aborted:
            raise BrokerUnavailable("The connection to Tiger was given up")
        if left <= 0:
            raise Busy("There was no time left to ask Tiger; nothing was sent", retry_after=1)
        return left

    def _left_to_receive(self) -> float:
        try:
            return self._left()
        except (Busy, BrokerUnavailable):  # which say that nothing was sent
            raise TimeoutError from None

    def _usable(self, connection: http.client.HTTPConnection) -> bool:
        """Whether the server has neither closed it nor said anything since the last answer."""
        sock = connection.sock
        if sock is None or time.monotonic() - self._used > IDLE_LIMIT:
            return False
        sock.settimeout(0)
        try:
            sock.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):  # TLS may have had tickets to deliver
            return True
        except OSError:
            pass
        return False

    def _verify(self, answer: bytes, timestamp: str) -> None:
        """Tiger signs the request's timestamp (tiger_open_client.py `__parse_response`). The SDK
        lets any answer without a sign pass, we only a refusal."""
        from tigeropen.common.util.signature_utils import verify_with_rsa

        try:
            content = json.loads(answer)
        except (ValueError, RecursionError):
            raise NoAnswer("Tiger's gateway answered something that is not JSON") from None
        if _is_unsigned_refusal(content):
            return
        sign = content.get("sign") if isinstance(content, dict) else None
        if not isinstance(sign, str):
            raise Unbelieved("The answer does not carry Tiger's signature, so it is not believed")
        try:
            verify_with_rsa(self._public_key, timestamp.encode(), sign.encode())
        except Exception:
            raise Unbelieved(
                "The answer is wrongly signed, so it is not believed; check tiger_public_key"
            ) from None


def _is_unsigned_refusal(content: Any) -> bool:
    """Tiger's own examples of errors carry no sign (docs.itigerup.com/docs/accounts, FAQ)."""
    if not isinstance(content, dict) or content.get("sign") is not None:
        return False
    code = content.get("code")
    return isinstance(code, int) and code != 0


def rate_limited(words: str = "") -> RateLimited:
    """Tiger black-lists accounts that go on (docs.itigerup.com/docs/ratelimit), so say it."""
    said = f" ({words})" if words else ""
    return RateLimited(
        f"Tiger's own rate limit refused the request{said}; nothing was done. Ask less often.",
        retry_after=RETRY_AFTER,
    )


def make_clients(who: Credentials) -> tuple[Any, Any, Transport]:
    """The SDK's trade and quote client on one transport. Imports the SDK; sends nothing.

    Some answers are taken as Tiger writes them, since the SDK's own reading makes a pandas table of
    quotes (which holds the interpreter longer than all else of the request), fails on an `openTime`
    that is "", on `segments` that are null and on a list with somebody's TWAP order (it reads the
    parameters by other names than it writes them), and hides whether a `positionQty` was there.
    """
    from tigeropen import tiger_open_config
    from tigeropen.common.consts.service_types import (
        ACTIVE_ORDERS,
        MARKET_STATE,
        ORDERS,
        POSITIONS,
        PRIME_ASSETS,
        QUOTE_REAL_TIME,
    )
    from tigeropen.common.exceptions import ApiException
    from tigeropen.common.request import OpenApiRequest
    from tigeropen.common.response import TigerResponse
    from tigeropen.quote.quote_client import QuoteClient
    from tigeropen.quote.request.model import MarketParams, MultipleQuoteParams
    from tigeropen.tiger_open_client import TigerOpenClient
    from tigeropen.trade.request.model import (
        AssetParams,
        OrderParams,
        OrdersParams,
        PositionParams,
    )
    from tigeropen.trade.trade_client import TradeClient

    hook = "_TigerOpenClient__do_post"
    if not hasattr(TigerOpenClient, hook):
        raise BrokerUnavailable(
            "This version of tigeropen is not known to send an order only once: "
            "pip install 'tigeropen>=3.8,<3.9'"
        )

    class Config(tiger_open_config.TigerOpenClientConfig):  # type: ignore[misc]
        """Takes nothing from TIGEROPEN_* variables, a properties file or a token file."""

        def _load_env_vars(self) -> None: ...

        def _load_props(self) -> None: ...

        def load_token(self) -> None: ...

        def _TigerOpenClientConfig__get_device_id(self) -> str:  # else it may run `arp`
            return ""

    def data_of(client: TigerOpenClient, service: str, params: Any) -> Any:
        params.lang = config.language.value
        answer = TigerResponse()
        answer.parse_response_content(client.execute(OpenApiRequest(service, biz_model=params)))
        if not answer.is_success():
            raise ApiException(answer.code, answer.message)
        return answer.data

    def stock_orders(account: str, page: int) -> Any:
        params = OrdersParams()
        params.account, params.secret_key, params.sec_type = account, config.secret_key, "STK"
        params.market, params.limit = "ALL", page
        return params

    class Trade(TradeClient):  # type: ignore[misc]
        def order(self, account: str, order_id: int) -> Any:
            params = OrderParams()
            params.account, params.secret_key, params.id = account, config.secret_key, order_id
            return data_of(self, ORDERS, params)

        def orders(self, account: str, since: int, page: int, token: str) -> Any:
            params = stock_orders(account, page)
            params.start_date, params.page_token = since, token
            return data_of(self, ORDERS, params)

        def open_orders(self, account: str, until: int, page: int) -> Any:
            params = stock_orders(account, page)
            params.end_date = until
            return data_of(self, ACTIVE_ORDERS, params)

        def prime_assets(self, account: str, currency: str) -> Any:
            params = AssetParams()
            params.account, params.secret_key = account, config.secret_key
            params.base_currency, params.consolidated = currency, True
            return data_of(self, PRIME_ASSETS, params)

        def positions(self, account: str) -> Any:
            params = PositionParams()
            params.account, params.secret_key, params.sec_type = account, config.secret_key, "STK"
            params.market = "ALL"
            return data_of(self, POSITIONS, params)

    class Quotes(QuoteClient):  # type: ignore[misc]
        def real_time(self, symbol: str) -> Any:
            params = MultipleQuoteParams()
            params.symbols, params.include_hour_trading = [symbol], False
            return data_of(self, QUOTE_REAL_TIME, params)

        def market_states(self) -> Any:
            params = MarketParams()
            params.market = "ALL"
            return data_of(self, MARKET_STATE, params)

    config = Config(enable_dynamic_domain=False, props_path="")
    config.tiger_id, config.account = who.tiger_id, who.account
    config.private_key, config.secret_key = who.private_key, who.secret_key
    config.tiger_public_key = who.public_key or tiger_open_config.TIGER_PUBLIC_KEY
    config.server_url = config.quote_server_url = who.server_url or tiger_open_config.SERVER_URL
    config.token, config.license = None, None  # no license: no question about it, common gateway
    config.retry_max_tries = 0
    config.log_level = config.log_path = None
    config._device_id = device_id(who.tiger_id)
    transport = Transport(config.server_url, config.tiger_public_key)
    clients = (
        Trade(config, logger=QUIET),
        Quotes(config, logger=QUIET, is_grab_permission=False),
    )
    for client in clients:
        setattr(client, hook, transport)
    return (*clients, transport)


def ask(call: Callable[[], _Result]) -> _Result:
    """Runs one SDK call; raises BrokerUnavailable and RateLimited (nothing was done), `Refused`,
    or `NoAnswer`. The text of any other exception goes nowhere."""
    from tigeropen.common.exceptions import ApiException

    try:
        return call()
    except (HttpTradingError, NoAnswer):
        raise
    except ApiException as error:
        code = error.code if isinstance(error.code, int) else -1
        raise Refused(code, str(error.msg or "no reason given")) from None
    except Exception as error:
        log.warning("tigeropen failed on an answer: %s", type(error).__name__)
        raise NoAnswer("Tiger's answer makes no sense") from None
