"""The configuration: one TOML file becomes plain data, and every mistake in it is named at once."""

from __future__ import annotations

import difflib
import ipaddress
import math
import os
import re
import secrets
import shutil
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import platformdirs
from marshmallow import RAISE, Schema, ValidationError, fields, validate

from httptrading.app.config_checks import (
    ConfigurationError,
    check_instances,
    check_service,
)
from httptrading.app.config_source import Source
from httptrading.brokers.base import BaseBroker, Window, masked
from httptrading.brokers.registry import broker_class
from httptrading.brokers.settings import EACH_CURRENCY, InstanceSettings

GENERATED_FILE = "paper-instance.toml"
"""Where, in the data directory, the instance of a service without configuration is kept."""

_HOST_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


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


def address(host: str, port: int) -> str:
    """As URLs and gunicorn's `bind` have it: an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


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


def _load_file(path: Path, environ: Mapping[str, str], generated: bool = False) -> Settings:
    path = path.absolute()
    source = Source(path, environ)
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


def _overrides(source: Source, environ: Mapping[str, str]) -> dict[str, Any]:
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


def _loaded(source: Source, place: str, schema: Schema, table: Mapping[str, Any]) -> dict[str, Any]:
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


def _instance(source: Source, place: str, table: Mapping[str, Any]) -> InstanceSettings:
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


def _broker_class(source: Source, place: str, name: str) -> type[BaseBroker] | None:
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
    source: Source,
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
