"""The acceptance kit with Futu: REAL and SIMULATE, plain and encrypted (in a child process)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from Crypto.PublicKey import RSA

from acceptance.cases import BrokerAcceptance, FaultAcceptance, PushAcceptance
from acceptance.kit import Subject, Trader
from httptrading.brokers.futu import Futu, Moomoo
from simulators.exchange import Exchange, ExchangePosition
from simulators.opend import OpenD

INSTANCE = "FutuAcceptance01", ["futuAcceptance00001"]


class FutuSubject(Subject):
    """A-shares are held in CNH at Futu."""

    def holdings(self) -> list[ExchangePosition]:
        held = super().holdings()
        return [replace(one, currency="CNH") if one.region == "CN" else one for one in held]


@contextmanager
def futu(
    folder: Path, env: str, *, encrypted: bool = False, broker_class: type[Futu] = Futu
) -> Iterator[Subject]:
    key = folder / "key.pem"
    key.write_bytes(RSA.generate(1024).export_key())
    exchange = Exchange()
    with OpenD(exchange, rsa_key=key if encrypted else None, locked=env == "REAL") as opend:
        arguments: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": opend.port,
            "trade_env": env,
            "pk_path": str(key) if encrypted else "",
            "unlock_pin": opend.pin_md5,
        }
        broker = broker_class(arguments, *INSTANCE)
        with FutuSubject(broker, folder / "data", exchange, opend) as subject:
            yield subject


class TestReal(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        with futu(tmp_path_factory.mktemp("real"), "REAL") as subject:
            yield subject


class TestSimulate(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        with futu(tmp_path_factory.mktemp("simulate"), "SIMULATE") as subject:
            yield subject

    def test_fills_are_listed(self, subject: Subject, trader: Trader) -> None:
        """Paper accounts at Futu tell no fills (qa/trade.html Q1), only what they add up to."""
        order_id = trader.placed(subject.limit())
        subject.fill(order_id, 5, "12.30")
        trader.wait_order(order_id, filledQty=5)
        assert trader.fills(order_id)["fills"] == []
        trader.cancel(order_id)


class TestRealEncrypted(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        with futu(tmp_path_factory.mktemp("encrypted"), "REAL", encrypted=True) as subject:
            yield subject


class TestSimulateEncrypted(TestSimulate):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        with futu(tmp_path_factory.mktemp("encrypted"), "SIMULATE", encrypted=True) as subject:
            yield subject


class TestMoomoo(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    @pytest.fixture(scope="class")
    def subject(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
        folder = tmp_path_factory.mktemp("moomoo")
        with futu(folder, "REAL", broker_class=Moomoo) as subject:
            yield subject
