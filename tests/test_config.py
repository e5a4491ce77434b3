"""The configuration: what it accepts, and that every mistake is named with its place."""

from __future__ import annotations

import hashlib
import stat
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite

from httptrading import create_blueprint
from httptrading.app.auth import token_digest
from httptrading.app.config import Settings, address, default_data_dir, load_settings
from httptrading.app.config_checks import ConfigurationError, check_instances
from httptrading.brokers.base import BaseBroker, Window
from httptrading.brokers.paper import Paper
from httptrading.brokers.settings import InstanceSettings

ID = "kQ4xV8mT1zR6pW9c"
TOKEN = "b7Jd-2Ls9Qa0Xe5Ru8Yt"
SECRET = "s3cr3t-value-of-nobody"


class ConfiguredBroker(BaseBroker):
    """A custom broker that is strict about its arguments, as adapters are."""

    windows = {"place": Window(15, 30, gap=0.02)}

    def __init__(self, broker_args: Any = None, **kwargs: Any) -> None:
        super().__init__(broker_args, **kwargs)
        if "app_key" in self.broker_args and self.broker_args["app_key"] == "":
            raise ValueError("app_key must not be empty")
        if self.broker_args.get("refuse"):
            raise ValueError(f"app_key {self.broker_args['app_key']} is no key")
        if self.broker_args.get("needs"):
            self.broker_args[self.broker_args["needs"]]


class NotABroker:
    pass


