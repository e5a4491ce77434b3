"""What instances and the service must keep to, configured by a file or by Python code alike."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from httptrading.app.auth import TOKEN_DIGEST, token_digest
from httptrading.brokers.base import READS, BaseBroker, masked
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

_INSTANCE_ID = re.compile(r"[A-Za-z0-9_-]{16,32}")
_TOKEN = re.compile(r"[\x21-\x7e]{16,64}")


class ConfigurationError(ValueError):
    """Everything that is wrong with a configuration: `problems`, each sentence with its place."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__("\n".join((f"the configuration has {count}:", *problems)))


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
                if not TOKEN_DIGEST.fullmatch(token):
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
