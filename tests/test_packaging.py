"""What lands in somebody's site-packages, and that it works beside a package called `app`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = {
    "httptrading": "httptrading",
    "app": "httptrading/app",
    "brokers": "httptrading/brokers",
    "schemas": "httptrading/schemas",
}
"""Folder in a checkout → folder in an installed copy."""

HOST = '''
"""Somebody's Flask application, whose own packages are called app and schemas."""
import app, schemas
from flask import Flask
from httptrading import BaseBroker, broker_register, create_app, create_blueprint
from httptrading.model import Cash
import httptrading

assert app.OWNER == schemas.OWNER == "host"
assert len(httptrading.__path__) == 1, httptrading.__path__
assert "site-packages" in httptrading.__file__, httptrading.__file__


@broker_register("mine", "My broker")
class Mine(BaseBroker):
    async def cash(self):
        return Cash("USD", 5)


host = Flask("host")
broker = Mine({}, instance_id="kQ4xV8mT1zR6pW9c", tokens=["b7Jd-2Ls9Qa0Xe5Ru8Yt"])
host.register_blueprint(create_blueprint([broker], data_dir="data"))
answer = host.test_client().get(
    "/httptrading/api/kQ4xV8mT1zR6pW9c/cash/state",
    headers={"HT-TOKEN": "b7Jd-2Ls9Qa0Xe5Ru8Yt", "HT-TIMEOUT": "30"},
)
assert answer.json["cash"] == {"type": "cash", "currency": "USD", "amount": 5}, answer.text
print("served")
'''


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, into: Path) -> Path:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--no-index", "--disable-pip-version-check", "-w", into, source),
        cwd=into,
    )
    (wheel,) = into.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from: building leaves files behind."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (*PARTS, "tests", "docs", "deploy"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "wsgi.py"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel in a virtual environment of its own; its dependencies are borrowed from ours."""
    place = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", place, cwd=place)
    python = place / "bin" / "python"
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"),
        *("--no-index", "--disable-pip-version-check", wheel),
        cwd=place,
    )
    return place


def site_packages(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_nothing_but_httptrading_is_installed(environment: Path) -> None:
    installed = {path.name for path in site_packages(environment).iterdir()}
    assert {name for name in installed if not name.endswith(".dist-info")} == {"httptrading"}


def test_every_module_is_in_the_wheel(wheel: Path, checkout: Path) -> None:
    expected = {"httptrading/py.typed"}
    for folder, place in PARTS.items():
        for path in (checkout / folder).rglob("*.py"):
            expected.add(f"{place}/{path.relative_to(checkout / folder).as_posix()}")
    assert files_in(wheel) == expected


def test_the_sdist_installs_the_same(wheel: Path, checkout: Path, tmp_path: Path) -> None:
    command = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    run(sys.executable, "-c", command, cwd=checkout)
    (sdist,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    assert files_in(build_wheel(unpacked, wheels)) == files_in(wheel)


def test_the_core_needs_no_sdk_and_no_pandas(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    needed = metadata.get_all("Requires-Dist") or []
    core = {need.split(">")[0].lower() for need in needed if "extra ==" not in need}
    assert core == {
        "apispec",
        "flask",
        "gunicorn",
        "marshmallow",
        "platformdirs",
        "simplejson",
        "sqlalchemy",
    }
    extras = set(metadata.get_all("Provides-Extra") or [])
    assert {"futu", "ib", "longbridge", "tiger", "metrics", "all", "dev"} <= extras
    assert metadata["License-Expression"] == "MIT"


def test_it_works_beside_a_package_called_app(environment: Path, tmp_path: Path) -> None:
    borrowed = site_packages(environment) / "borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__init__.py").write_text('OWNER = "host"\n')
    (tmp_path / "schemas.py").write_text('OWNER = "host"\n')
    (tmp_path / "host.py").write_text(HOST)
    try:
        assert run(environment / "bin" / "python", "host.py", cwd=tmp_path) == "served\n"
    finally:
        borrowed.unlink()


def test_make_leaves_no_half_made_environment(tmp_path: Path) -> None:
    """Debian without python3-venv: the environment's python is there, pip is not, and venv fails.
    Whoever then installs python3-venv and says `make run` again would be told "No module named
    pip" for ever."""
    debian = tmp_path / "python3"
    debian.write_text('#!/bin/sh\nmkdir -p "$3/bin" && touch "$3/bin/python"\nexit 1\n')
    debian.chmod(0o755)
    target = tmp_path / "venv" / "bin" / "python"
    command = ["make", f"VENV={tmp_path}/venv", f"PYTHON={debian}", str(target)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60).returncode != 0
    assert not target.exists()