class Config:
    """A configuration file under test: `write`, then `load` or `problems`."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "httptrading.toml"
        self.environ = {"HTTPTRADING_DATA_DIR": str(directory / "data")}

    def write(self, text: str) -> Config:
        self.path.write_text(text, "utf-8")
        self.path.chmod(0o600)
        return self

    def instance(self, more: str = "", top: str = "") -> Config:
        return self.write(
            f'{top}\n[[instance]]\nbroker = "{__name__}:ConfiguredBroker"\n'
            f'id = "{ID}"\ntokens = ["{TOKEN}"]\n{more}\n'
        )

    def load(self) -> Settings:
        return load_settings(self.path, self.environ)

    def problems(self) -> list[str]:
        with pytest.raises(ConfigurationError) as raised:
            self.load()
        text = str(raised.value)
        for secret in (SECRET, ID, TOKEN):
            assert secret not in text
        return list(raised.value.problems)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(tmp_path)


def test_a_small_file_has_the_documented_defaults(config: Config) -> None:
    settings = config.instance().load()
    (instance,) = settings.instances
    assert instance.broker.instance_id == ID
    assert instance.broker.tokens == [TOKEN]
    assert (instance.deadline, instance.hard_limit, instance.connect_timeout) == (10.0, 5.0, 15.0)
    assert (instance.queue_size, instance.read_only, instance.max_order_value) == (64, False, {})
    assert instance.where == "thread"
    assert settings.data_dir == Path(config.environ["HTTPTRADING_DATA_DIR"])
    assert (settings.host, settings.port, settings.token_header) == ("127.0.0.1", 8080, "HT-TOKEN")
    assert settings.compat is None and settings.metrics_token is None
    assert settings.warnings == () and settings.generated is False


def test_every_key_arrives(config: Config) -> None:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    config.write(f"""
data_dir = "state"
token_header = "X-Token"
compat = "1.0"
journal_url = "sqlite:///elsewhere.db"
metrics_token = "0123456789abcdef"
host = "0.0.0.0"
port = 9000
threads = 8
[[instance]]
broker = "{__name__}:ConfiguredBroker"
id = "{ID}"
tokens = ["sha256:{digest}"]
isolation = "process"
deadline = 5
hard_limit = 2.5
connect_timeout = 20
queue_size = 8
read_only = true
max_order_value = {{ USD = 1000, HKD = 7800.5 }}
[instance.args]
host = "127.0.0.1"
port = 11111
timeout = 8.5
[instance.windows.place]
limit = 10
seconds = 30
kept = 2
kept_for_orders = 3
[instance.ages]
cash = 0
""")
    del config.environ["HTTPTRADING_DATA_DIR"]
    settings = config.load()
    (instance,) = settings.instances
    assert settings.data_dir == config.path.parent / "state"
    for secret in ("elsewhere.db", "0123456789abcdef", ID, TOKEN, digest):
        assert secret not in repr(settings)
    assert (settings.token_header, settings.compat) == ("X-Token", "1.0")
    assert settings.journal_url == "sqlite:///elsewhere.db"
    assert settings.metrics_token == "0123456789abcdef"
    assert (settings.host, settings.port, settings.threads) == ("0.0.0.0", 9000, 8)
    assert token_digest(instance.broker.tokens[0]) == token_digest(TOKEN)
    assert instance.broker.broker_args == {"host": "127.0.0.1", "port": 11111, "timeout": 8.5}
    assert isinstance(instance.broker.broker_args["timeout"], float)
    assert instance.where == "process"
    assert (instance.deadline, instance.hard_limit, instance.connect_timeout) == (5.0, 2.5, 20.0)
    assert (instance.queue_size, instance.read_only) == (8, True)
    assert instance.largest_order("HKD") == Decimal("7800.5")
    assert instance.largest_order("CNY") is None
    assert instance.windows == {"place": Window(10, 30.0, kept=2, kept_for_orders=3)}
    assert instance.ages == {"cash": 0.0}


def test_one_number_limits_orders_in_each_currency(config: Config) -> None:
    (instance,) = config.instance("max_order_value = 5000").load().instances
    assert instance.largest_order("USD") == instance.largest_order("HKD") == Decimal(5000)


def test_the_environment_wins_over_the_file(config: Config) -> None:
    config.environ |= {"HTTPTRADING_HOST": "127.0.0.2", "HTTPTRADING_PORT": "1234"}
    settings = config.instance(top='host = "0.0.0.0"\nport = 1').load()
    assert (settings.host, settings.port) == ("127.0.0.2", 1234)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("PORT", "0", "must be from 1 to 65535"),
        ("PORT", "65536", "must be from 1 to 65535"),
        ("PORT", "http", "must be a whole number"),
        ("PORT", "８０８０", "must be a whole number"),
        (
            "HOST",
            "127.0.0.1:8080",
            "must be a host name or an IP address, without port or brackets",
        ),
        ("HOST", "[::1]", "must be a host name or an IP address, without port or brackets"),
        (
            "HOST",
            "unix:/run/http.sock",
            "must be a host name or an IP address, without port or brackets",
        ),
    ],
)
def test_a_wrong_variable_is_named_and_not_the_file(
    config: Config, name: str, value: str, expected: str
) -> None:
    config.environ[f"HTTPTRADING_{name}"] = value
    assert config.instance().problems() == [f"HTTPTRADING_{name}: {expected}"]


@pytest.mark.parametrize("host", ["::1", "::", "fe80::1%eth0", "0.0.0.0", "localhost", "a-b.c"])
def test_hosts(config: Config, host: str) -> None:
    config.environ["HTTPTRADING_HOST"] = host
    assert config.instance().load().host == host


def test_an_ipv6_address_stands_in_brackets_before_its_port() -> None:
    assert (address("::1", 80), address("10.0.0.1", 80)) == ("[::1]:80", "10.0.0.1:80")


def test_the_file_may_be_named_by_the_environment(config: Config) -> None:
    config.instance()
    settings = load_settings(None, config.environ | {"HTTPTRADING_CONFIG": str(config.path)})
    assert settings.instances[0].broker.instance_id == ID


def test_without_the_environment_data_go_to_the_user_data_directory() -> None:
    assert default_data_dir({}).name == "httptrading"


# --- secrets ---------------------------------------------------------------------------------
def test_secrets_come_from_the_environment(config: Config) -> None:
    config.environ |= {"HT_TOKEN": TOKEN, "HT_ID": ID, "APP_KEY": SECRET, "JOURNAL_DIR": "j"}
    settings = config.write(f"""
journal_url = "sqlite:///${{JOURNAL_DIR}}/journal.db"
[[instance]]
broker = "{__name__}:ConfiguredBroker"
id = "${{HT_ID}}"
tokens = ["${{HT_TOKEN}}"]
args = {{ app_key = "${{APP_KEY}}", plain = "$${{APP_KEY}}", nested = ["${{APP_KEY}}"] }}
""").load()
    (instance,) = settings.instances
    assert settings.journal_url == "sqlite:///j/journal.db"
    assert (instance.broker.instance_id, instance.broker.tokens) == (ID, [TOKEN])
    assert instance.broker.broker_args == {
        "app_key": SECRET,
        "plain": "${APP_KEY}",
        "nested": [SECRET],
    }


def test_secrets_come_from_files(config: Config, tmp_path: Path) -> None:
    for name, text in {
        "id": ID,
        "tokens": f"{TOKEN}\n\nanother-token-123456\n",
        "secret": SECRET + "\n",
        "metrics": "0123456789abcdef\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o600)
    settings = config.write(f"""
