"""Options of the long-running tests, and what holds for all property tests."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("here", deadline=None)  # a busy machine is no failure
settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--orders", type=int, default=200, help="orders of the kill test")
    parser.addoption("--minutes", type=float, default=1.0, help="length of the soak")
    parser.addoption("--seed", type=int, default=0, help="repeats a run's random choices")
