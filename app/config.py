"""The configuration: one TOML file becomes plain data, and every mistake in it is named at once.

Secrets may stand in the file, come from the environment (`"${NAME}"` inside any string) or from
files of their own (`tokens_file = "…"`; see `_Source`). No secret is ever part of an error's text.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import ipaddress
import math
import os
import re
import secrets
import shutil
import stat
import string
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import platformdirs
from marshmallow import RAISE, Schema, ValidationError, fields, validate

from httptrading.brokers.base import READS, BaseBroker, Window, masked
from httptrading.brokers.registry import broker_class
from httptrading.brokers.settings import EACH_CURRENCY, InstanceSettings

DOCUMENTED = frozenset(
    {
        "WyLqtMhDvAnBb6a3",
        "ggUqPZbSKuQ7Ewsk",
        "Vt5UCW2sLBvgPXjR",
        "MyPaperAccount01",
        "MyFutuAccount001",
        "myPaperToken000001",
    }
)
"""Instance ids and tokens that stand in public documents: they work, with a warning at each start.
"""

GENERATED_FILE = "paper-instance.toml"
"""Where, in the data directory, the instance of a service without configuration is kept."""

_INSTANCE_ID = re.compile(r"[A-Za-z0-9_-]{16,32}")
_TOKEN = re.compile(r"[\x21-\x7e]{16,64}")
_TOKEN_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")
_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VARIABLE = re.compile(r"\$?\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_NAME = re.compile(r"key|secret|token|pin|password|account|tiger_id", re.IGNORECASE)


class ConfigurationError(ValueError):
    """Everything that is wrong with a configuration: `problems`, each sentence with its place."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n".join((f"the configuration has {count}:", *problems)))


@dataclass(frozen=True)
class Settings:
    """What the service is started with."""

    instances: tuple[InstanceSettings, ...]
    data_dir: Path
    """Journal, locks, the paper exchange's books and what the SDKs write."""
    token_header: str = "HT-TOKEN"
    compat: str | None = None
    """"1.0": answer as the published httptrading 1.0.x does."""
    journal_url: str | None = field(default=None, repr=False)
    """An SQLAlchemy URL; None: SQLite in the data directory."""
    metrics_token: str | None = field(default=None, repr=False)
    """The token of `/httptrading/metrics`; None: no metrics."""
    host: str = "127.0.0.1"
    port: int = 8080
    threads: int = 32
    """Requests served at the same time."""
    generated: bool = False
    """True: there was no configuration, and the one paper instance is made up by us."""
    warnings: tuple[str, ...] = ()
    """What is allowed but unwise; to be logged at each start."""


def load_settings(path: Path | None, environ: Mapping[str, str]) -> Settings:
    """Reads `path`, else the file that `HTTPTRADING_CONFIG` names, else makes a paper instance.

    Raises ConfigurationError. `HTTPTRADING_DATA_DIR`, `HTTPTRADING_HOST` and `HTTPTRADING_PORT` win
    over the file.
    """
    if path is None and environ.get("HTTPTRADING_CONFIG"):
        path = Path(environ["HTTPTRADING_CONFIG"])
    if path is not None:
        return _load_file(path, environ)
    data_dir = default_data_dir(environ)
    return _load_file(_generated_file(data_dir), environ, generated=True)


def default_data_dir(environ: Mapping[str, str]) -> Path:
    """`HTTPTRADING_DATA_DIR`, else the user's data directory."""
    given = environ.get("HTTPTRADING_DATA_DIR")
    return Path(given) if given else Path(platformdirs.user_data_dir("httptrading", False))


def token_digest(token: str) -> bytes:
    """The SHA-256 of a token as it stands in a configuration, plain or already a digest."""
    if _TOKEN_DIGEST.fullmatch(token):
        return bytes.fromhex(token.removeprefix("sha256:"))
    return hashlib.sha256(token.encode()).digest()