metrics_token_file = "{tmp_path}/metrics"
[[instance]]
broker = "{__name__}:ConfiguredBroker"
id_file = "id"
tokens_file = "tokens"
args = {{ app_secret_file = "secret", token_file = "/var/lib/longbridge/token.json" }}
""").load()
    (instance,) = settings.instances
    assert settings.metrics_token == "0123456789abcdef"
    assert instance.broker.instance_id == ID
    assert instance.broker.tokens == [TOKEN, "another-token-123456"]
    assert instance.broker.broker_args == {
        "app_secret": SECRET,
        "token_file": "/var/lib/longbridge/token.json",
    }
    assert settings.warnings == ()


def test_files_may_come_from_an_editor_of_windows(config: Config, tmp_path: Path) -> None:
    for name, text in {"id": ID, "tokens": TOKEN, "secret": SECRET}.items():
        (tmp_path / name).write_text(f"{text}\r\n", "utf-8-sig")
    text = f"""[[instance]]\r
broker = "{__name__}:ConfiguredBroker"\r
id_file = "id"\r
tokens_file = "tokens"\r
args = {{ app_secret_file = "secret" }}\r
"""
    config.path.write_text(text, "utf-8-sig")
    broker = config.load().instances[0].broker
    assert (broker.instance_id, broker.tokens) == (ID, [TOKEN])
    assert broker.broker_args == {"app_secret": SECRET}


def test_a_readable_file_is_warned_about(config: Config) -> None:
    config.instance().path.chmod(0o644)
    (warning,) = config.load().warnings
    assert "httptrading.toml can be read by every user" in warning


# --- mistakes --------------------------------------------------------------------------------
def test_an_empty_data_directory_is_not_the_folder_of_the_file(config: Config) -> None:
    config.environ = {"DATA": ""}
    (problem,) = config.instance(top='data_dir = "${DATA}"').problems()
    assert problem == "httptrading.toml: data_dir: must name a directory"


@pytest.mark.parametrize(
    ("more", "top", "expected"),
    [
        ("dedline = 5", "", "instance 1 (kQ4x…), dedline: there is no such key; did you mean"),
        ("port = 1", "", "port: belongs to the whole service: put it above the first [[instance]]"),
        ("", "deadline = 5", "deadline: belongs to an instance: put it below an [[instance]]"),
        ("deadline = 31", "", "instance 1 (kQ4x…), deadline: must be from 1 to 30 seconds"),
        ("deadline = nan", "", "deadline: must be a number"),
        ("deadline = true", "", "deadline: must be a number"),
        ('deadline = "5"', "", "deadline: must be a number"),
        ("queue_size = 0", "", "queue_size: must be from 1 to 10000"),
        ("queue_size = 1.5", "", "queue_size: must be a whole number"),
        ("hard_limit = 0", "", "hard_limit: must be more than 0"),
        ("connect_timeout = -1", "", "connect_timeout: must be more than 0"),
        ('read_only = "yes"', "", "read_only: Not a valid boolean"),
        ('isolation = "fork"', "", "isolation: must be thread or process"),
        ('python = "/nowhere/python"', "", "python: there is no program /nowhere/python"),
        ("max_order_value = -5", "", "max_order_value.*: must be a number above 0"),
        ("max_order_value = { usd = 5 }", "", "max_order_value.usd: a currency has three capital"),
        ('max_order_value = "5"', "", "max_order_value: must be a number, or a table"),
        ("windows.plaice = { limit = 1, seconds = 1 }", "", "windows.plaice: this broker has no"),
        ("windows.place = { limit = 1 }", "", "windows.place.seconds: Missing data"),
        ("windows.place = { limit = 0, seconds = 1 }", "", "windows.place: limit must be 1 or"),
        ("windows.place = { limit = 1, seconds = 1, kept = 1 }", "", "windows.place: kept must be"),
        (
            "windows.place = { limit = 3, seconds = 1, kept = 1, kept_for_orders = 2 }",
            "",
            "windows.place: kept_for_orders must be from 0 to limit - kept - 1",
        ),
        ("ages = { place_order = 1 }", "", "ages.place_order: no such operation"),
        ("ages = { cash = -1 }", "", "ages.cash: must be from 0 to 3600 seconds"),
        ('args = "x"', "", "args: Not a valid mapping type"),
        ('args = { needs = "pk_path" }', "", "instance 1 (kQ4x…), args: pk_path is missing"),
        ('args = { a = "${NOT_SET}" }', "", "args.a: the environment variable NOT_SET is not set"),
        ('args = { app_key_file = "gone" }', "", "args.app_key_file: "),
        ('args = { pin_file = "${PIN}" }', "", "args.pin_file: ${PIN} cannot be read: No such"),
        ('args = { pin_file = "${NOT_SET}" }', "", "args.pin_file: the environment variable NOT_"),
        ('python = "a\\u0000b"', "", "instance 1 (kQ4x…), python: has a NUL character"),
        ('args = { a = 1, a_file = "b" }', "", "args.a_file: a and a_file can't both be there"),
        ('tokens_file = "b"', "", "tokens_file: tokens and tokens_file can't both be there"),
        ("", "port = 70000", "httptrading.toml: port: must be from 1 to 65535"),
        ("", "port = 0", "httptrading.toml: port: must be from 1 to 65535"),
        ("", "threads = 1", "httptrading.toml: threads: must be from 2 to 512"),
        ("", 'host = ""', "host: must be a host name or an IP address, without port or brackets"),
        ("", 'compat = "2.0"', "compat: Must be one of: 1.0"),
        ("", 'token_header = "a b"', "token_header: must be a letter, then"),
        ("", 'metrics_token = "short"', "metrics_token: Length must be between 16 and 64"),
        ("", 'journal_url_file = "gone"', "journal_url_file: "),
        ("", 'journal_url_file = "a\\u0000b"', "toml: journal_url_file: has a NUL character"),
    ],
)
def test_one_mistake_is_one_sentence(config: Config, more: str, top: str, expected: str) -> None:
    config.environ["PIN"] = SECRET  # which somebody takes for the name of a file
    (problem,) = config.instance(more, top).problems()
    assert problem.startswith("httptrading.toml: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Futuu", "did you mean 'Futu'"),
        ("no_such_module:Broker", "cannot be imported"),
        (f"{__name__}:NotABroker", "is not a subclass of BaseBroker"),
    ],
)
def test_a_wrong_broker_is_named(config: Config, name: str, expected: str) -> None:
    config.write(f'[[instance]]\nbroker = "{name}"\nid = "{ID}"\ntokens = ["{TOKEN}"]\n')
    (problem,) = config.problems()
    assert problem.startswith("httptrading.toml: instance 1 (kQ4x…), broker: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("instance_id", "tokens", "expected"),
    [
        ("short", [TOKEN], "id: must have 16 to 32 characters"),
        ("x" * 33, [TOKEN], "id: must have 16 to 32 characters"),
        ("with/slash/in/it/x", [TOKEN], "id: must have 16 to 32 characters"),
        (ID, [], "tokens: at least one is needed"),
        (ID, ["short"], "tokens[0]: must have 16 to 64 visible ASCII characters"),
        (ID, ["x" * 65], "tokens[0]: must have 16 to 64"),
        (ID, [TOKEN, "two words are no token"], "tokens[1]: must have 16 to 64"),
        (ID, ["sha256:abc"], "tokens[0]: sha256: must be followed by 64 hexadecimal digits"),
        (ID, [TOKEN, TOKEN], "tokens[1]: is the same as brokers[0]"),
        (ID, [ID], "tokens[0]: is the same as an instance id"),
    ],
)
def test_brokers_made_in_python_are_checked_alike(
    instance_id: str, tokens: list[str], expected: str
) -> None:
    broker = ConfiguredBroker({}, instance_id=instance_id, tokens=tokens)
    with pytest.raises(ConfigurationError, match="1 mistake") as raised:
        check_instances([InstanceSettings(broker)])
    assert raised.value.problems[0].startswith("brokers[0] (ConfiguredBroker ")
    assert expected in raised.value.problems[0]
    for secret in (ID, *tokens):
        assert secret not in str(raised.value)


def paper(instance_id: str, quotes_from: str, **settings: Any) -> InstanceSettings:
    broker = Paper({"quotes_from": quotes_from}, instance_id, [f"token-of-{instance_id}"])
    return InstanceSettings(broker, **settings)


@pytest.mark.parametrize(
    ("instances", "expected"),
    [
        ([paper("paperPaper000001", ID)], "quotes_from: no instance has this id"),
        (
            [paper("paperPaper000001", "paperPaper000002", isolation="process")],
            'quotes_from: needs isolation = "thread"',
        ),
        (
            [paper("paperPaper000001", "paperPaper000002", python=sys.executable)],
            'quotes_from: needs isolation = "thread"',
        ),
        ([paper("paperPaper000001", "paperPaper000003")], "quotes_from: leads back to this"),
    ],
)
def test_quotes_that_can_never_come_are_refused(
    instances: list[InstanceSettings], expected: str
) -> None:
    others = [
        InstanceSettings(Paper({}, "paperPaper000002", ["token-of-nobody-02"])),
        paper("paperPaper000003", "paperPaper000001"),
    ]
    with pytest.raises(ConfigurationError) as raised:
        check_instances([*instances, *others])
    assert raised.value.problems[0].startswith("brokers[0] (Paper pape…), ")
    assert expected in raised.value.problems[0]


def test_quotes_may_come_from_one_that_borrows_them_itself() -> None:
    first = InstanceSettings(Paper({}, "paperPaper000001", ["token-of-nobody-01"]))
    second = paper("paperPaper000002", "paperPaper000001")
    assert check_instances([paper("paperPaper000003", "paperPaper000002"), second, first]) == ()


def test_shared_ids_and_tokens_are_refused(config: Config) -> None:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    config.write(
        f'[[instance]]\nbroker = "{__name__}:ConfiguredBroker"\nid = "{ID}"\ntokens = ["{TOKEN}"]\n'
        f'[[instance]]\nbroker = "{__name__}:ConfiguredBroker"\nid = "{ID}"\n'
        f'tokens = ["sha256:{digest}"]\n'
    )
    first, second = config.problems()
    assert first.endswith("id: is the same as that of httptrading.toml: instance 1 (kQ4x…)")
    assert second.endswith("is the same as httptrading.toml: instance 1 (kQ4x…), tokens[0]")


POSTGRES = f"postgresql+psycopg://me:{SECRET}@db/journal"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("metrics_token", SECRET, "metrics_token: needs the package prometheus-client (pip "),
        ("journal_url", POSTGRES, "journal_url: its driver psycopg is not installed"),
        ("journal_url", SECRET, "journal_url: is no SQLAlchemy URL"),
        ("journal_url", f"postgresql://me@db:{SECRET}/x", "journal_url: is no SQLAlchemy URL"),
        ("journal_url", f"postgre://{SECRET}@db", "journal_url: SQLAlchemy does not know this"),
        ("journal_url", "sqlite://", "journal_url: needs a database that outlives the process"),
    ],
)
def test_what_a_key_needs_is_looked_for_before_the_start(
    config: Config, monkeypatch: pytest.MonkeyPatch, key: str, value: str, expected: str
) -> None:
    for module in ("prometheus_client", "psycopg"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    (problem,) = config.instance(top=f'{key} = "{value}"').problems()
    assert problem.startswith(f"httptrading.toml: {expected}")
    broker = ConfiguredBroker({}, instance_id=ID, tokens=[TOKEN])
    with pytest.raises(ConfigurationError) as raised:
        create_blueprint([broker], **{key: value})
    assert raised.value.problems[0].startswith(expected)
    assert SECRET not in str(raised.value)


def test_a_driver_that_is_half_installed_is_named(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config.path.parent / "psycopg.py").write_text("raise ImportError('no pq wrapper')")
    monkeypatch.syspath_prepend(config.path.parent)
    monkeypatch.delitem(sys.modules, "psycopg", raising=False)
    (problem,) = config.instance(top=f'journal_url = "{POSTGRES}"').problems()
    assert problem.endswith("journal_url: its driver psycopg cannot be imported")


def test_a_driver_of_asyncio_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SQLiteDialect_aiosqlite, "import_dbapi", lambda: None)
    (problem,) = config.instance(top='journal_url = "sqlite+aiosqlite:///x.db"').problems()
    assert problem.endswith("journal_url: needs a driver without asyncio")


def test_all_mistakes_come_at_once(config: Config) -> None:
    config.environ["APP_KEY"] = SECRET
    config.write(f"""
