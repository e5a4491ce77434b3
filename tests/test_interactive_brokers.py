"""Interactive Brokers over the wire: the real SDK, whichever is installed, against a TWS."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from acceptance.cases import BrokerAcceptance, FaultAcceptance, PushAcceptance
from acceptance.kit import Subject
from httptrading.brokers.interactive_brokers import InteractiveBrokers
from simulators.exchange import Exchange, ExchangePosition
from simulators.tws import Tws

ACCOUNT = "DU1234567"


def broker(tws: Tws, **changes: object) -> InteractiveBrokers:
    arguments = {
        "host": tws.host,
        "port": tws.port,
        "timeout": 8,
        "client_id": 7,
        "account_id": ACCOUNT,
    }
    return InteractiveBrokers(arguments | changes)


class InteractiveBrokersSubject(Subject):
    """A-shares at IB are China Connect: their money is CNH."""

    def currency(self, region: str) -> str:
        return "CNH" if region == "CN" else super().currency(region)

    def holdings(self) -> list[ExchangePosition]:
        return [
            replace(one, currency=self.currency(one.region)) for one in super().holdings()
        ]


@pytest.fixture(scope="class")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    exchange = Exchange()
    data_dir: Path = tmp_path_factory.mktemp("data")
    with (
        Tws(exchange) as tws,
        InteractiveBrokersSubject(broker(tws), data_dir, exchange, tws) as subject,
    ):
        yield subject


class TestAcceptance(BrokerAcceptance, FaultAcceptance, PushAcceptance):
    """The kit's cases."""