def address(host: str, port: int) -> str:
    """As URLs and gunicorn's `bind` have it: an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_instances(
    instances: Sequence[InstanceSettings], places: Sequence[str] = ()
) -> tuple[str, ...]:
    """Checks ids, tokens and limits of instances made by a file or by Python code.

    `places` names each one in the text ("httptrading.toml: instance 1 (WyLq…)"). Returns
    warnings; raises ConfigurationError with every problem of every instance.
    """
    problems: list[str] = []
    warnings: list[str] = []
    documented = {token_digest(text) for text in DOCUMENTED}
    ids: dict[str, str] = {}
    digests: dict[bytes, str] = {}
    named = places or [
        f"brokers[{number}] ({type(instance.broker).__name__} "
        f"{masked(instance.broker.instance_id)})"
        for number, instance in enumerate(instances)
    ]
    all_ids = {token_digest(instance.broker.instance_id) for instance in instances}
    brokers = {instance.broker.instance_id: instance.broker for instance in instances}
    if not instances:
        problems.append("no instance is configured")
    for instance, place in zip(instances, named, strict=True):
        broker = instance.broker
        problems += (f"{place}, {problem}" for problem in _limit_problems(instance))
        problems += (f"{place}, {problem}" for problem in _quote_problems(instance, brokers))
        if not _INSTANCE_ID.fullmatch(broker.instance_id):
            problems.append(
                f"{place}, id: must have 16 to 32 characters of A-Z a-z 0-9 _ -, "
                f"this one has {len(broker.instance_id)}"
            )
        elif broker.instance_id in ids:
            problems.append(f"{place}, id: is the same as that of {ids[broker.instance_id]}")
        ids.setdefault(broker.instance_id, place)
        if broker.instance_id in DOCUMENTED:
            warnings.append(
                f"{place}, id: is copied from a document, so everybody knows it: make your own"
            )
        if not broker.tokens:
            problems.append(f"{place}, tokens: at least one is needed")
        for number, token in enumerate(broker.tokens):
            at = f"{place}, tokens[{number}]"
            if token.startswith("sha256:"):
                if not _TOKEN_DIGEST.fullmatch(token):
                    problems.append(f"{at}: sha256: must be followed by 64 hexadecimal digits")
                    continue
            elif not _TOKEN.fullmatch(token):
                problems.append(
                    f"{at}: must have 16 to 64 visible ASCII characters, this one has {len(token)}"
                )
                continue
            digest = token_digest(token)
            if digest in digests:
                problems.append(f"{at}: is the same as {digests[digest]}")
            elif digest in all_ids:
                problems.append(f"{at}: is the same as an instance id, and those stand in URLs")
            digests.setdefault(digest, at)
            if digest in documented:
                warnings.append(
                    f"{at}: is copied from a document, so everybody knows it: make your own"
                )
    if problems:
        raise ConfigurationError(problems)
    return tuple(warnings)


def check_service(journal_url: str | None, metrics_token: str | None) -> None:
    """Checks that what these keys need is installed; raises ConfigurationError."""
    if problems := [*_journal_problems(journal_url), *_metrics_problems(metrics_token)]:
        raise ConfigurationError(problems)


def _metrics_problems(token: str | None) -> Iterator[str]:
    if token and importlib.util.find_spec("prometheus_client") is None:
        yield "metrics_token: needs the package prometheus-client (pip install '.[metrics]')"


def _journal_problems(text: str | None) -> Iterator[str]:
    """Never with the URL or somebody else's words about it: it may hold a password."""
    if text is None:
        return
    import sqlalchemy  # costs the start time of a service that has no need of it here
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError

    try:
        url = sqlalchemy.make_url(text)
    except (ArgumentError, ValueError):
        yield "journal_url: is no SQLAlchemy URL"
        return
    try:
        dialect = url.get_dialect()
        dialect.import_dbapi()
    except NoSuchModuleError:
        yield "journal_url: SQLAlchemy does not know this kind of database"
    except ModuleNotFoundError as error:
        driver = error.name or url.get_driver_name()
        yield f"journal_url: its driver {driver} is not installed"
    except Exception:  # a driver without the C library it needs, say
        yield f"journal_url: its driver {url.get_driver_name()} cannot be imported"
    else:
        if dialect.is_async:
            yield "journal_url: needs a driver without asyncio"
        if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
            yield "journal_url: needs a database that outlives the process"