prot = 80
metrics_token = "${{NOT_SET}}"
[[instance]]
broker = "Futuu"
id = "short"
tokens = ["${{MISSING}}"]
[[instance]]
broker = "{__name__}:ConfiguredBroker"
id = "{ID}"
tokens = ["tooshort"]
deadline = 99
args = {{ app_key = "${{APP_KEY}}", refuse = true }}
[[instance]]
broker = "{__name__}:ConfiguredBroker"
id = "{ID}"
tokens = ["{TOKEN}"]
colour = "red"
deadline = 99
""")
    problems = config.problems()
    for expected in (
        "httptrading.toml: metrics_token: the environment variable NOT_SET is not set",
        "httptrading.toml: prot: there is no such key; did you mean port?",
        "instance 1 (…), tokens[0]: the environment variable MISSING is not set",
        "instance 2 (kQ4x…), args: app_key … is no key",
        "instance 2 (kQ4x…), tokens[0]: must have 16 to 64 visible ASCII characters",
        "instance 3 (kQ4x…), id: is the same as that of httptrading.toml: instance 2 (kQ4x…)",
        "instance 3 (kQ4x…), colour: there is no such key",
        "instance 3 (kQ4x…), deadline: must be from 1 to 30 seconds",
    ):
        assert any(expected in problem for problem in problems), (expected, problems)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ('args = { refuse = true, app_key = "x" }', "args: app_key x is no key"),
        ('args = { app_key = "${NOT_SET}" }', "args.app_key: the environment variable NOT_SET is"),
        ('args = "x"', "args: Not a valid mapping type"),
        ('broker = "Futuu"', "broker: unknown broker 'Futuu'"),
        ("broker = 5", "broker: Not a valid string"),
        ("tokens = 5", "tokens: Not a valid list"),
        ('tokens = ["${NOT_SET}"]', "tokens[0]: the environment variable NOT_SET is not set"),
        ("id = 5", "id: Not a valid string"),
        ('read_only = "yes"', "read_only: Not a valid boolean"),
    ],
)
def test_one_mistake_hides_no_other_of_its_instance(
    config: Config, wrong: str, problem: str
) -> None:
    lines = {
        "broker": f'broker = "{__name__}:ConfiguredBroker"',
        "id": f'id = "{ID}"',
        "tokens": f'tokens = ["{TOKEN}"]',
        "deadline": "deadline = 99",
        "windows": "windows = { place = { limit = 0, seconds = 1 } }",
        "ages": "ages = { chash = 1 }",
    }
    lines[wrong.partition(" ")[0]] = wrong
    config.write("\n".join(["[[instance]]", *lines.values()]))
    problems = config.problems()
    for expected in (
        problem,
        "deadline: must be from 1 to 30 seconds",
        "windows.place: limit must be 1 or more",
        "ages.chash: no such operation",
    ):
        assert sum(expected in each for each in problems) == 1, (expected, problems)
    assert len(problems) == 4, problems


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "httptrading.toml: instance: at least one [[instance]] is needed"),
        ("instance = 5", "httptrading.toml: instance: at least one [[instance]] is needed"),
        ("port = \n", "httptrading.toml: not valid TOML: Invalid value (at line 1"),
    ],
)
def test_a_file_without_instances_is_refused(config: Config, text: str, expected: str) -> None:
    (problem,) = config.write(text).problems()
    assert problem.startswith(expected)


def test_a_missing_file_is_named(config: Config) -> None:
    (problem,) = config.problems()
    assert "httptrading.toml: cannot be read: No such file or directory" in problem


def test_what_is_copied_from_a_document_works_with_a_warning(config: Config) -> None:
    config.write(
        f'[[instance]]\nbroker = "{__name__}:ConfiguredBroker"\nid = "WyLqtMhDvAnBb6a3"\n'
        'tokens = ["Vt5UCW2sLBvgPXjR"]\n'
    )
    of_id, of_token = config.load().warnings
    assert "instance 1 (WyLq…), id: is copied from a document" in of_id
    assert "tokens[0]: is copied from a document" in of_token


# --- without a configuration -----------------------------------------------------------------
def test_the_first_start_makes_a_paper_instance_and_later_ones_keep_it(tmp_path: Path) -> None:
    environ = {"HTTPTRADING_DATA_DIR": str(tmp_path / "data")}
    first = load_settings(None, environ)
    again = load_settings(None, environ)
    (paper,), (kept,) = first.instances, again.instances
    assert first.generated and first.warnings == ()
    assert type(paper.broker).__name__ == "Paper"
    assert paper.broker.instance_id == kept.broker.instance_id
    assert paper.broker.tokens == kept.broker.tokens
    assert len(paper.broker.instance_id) == 20 and len(paper.broker.tokens[0]) == 40
    (file,) = first.data_dir.glob("*.toml")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in first.data_dir.iterdir()] == [file.name]


def test_an_unwritable_data_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="HTTPTRADING_DATA_DIR: .* cannot be written"):
        load_settings(None, {"HTTPTRADING_DATA_DIR": str(tmp_path / "file" / "data")})
