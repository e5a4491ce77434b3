"""The systemd unit, judged by systemd's own tools (`make deploy-test`)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORST_EXPOSURE = 2.0
"""Of 10; what `systemd-analyze security` calls OK ends at 4.9."""


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with this machine's paths."""
    text = (ROOT / "deploy" / "httptrading.service").read_text()
    gunicorn = Path(sys.executable).with_name("gunicorn")
    text = text.replace("/opt/httptrading/.venv/bin/gunicorn", str(gunicorn))
    written = tmp_path / "httptrading.service"
    written.write_text(text.replace("/opt/httptrading", str(ROOT)))
    return written


def test_systemd_accepts_the_unit(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_unit_is_hardened(unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(unit)],
        capture_output=True,
        text=True,
    )
    level = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert level, done.stdout + done.stderr
    assert float(level[1]) <= WORST_EXPOSURE