def _limit_problems(instance: InstanceSettings) -> Iterator[str]:
    if not 1 <= instance.deadline <= 30:
        yield "deadline: must be from 1 to 30 seconds"
    for name in ("hard_limit", "connect_timeout"):
        if not 0 < getattr(instance, name) <= 300:
            yield f"{name}: must be more than 0 and at most 300 seconds"
    if not 1 <= instance.queue_size <= 10_000:
        yield "queue_size: must be from 1 to 10000"
    if instance.isolation not in (None, "thread", "process"):
        yield "isolation: must be thread or process"
    if instance.python is not None:
        if instance.isolation == "thread":
            yield 'python: another interpreter needs isolation = "process"'
        if not os.access(instance.python, os.X_OK) or os.path.isdir(instance.python):
            yield f"python: there is no program {instance.python}"
    known = instance.broker.windows
    for name, window in instance.windows.items():
        if name not in known:
            listed = ", ".join(sorted(known)) or "none"
            yield f"windows.{name}: this broker has no such window (it has: {listed})"
        if window.limit < 1 or window.seconds <= 0 or window.gap < 0:
            yield f"windows.{name}: limit must be 1 or more, seconds above 0, gap not below 0"
        elif not 0 <= window.kept < window.limit:
            yield f"windows.{name}: kept must be from 0 to limit - 1"
        elif not 0 <= window.kept_for_orders < window.limit - window.kept:
            yield f"windows.{name}: kept_for_orders must be from 0 to limit - kept - 1"
    for name, age in instance.ages.items():
        if name not in READS:
            yield f"ages.{name}: no such operation (there are: {', '.join(READS)})"
        if not 0 <= age <= 3600:
            yield f"ages.{name}: must be from 0 to 3600 seconds"
    for currency, value in instance.max_order_value.items():
        if currency != EACH_CURRENCY and not re.fullmatch("[A-Z]{3}", currency):
            yield f"max_order_value.{currency}: a currency has three capital letters"
        if not (value.is_finite() and value > 0):
            yield f"max_order_value.{currency}: must be a number above 0"


def _quote_problems(instance: InstanceSettings, brokers: Mapping[str, BaseBroker]) -> Iterator[str]:
    """Of one that lives on another's quotes; it would answer "try again" for ever."""
    broker = instance.broker
    if broker.quotes_from is None:
        return
    if instance.where == "process":
        yield 'quotes_from: needs isolation = "thread"; a child process cannot ask for quotes'
    if broker.quotes_from not in brokers:
        yield "quotes_from: no instance has this id"
    source: str | None = broker.quotes_from
    for _ in brokers:
        if source == broker.instance_id:
            yield "quotes_from: leads back to this instance, so there is no quote at all"
            return
        asked = brokers.get(source or "")
        source = None if asked is None else asked.quotes_from


# --- the file ------------------------------------------------------------------------------------
class _Seconds(fields.Field[float]):
    """A TOML number, and nothing that merely looks like one."""

    default_error_messages = {"invalid": "must be a number"}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise self.make_error("invalid")
        if not math.isfinite(value):
            raise self.make_error("invalid")
        return float(value)


class _Whole(fields.Field[int]):
    default_error_messages = {"invalid": "must be a whole number"}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.make_error("invalid")
        return value


class _OrderValue(fields.Field[dict[str, Decimal]]):
    """A number for each currency, or a table of them."""

    default_error_messages = {"invalid": "must be a number, or a table of currency = number"}

    def _deserialize(
        self, value: Any, attr: str | None, data: Any, **kwargs: Any
    ) -> dict[str, Decimal]:
        table = value if isinstance(value, dict) else {EACH_CURRENCY: value}
        for number in table.values():
            if isinstance(number, bool) or not isinstance(number, int | Decimal):
                raise self.make_error("invalid")
        return {currency: Decimal(number) for currency, number in table.items()}


class _StrictSchema(Schema):
    """Types are those of TOML; an unknown key is a mistake."""

    class Meta:
        unknown = RAISE


class _WindowSchema(_StrictSchema):
    limit = _Whole(required=True)
    seconds = _Seconds(required=True)
    gap = _Seconds(load_default=0.0)
    kept = _Whole(load_default=0)
    kept_for_orders = _Whole(load_default=0)


class _InstanceSchema(_StrictSchema):
    broker = fields.String(required=True)
    id = fields.String(required=True)
    tokens = fields.List(fields.String(), required=True)
    args = fields.Dict(keys=fields.String(), load_default=dict)
    isolation = fields.String()
    python = fields.String()
    windows = fields.Dict(keys=fields.String(), values=fields.Nested(_WindowSchema))
    ages = fields.Dict(keys=fields.String(), values=_Seconds())
    deadline = _Seconds()
    hard_limit = _Seconds()
    connect_timeout = _Seconds()
    queue_size = _Whole()
    read_only = fields.Boolean(truthy={True}, falsy={False})
    max_order_value = _OrderValue()


