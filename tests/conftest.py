"""Options of the long-running tests, and what holds for all property tests."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# A machine that is busy, or stands still, is no failure; and what passed once passes again, so that
# nobody's change is refused for another's defect. New examples: --hypothesis-profile exploring.
settings.register_profile("exploring", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("here", settings.get_profile("exploring"), derandomize=True)
settings.load_profile("here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--orders", type=int, default=200, help="orders of the kill test")
    parser.addoption("--minutes", type=float, default=1.0, help="length of the soak")
    parser.addoption("--seed", type=int, default=0, help="repeats a run's random choices")
