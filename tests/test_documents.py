"""The documents tell the truth: their requests are made, and their answers are those one gets.

Values that differ from run to run (times, prices, order ids) are compared by their JSON type, all
others exactly; keys and their order always.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

import httptrading
from httptrading import Paper, create_app
from httptrading.app.answers import HTTP_STATUS
from httptrading.app.config import load_settings
from httptrading.app.config_checks import DOCUMENTED
from httptrading.brokers.instance import offers
from httptrading.brokers.reads import AGES

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")
INSTANCE, TOKEN = "WyLqtMhDvAnBb6a3", "Vt5UCW2sLBvgPXjR"

VARYING = {
    "originStatus",
    "time",
    "timestamp",
    "orderId",
    "fillId",
    "requestId",
    "latest",
    "preClose",
    "highPrice",
    "lowPrice",
    "openPrice",
    "avgPrice",
    "created",
    "since",
    "price",
    "amount",
}

SAMPLE = re.compile(
    r"```shell\n(?P<command>curl (?:(?!```).)*?)\n```\n\n```json\n(?P<answer>.*?)\n```", re.DOTALL
)


@dataclass(frozen=True)
class Sample:
    """One curl command of a README and the answer printed below it."""

    command: str
    answer: Any

    def make(self, client: FlaskClient) -> TestResponse:
        words = shlex.split(
            self.command.replace("$TOKEN", f"HT-TOKEN: {TOKEN}").replace(
                "$API", f"/httptrading/api/{INSTANCE}"
            )
        )
        # A machine that stands still changes no answer.
        headers, url, body = [("HT-TIMEOUT", "30")], "", None
        options = iter(words[1:])
        for word in options:
            if word == "-H":
                name, _, value = next(options).partition(": ")
                headers.append((name, value))
            elif word == "-d":
                body = next(options)
            else:
                url = word
        method = "GET" if body is None else "POST"
        return client.open(url, method=method, headers=headers, data=body)


def text(document: str) -> str:
    return (ROOT / document).read_text("utf-8")


def samples(document: str) -> Iterator[Sample]:
    for found in SAMPLE.finditer(text(document)):
        yield Sample(found["command"], json.loads(found["answer"]))


def shape(value: Any, name: str = "") -> Any:
    """The value with everything that varies replaced by its type; keys keep their order."""
    if isinstance(value, dict):
        return [(key, shape(item, key)) for key, item in value.items()]
    if isinstance(value, list):
        return [shape(item) for item in value]
    if name in VARYING and value is not None:
        return "a number" if isinstance(value, int | float) else type(value).__name__
    return value


def order_ids(value: Any) -> list[str]:
    if isinstance(value, list):
        return [found for item in value for found in order_ids(item)]
    if not isinstance(value, dict):
        return []
    own = [value["orderId"]] if "orderId" in value else []
    return own + [found for item in value.values() for found in order_ids(item)]


@pytest.fixture
def client(tmp_path: Path) -> Iterator[FlaskClient]:
    paper = Paper(instance_id=INSTANCE, tokens=[TOKEN])
    app = create_app(brokers=[paper], data_dir=tmp_path)
    yield app.test_client()
    app.extensions["httptrading"].close()


def connected(client: FlaskClient) -> None:
    end = time.monotonic() + 60
    path = f"/httptrading/api/{INSTANCE}/ping/state"
    while not client.get(path, headers={"HT-TOKEN": TOKEN}).json["pong"]:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("document", READMES)
def test_every_sample_is_a_real_answer(document: str, client: FlaskClient) -> None:
    connected(client)
    made = list(samples(document))
    assert len(made) >= 14
    ids: dict[str, str] = {}  # the document's order id → ours
    for sample in made:
        given = sample.command
        for theirs, ours in ids.items():
            given = given.replace(theirs, ours)
        answer = json.loads(replace(sample, command=given).make(client).text)
        assert shape(answer) == shape(sample.answer), sample.command
        ids |= zip(order_ids(sample.answer), order_ids(answer), strict=True)


def test_both_readmes_show_the_same(client: FlaskClient) -> None:
    english, chinese = (list(samples(document)) for document in READMES)
    assert english == chinese
    assert re.findall(r"^#+", text(READMES[0]), re.M) == re.findall(r"^#+", text(READMES[1]), re.M)


@pytest.mark.parametrize("document", READMES)
@pytest.mark.parametrize(
    ("example", "begin"),
    [
        ("run_futu.py", ""),
        ("embed_in_existing_app.py", ""),
        ("custom_broker.py", "@broker_register('piggyBank'"),
    ],
)
def test_python_samples_are_the_examples(document: str, example: str, begin: str) -> None:
    source = (ROOT / "examples" / example).read_text("utf-8")
    assert f"```python\n{source[source.index(begin) :]}```" in text(document)


@pytest.mark.parametrize("document", READMES)
def test_configuration_samples_load(document: str, tmp_path: Path) -> None:
    """Those that are whole files; the interpreter sample needs an interpreter."""
    (sample,) = (
        block
        for block in re.findall(r"```toml\n(.*?)```", text(document), re.DOTALL)
        if "tokens" in block
    )
    (tmp_path / "tokens").write_text("one-token-of-futu-0001\n")
    written = tmp_path / "httptrading.toml"
    written.write_text(sample.replace("/run/secrets/futu-tokens", "tokens"))
    environ = {"FUTU_INSTANCE_ID": "kQ4xV8mT1zR6pW9c", "FUTU_UNLOCK_PIN": "0" * 32}
    settings = load_settings(written, environ)
    assert [type(one.broker).__name__ for one in settings.instances] == ["Paper", "Futu"]


def test_the_shipped_configuration_loads_as_it_is_and_with_every_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The journal's driver is the user's to install.
    monkeypatch.setitem(sys.modules, "psycopg", ModuleType("psycopg"))
    shipped = text("deploy/httptrading.toml")
    written = tmp_path / "httptrading.toml"
    environ = {"JOURNAL_PASSWORD": "x", "METRICS_TOKEN": "0123456789abcdef"}
    written.write_text(shipped)
    assert len(load_settings(written, environ).instances) == 1
    everything = re.sub(r"^# (\[?[a-z_.]+\]? *=|\[instance|[a-z]+ = )", r"\1", shipped, flags=re.M)
    everything = everything.replace("/opt/ib/.venv/bin/python", "/bin/sh")
    everything = everything.replace('isolation = "thread"', 'isolation = "process"')
    everything = everything[: everything.index("[instance.windows.place]")]  # Paper has none
    written.write_text(everything)
    settings = load_settings(written, environ)
    assert settings.compat == "1.0" and settings.metrics_token
    assert settings.instances[0].python == "/bin/sh"


@pytest.mark.parametrize("document", READMES)
def test_every_error_code_is_explained(document: str) -> None:
    told = dict.fromkeys(HTTP_STATUS, 0)
    for status, code in re.findall(r"^\| ([0-9]{3})\S* .*?\| `([A-Z_]+)` \|", text(document), re.M):
        assert code in HTTP_STATUS
        told[code] = told[code] or int(status)
    assert told == HTTP_STATUS


@pytest.mark.parametrize("document", READMES)
def test_the_ages_are_those_of_the_gateway(document: str) -> None:
    rows = re.findall(r"^\| ([a-z_]+) \| ([0-9.]+) \| (.*)\|$", text(document), re.M)
    assert {name: float(seconds) for name, seconds, _ in rows} == AGES
    told = {
        (broker, name): float(seconds)
        for name, _, others in rows
        for broker, seconds in re.findall(r"([A-Za-z]+) ([0-9.]+)", others)
    }
    own = {
        (broker, name): seconds
        for broker in (*BROKERS, "Moomoo")
        for name, seconds in getattr(httptrading, broker).ages.items()
        if seconds != AGES[name]
    }
    assert told == own


def test_the_extra_all_has_every_extra_that_users_install() -> None:
    extras = tomllib.loads(text("pyproject.toml"))["project"]["optional-dependencies"]
    (everything,) = extras.pop("all")
    assert everything == f"httptrading[{','.join(name for name in extras if name != 'dev')}]"
    for document in READMES:
        assert all(f"`{name}`" in text(document) for name in extras if name != "dev")


REGIONS = ("US", "HK", "CN")
BROKERS = {
    "InteractiveBrokers": {"host": "127.0.0.1", "port": 1, "client_id": 1, "account_id": "U1"},
    "Futu": {"host": "127.0.0.1", "port": 1, "trade_env": "REAL"},
    "LongBridge": {"app_key": "a", "app_secret": "b", "token_file": "token.json"},
    "Tiger": {"tiger_id": "1", "account": "1", "pk_path": "key.pem"},
    "Paper": {},
}


@pytest.mark.parametrize("document", READMES)
def test_the_table_of_brokers_is_what_they_declare(document: str) -> None:
    table = re.search(r"(?:^\| .* \|\n)+(?=\n`instance/state`)", text(document), re.M)
    assert table
    told = {}
    for row, name in zip(table[0].splitlines()[2:], BROKERS, strict=True):
        told[name] = [cell.strip() for cell in row.strip("|").split("|")][1:]
    declared = {}
    for name, arguments in BROKERS.items():
        broker = getattr(httptrading, name)(arguments)
        kind = type(broker)
        traded = {each.region for each in broker.combinations}
        quoted = REGIONS if broker.quote_regions is None else broker.quote_regions
        declared[name] = [
            "✅" if offers(kind, "ping") else "❌",
            "✅" if all(offers(kind, each) for each in ("cash", "positions", "order")) else "❌",
            " ".join(region for region in REGIONS if region in traded),
            " ".join(region for region in REGIONS if region in quoted),
            "✅" if offers(kind, "market_status") else "❌",
        ]
    assert told == declared


@pytest.mark.parametrize(
    "document", [*READMES, "CHANGELOG.md", "docs/writing-a-broker.md", "deploy/nginx.conf"]
)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#][^)]*)\)", text(document)):
        if not target.startswith("http"):
            path = (ROOT / document).parent / target.partition("#")[0]
            assert path.exists(), target


def test_ids_and_tokens_of_every_document_are_warned_about() -> None:
    documents = [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/*"),
        *ROOT.glob("deploy/*.toml"),
    ]
    printed: set[str] = set()
    for path in documents:
        found = re.findall(
            r"""(?:\bid|tokens|instance_id)['"]?\s*[=:]\s*\[?\s*['"]([^'"]+)['"]""",
            path.read_text("utf-8"),
        )
        printed |= {each for each in found if "$" not in each and "sha256:" not in each}
    assert printed and printed <= DOCUMENTED