def _check_host(text: str) -> None:
    if _HOST_NAME.fullmatch(text):
        return
    try:
        ipaddress.ip_address(text)
    except ValueError:
        raise ValidationError(
            "must be a host name or an IP address, without port or brackets"
        ) from None


class _ServiceSchema(_StrictSchema):
    data_dir = fields.String(validate=validate.Length(min=1, error="must name a directory"))
    token_header = fields.String(
        validate=validate.Regexp(
            r"[A-Za-z][A-Za-z0-9-]*\Z", error="must be a letter, then letters, digits and -"
        )
    )
    compat = fields.String(validate=validate.OneOf(("1.0",)))
    journal_url = fields.String()
    metrics_token = fields.String(validate=validate.Length(16, 64))
    host = fields.String(validate=_check_host)
    port = _Whole(validate=validate.Range(1, 65535, error="must be from 1 to 65535"))
    threads = _Whole(validate=validate.Range(2, 512, error="must be from 2 to 512"))


_SECRET_KEYS = ("id", "tokens", "journal_url", "metrics_token")
_BROKERS_OWN_FILES = frozenset({"token_file"})


class _Source:
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


def _load_file(path: Path, environ: Mapping[str, str], generated: bool = False) -> Settings:
    path = path.absolute()
    source = _Source(path, environ)
    tables = source.tables()
    listed = tables.pop("instance", None)
    overrides = _overrides(source, environ)
    own = {key: value for key, value in tables.items() if key not in overrides}
    service = _loaded(source, "", _ServiceSchema(), source.resolved("", own)) | overrides
    try:
        check_service(service.get("journal_url"), service.get("metrics_token"))
    except ConfigurationError as error:
        source.problems += (f"{path.name}: {problem}" for problem in error.problems)
    instances: list[InstanceSettings] = []
    places: list[str] = []
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        source.problem("instance", "at least one [[instance]] is needed")
        listed = []
    for number, table in enumerate(listed, start=1):
        place = f"instance {number}"
        if isinstance(table.get("id"), str) and "${" not in table["id"]:
            place += f" ({masked(table['id'])})"
        instances.append(_instance(source, place, table))
        places.append(f"{path.name}: {place}")
    if instances:
        try:
            source.warnings += check_instances(instances, places)
        except ConfigurationError as error:
            source.problems += error.problems
    if source.problems:
        raise ConfigurationError(source.problems)
    given = Path(service.pop("data_dir")) if "data_dir" in service else default_data_dir(environ)
    return Settings(
        instances=tuple(instances),
        data_dir=path.parent / given.expanduser(),
        generated=generated,
        warnings=tuple(source.warnings),
        **service,
    )


_VARIABLES = {
    "data_dir": "HTTPTRADING_DATA_DIR",
    "host": "HTTPTRADING_HOST",
    "port": "HTTPTRADING_PORT",
}


def _overrides(source: _Source, environ: Mapping[str, str]) -> dict[str, Any]:
    """What the environment says in place of the file; problems are told by the variable's name."""
    given: dict[str, Any] = {
        key: environ[name] for key, name in _VARIABLES.items() if environ.get(name)
    }
    if "data_dir" in given:
        given["data_dir"] = str(Path(given["data_dir"]).absolute())
    if re.fullmatch("[0-9]{1,9}", given.get("port", "")):  # else the schema says what is wrong
        given["port"] = int(given["port"])
    for key, texts in _ServiceSchema().validate(given).items():
        source.problem("", f"{_VARIABLES[key]}: {' '.join(texts)}")
    return given


def _loaded(
    source: _Source, place: str, schema: Schema, table: Mapping[str, Any]
) -> dict[str, Any]:
    """What is right in the table; what is wrong becomes a problem of the source."""
    try:
        loaded: dict[str, Any] = schema.load(table)
    except ValidationError as error:
        # A schema's messages and valid data are by field.
        assert isinstance(error.messages, dict) and isinstance(error.valid_data, dict)
        for key, text in _flat(error.messages):
            if f"{place}{key}" in source.failed:
                continue
            if text.startswith("Unknown field"):
                text = _unknown(key, schema)
            source.problem(f"{place}{key}", text)
        loaded = {
            key: value for key, value in error.valid_data.items() if key not in error.messages
        }
    return loaded


