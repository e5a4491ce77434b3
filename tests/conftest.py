"""Options of the long-running tests, what holds for all tests, and the count of tables."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from httptrading.brokers import limits

# A machine that is busy, or stands still, is no failure; and what passed once passes again, so that
# nobody's change is refused for another's defect. New examples: --hypothesis-profile exploring.
settings.register_profile("exploring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("here", settings.get_profile("exploring"), derandomize=True)
settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--orders", type=int, default=200, help="orders of the kill test")
    parser.addoption("--minutes", type=float, default=1.0, help="length of the soak")
    parser.addoption("--seed", type=int, default=0, help="repeats a run's random choices")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: begun last, all else would be over while they run."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Four SDKs, pandas and thousands of tests stay: no collection need look through them again."""
    gc.freeze()


@pytest.fixture(autouse=True)
def own_windows() -> None:
    """A simulator may get the port of one of an earlier test: then it is the same account to us,
    whose slots are used up."""
    limits._shared.clear()


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[object]]:
    """From its call on, the list that every pandas table made is added to. SDKs make one of each
    answer, which stops all threads of the process for longer than the request takes."""
    import pandas

    def count() -> list[object]:
        made: list[object] = []
        make = pandas.DataFrame.__init__

        def counted(self: object, *args: Any, **arguments: Any) -> None:
            made.append(type(self))
            make(self, *args, **arguments)

        monkeypatch.setattr(pandas.DataFrame, "__init__", counted)
        pandas.DataFrame([1])
        assert made, "tables are counted"
        made.clear()
        return made

    return count
