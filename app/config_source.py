"""One TOML file as its author means it: secrets may stand in it, in the environment or in files.

No secret is ever part of an error's text.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from httptrading.app.config_checks import ConfigurationError

_VARIABLE = re.compile(r"\$?\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_NAME = re.compile(r"key|secret|token|pin|password|account|tiger_id", re.IGNORECASE)
_SECRET_KEYS = ("id", "tokens", "journal_url", "metrics_token")
_BROKERS_OWN_FILES = frozenset({"token_file"})


class Source:
    """One TOML file: replaces `${NAME}` and `…_file`, and collects what is wrong, with its place.

    - `"${NAME}"` inside any string is the environment variable's value (`$${` is a plain `${`).
    - `id_file`, `tokens_file` (a token per line), `journal_url_file` and `metrics_token_file` name
      files that hold the value; so does `<argument>_file` in `args`, which becomes `<argument>`.
      The one exception is LongBridge's documented argument `token_file`: that is a path and stays
      one, since the adapter writes the refreshed token there.
    """

    def __init__(self, path: Path, environ: Mapping[str, str]) -> None:
        self.path = path
        self.environ = environ
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.secrets: set[str] = set()
        self.failed: set[str] = set()

    def problem(self, place: str, text: str) -> None:
        self.problems.append(f"{self.path.name}: {place}: {text}" if place else text)

    def tables(self) -> dict[str, Any]:
        try:
            text = self.path.read_text("utf-8-sig")  # Windows' editors may begin with a mark
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigurationError([f"{self.path}: cannot be read: {reason}"]) from None
        try:
            tables = tomllib.loads(text, parse_float=Decimal)
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError([f"{self.path.name}: not valid TOML: {error}"]) from None
        self._check_mode(self.path)
        return tables

    def resolved(self, place: str, table: Mapping[str, Any]) -> dict[str, Any]:
        """The table with every variable and file replaced by what it stands for.

        A key whose value can't be had is left out and noted in `failed`.
        """
        result: dict[str, Any] = {}
        for key, value in table.items():
            at = f"{place}{key}"
            before = len(self.problems)
            if key == "args" and isinstance(value, dict):
                result[key] = self._arguments(f"{at}.", value)
                continue
            name = key.removesuffix("_file")
            if name != key and name in _SECRET_KEYS:
                if name in table:
                    self.problem(at, f"{name} and {key} can't both be there")
                    continue
                content = self._file(at, value)
                if content is None:
                    self.failed.add(f"{place}{name}")
                    continue
                lines = [line.strip() for line in content.splitlines() if line.strip()]
                result[name] = lines if name == "tokens" else content
                self.secrets.update(lines)
                continue
            expanded = self._expanded(at, value)
            if len(self.problems) > before:
                self.failed.add(at)
                continue
            result[key] = expanded
            if key in _SECRET_KEYS:
                self.secrets.update(_texts(expanded))
        return result

    def _arguments(self, place: str, table: Mapping[str, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in table.items():
            name = key.removesuffix("_file")
            if name != key and name and key not in _BROKERS_OWN_FILES:
                if name in table:
                    self.problem(f"{place}{key}", f"{name} and {key} can't both be there")
                    continue
                content = self._file(f"{place}{key}", value)
                if content is None:
                    self.failed.add(place)
                else:
                    result[name] = content
                    self.secrets.add(content)
                continue
            before = len(self.problems)
            result[key] = _plain(self._expanded(f"{place}{key}", value))
            if len(self.problems) > before:
                self.failed.add(place)
            if _SECRET_NAME.search(key):
                self.secrets.update(_texts(result[key]))
        return result

    def _expanded(self, place: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._expanded(f"{place}.{key}", item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._expanded(f"{place}[{n}]", item) for n, item in enumerate(value)]
        if not isinstance(value, str):
            return value
        if "\0" in value:
            self.problem(place, "has a NUL character")

        def variable(match: re.Match[str]) -> str:
            if match[0].startswith("$$"):
                return match[0][1:]
            if match[1] not in self.environ:
                self.problem(place, f"the environment variable {match[1]} is not set")
                return ""
            self.secrets.add(self.environ[match[1]])
            return self.environ[match[1]]

        return _VARIABLE.sub(variable, value)

    def _file(self, place: str, value: Any) -> str | None:
        if not isinstance(value, str):
            self.problem(place, "must be the path of a file")
            return None
        before = len(self.problems)
        path: Path = self.path.parent / self._expanded(place, value)
        if len(self.problems) > before:
            return None
        try:
            content = path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            # As it stands in the file: the variable may hold the secret itself by mistake.
            named = value if _VARIABLE.search(value) else path
            self.problem(place, f"{named} cannot be read: {reason}")
            return None
        self._check_mode(path)
        return content.rstrip("\r\n")

    def _check_mode(self, path: Path) -> None:
        if os.name == "posix" and path.stat().st_mode & stat.S_IROTH:
            self.warnings.append(f"{path} can be read by every user: chmod o-r it")

    def safe(self, text: str) -> str:
        """The text of somebody else's error, without any secret of this file."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            if len(secret) >= 4:
                text = text.replace(secret, "…")
        return text


def _texts(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            yield item


def _plain(value: Any) -> Any:
    """Brokers' arguments are ordinary Python values: TOML's decimal numbers become floats."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