def _flat(messages: Any, place: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(messages, dict):
        for key, inner in messages.items():
            if key in ("value", "_schema"):  # marshmallow's own levels, not the file's
                step = place
            elif isinstance(key, int):
                step = f"{place}[{key}]"
            else:
                step = f"{place}.{key}" if place else str(key)
            yield from _flat(inner, step)
    else:
        for text in messages:
            yield place, str(text).rstrip(".")


def _unknown(key: str, schema: Schema) -> str:
    if isinstance(schema, _InstanceSchema) and key in _ServiceSchema().fields:
        return "belongs to the whole service: put it above the first [[instance]]"
    if isinstance(schema, _ServiceSchema) and key in _InstanceSchema().fields:
        return "belongs to an instance: put it below an [[instance]]"
    near = difflib.get_close_matches(key, schema.fields, n=1)
    return "there is no such key" + (f"; did you mean {near[0]}?" if near else "")


def _instance(source: _Source, place: str, table: Mapping[str, Any]) -> InstanceSettings:
    """One `[[instance]]`. Something stands in for what is wrong or missing, which has been told, so
    that everything else is checked all the same."""
    values = _loaded(source, f"{place}, ", _InstanceSchema(), source.resolved(f"{place}, ", table))
    windows = {name: Window(**figures) for name, figures in values.pop("windows", {}).items()}
    python = values.pop("python", None)
    if python is not None:
        found = None if os.sep in python else shutil.which(python)
        python = found or str(source.path.parent / Path(python).expanduser())
    instance_id = values.pop("id", secrets.token_hex(16))
    tokens = values.pop("tokens", [secrets.token_hex(16)])
    name, args = values.pop("broker", None), values.pop("args", None)
    kind = None if name is None else _broker_class(source, place, name)
    broker = None
    if kind is not None and args is not None and f"{place}, args." not in source.failed:
        broker = _broker(source, place, kind, args, instance_id, tokens)
    if broker is None:
        known = {"windows": windows if kind is None else kind.windows}
        broker = type("StandIn", (BaseBroker,), known)({}, instance_id, tokens)
    return InstanceSettings(broker=broker, windows=windows, python=python, **values)


def _broker_class(source: _Source, place: str, name: str) -> type[BaseBroker] | None:
    try:
        found = broker_class(name)
    except ValueError as error:
        source.problem(f"{place}, broker", str(error))
        return None
    except Exception as error:  # a custom module may fail in any way while it is imported
        source.problem(
            f"{place}, broker", f"importing {name} fails with {type(error).__name__}: {error}"
        )
        return None
    if not issubclass(found, BaseBroker):
        source.problem(f"{place}, broker", f"{name} is not a subclass of BaseBroker")
        return None
    return found


def _broker(
    source: _Source,
    place: str,
    kind: type[BaseBroker],
    args: dict[str, Any],
    instance_id: str,
    tokens: list[str],
) -> BaseBroker | None:
    try:
        return kind(args, instance_id=instance_id, tokens=tokens)
    except KeyError as error:
        source.problem(f"{place}, args", f"{error.args[0]} is missing")
    except Exception as error:
        # An adapter's own ValueError is a sentence; anything else may carry a value.
        text = str(error) if isinstance(error, ValueError) else type(error).__name__
        source.problem(f"{place}, args", source.safe(text))
    return None


# --- without configuration -----------------------------------------------------------------------
def _generated_file(data_dir: Path) -> Path:
    """The configuration of the one paper instance; written on the first start."""
    path = data_dir / GENERATED_FILE
    if path.exists():
        return path
    alphabet = string.ascii_letters + string.digits
    instance_id = "".join(secrets.choice(alphabet) for _ in range(20))
    token = "".join(secrets.choice(alphabet) for _ in range(40))
    text = (
        "# Made on the first start without a configuration; delete it to get a new id and token.\n"
        f'[[instance]]\nbroker = "Paper"\nid = "{instance_id}"\ntokens = ["{token}"]\n'
    )
    written = path.with_name(f".{GENERATED_FILE}.{secrets.token_hex(8)}")
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(written, path)  # never replaces the file of a start at the same moment
        except FileExistsError:
            pass
        finally:
            written.unlink()
    except OSError as error:
        raise ConfigurationError(
            [f"HTTPTRADING_DATA_DIR: {data_dir} cannot be written: {error.strerror}"]
        ) from None
    return path
