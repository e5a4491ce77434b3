"""LongBridge over the wire: the real SDK and our REST against a simulated LongPort."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from acceptance.cases import BrokerAcceptance, FaultAcceptance, PushAcceptance
from acceptance.kit import Subject
from httptrading.brokers.longbridge import LongBridge
from simulators.exchange import Exchange
from simulators.longport import LongPort


@pytest.fixture(scope="module", autouse=True)
def no_proxies() -> Iterator[None]:
    """The SDK would go through one even to the loopback."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            patch.delenv(name, raising=False)
            patch.delenv(name.upper(), raising=False)
        yield


def token_file(folder: Path, token: str = "token-1", seconds: float = 60 * 86400) -> Path:
    path = folder / "token.toml"
    end = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))
    path.write_text(f'token = "{token}"\nexpiry = {end}\nnote = "kept"\n')
    path.chmod(0o600)
    return path


def broker(server: LongPort, folder: Path, **changes: object) -> LongBridge:
    arguments = {
        "app_key": "app-key",
        "app_secret": "app-secret",
        "token_file": str(folder / "token.toml"),
        "http_url": server.http_url,
        "quote_ws_url": server.quote_ws_url,
        "trade_ws_url": server.trade_ws_url,
    }
    return LongBridge(arguments | changes)


class TestAcceptance(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    """The kit's cases."""

    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        folder = tmp_path_factory.mktemp("longbridge")
        token_file(folder)
        exchange = Exchange()
        with (
            LongPort(exchange) as server,
            Subject(broker(server, folder), folder / "data", exchange, server) as subject,
        ):
            yield subject
