"""Who may import whom: app → schemas and brokers → model; the SDKs only when they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "app": ("futu", "moomoo", "ib_insync", "ib_async", "longport", "tigeropen"),
    "brokers": ("httptrading.app", "httptrading.schemas", "flask", "marshmallow", "werkzeug"),
    "schemas": ("httptrading.app", "httptrading.brokers", "flask", "sqlalchemy", "werkzeug"),
}
"""Folder → what its modules never import, at the top or anywhere else."""

SDKS = ("futu", "moomoo", "ib_insync", "ib_async", "longport", "tigeropen", "pandas", "numpy")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports reach above the folder"
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_folder_imports_only_what_lies_below_it(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imported(path)
        for forbidden in FORBIDDEN[folder]
        if name == forbidden or name.startswith(f"{forbidden}.")
    ]
    assert not wrong


def test_the_model_and_the_errors_stand_alone() -> None:
    for module in ("model", "errors"):
        names = set(imported(ROOT / "httptrading" / f"{module}.py"))
        assert not {name for name in names if name.startswith("httptrading")}


def test_importing_everything_imports_no_sdk() -> None:
    modules = sorted(
        f"httptrading.{folder}.{path.stem}"
        for folder in ("app", "brokers", "schemas")
        for path in (ROOT / folder).glob("*.py")
        if path.stem != "__init__"
    )
    code = (
        "import importlib, sys\n"
        f"for name in ['httptrading', *{modules!r}]: importlib.import_module(name)\n"
        f"print([name for name in {SDKS!r} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stdout + done.stderr
