"""All four brokers behind their simulators, and a service in front of them as a real process."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulators.exchange import Exchange, keep_port
from simulators.longport import LongPort
from simulators.opend import OpenD
from simulators.tiger_gateway import TigerGateway
from simulators.tws import Tws

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 120.0


@dataclass(frozen=True)
class Member:
    """One broker of the fleet: its simulator, and how an instance is configured for it."""

    name: str
    exchange: Exchange
    simulator: Any
    broker: str
    args: Mapping[str, Any]

    @property
    def instance_id(self) -> str:
        return f"{self.name:x<12}Fleet001"

    @property
    def token(self) -> str:
        return f"token-of-the-{self.name}-instance"


@contextmanager
def fleet(folder: Path) -> Iterator[dict[str, Member]]:
    """Four running simulators, each with an exchange of its own."""
    with ExitStack() as stack:
        members = []
        opend = stack.enter_context(OpenD(Exchange()))
        args: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": opend.port,
            "trade_env": "REAL",
            "unlock_pin": opend.pin_md5,
        }
        members.append(Member("futu", opend.exchange, opend, "Futu", args))

        tws = stack.enter_context(Tws(Exchange()))
        args = {
            "host": tws.host,
            "port": tws.port,
            "timeout": 8,
            "client_id": 7,
            "account_id": tws.accounts[0],
            "timezone": tws.timezone,
        }
        members.append(Member("ib", tws.exchange, tws, "InteractiveBrokers", args))

        longport = stack.enter_context(LongPort(Exchange()))
        token = folder / "longbridge-token.toml"
        token.write_text('token = "token-1"\nexpiry = 2099-01-01T00:00:00Z\n')
        token.chmod(0o600)
        args = {
            "app_key": longport.app_key,
            "app_secret": longport.app_secret,
            "token_file": str(token),
            "http_url": longport.http_url,
            "quote_ws_url": longport.quote_ws_url,
            "trade_ws_url": longport.trade_ws_url,
        }
        members.append(Member("longbridge", longport.exchange, longport, "LongBridge", args))

        tiger = stack.enter_context(TigerGateway(Exchange()))
        args = {
            "tiger_id": tiger.tiger_id,
            "account": tiger.accounts[0],
            "pk_path": str(tiger.write_key(folder)),
            "server_url": tiger.server_url,
            "push_host": "127.0.0.1",
            "push_port": tiger.push_port,
            "push_ssl": False,
            "tiger_public_key": tiger.public_key,
            "timeout": 5,
        }
        members.append(Member("tiger", tiger.exchange, tiger, "Tiger", args))
        yield {member.name: member for member in members}


def free_port() -> int:
    """Nobody else is given it as long as this process lives."""
    return keep_port(free_port)


def configuration(instances: list[Mapping[str, Any]], **service: Any) -> str:
    """A TOML file's text."""

    def toml(value: Any) -> str:
        if isinstance(value, Mapping):
            pairs = (f"{json.dumps(key)} = {toml(item)}" for key, item in value.items())
            return f"{{ {', '.join(pairs)} }}"
        return json.dumps(value)  # strings, numbers, booleans and lists are written alike

    def table(values: Mapping[str, Any]) -> str:
        return "".join(f"{key} = {toml(value)}\n" for key, value in values.items())

    return table(service) + "".join(f"\n[[instance]]\n{table(one)}" for one in instances)


def instances_of(members: Mapping[str, Member], **more: Any) -> list[Mapping[str, Any]]:
    return [
        {
            "broker": member.broker,
            "id": member.instance_id,
            "tokens": [member.token],
            "args": dict(member.args),
            **more,
        }
        for member in members.values()
    ]


class Service:
    """The service as a user runs it: gunicorn with the shipped settings, in a process group."""

    def __init__(self, folder: Path, instances: list[Mapping[str, Any]], **service: Any) -> None:
        self.folder = folder
        self.port = keep_port(self)  # also while it is down
        self.config = folder / "httptrading.toml"
        self.config.write_text(
            configuration(instances, port=self.port, data_dir=str(folder / "data"), **service)
        )
        self.config.chmod(0o600)
        self.log = folder / "service.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Starts it; seconds until it answered."""
        began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn"],
                cwd=ROOT,
                env={**os.environ, "HTTPTRADING_CONFIG": str(self.config)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while True:
            try:
                if self.ask("GET", "/httptrading/healthz", timeout=5)[0] == 200:
                    return time.monotonic() - began
            except (OSError, http.client.HTTPException):
                pass
            if self.process.poll() is not None or time.monotonic() > began + PATIENCE:
                raise AssertionError(f"the service did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.01)

    def stop(self, number: int = signal.SIGTERM) -> float:
        """Ends it; seconds that took."""
        if self.process is None:
            return 0.0
        began = time.monotonic()
        if number == signal.SIGKILL:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(PATIENCE)
        self.process = None
        return time.monotonic() - began

    def __enter__(self) -> Service:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def worker_pid(self) -> int:
        """The process that owns the brokers (gunicorn's one worker process)."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return int(children.split()[0])

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout: float = 40,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Status, JSON (or text) and headers, over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            return ask_over(connection, method, path, body, headers)
        finally:
            connection.close()


def ask_over(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Any, Mapping[str, str]]:
    """One request over a kept connection."""
    sent = dict(headers or {})
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        sent["Content-Type"] = "application/json"
    connection.request(method, path, body=data, headers=sent)
    response = connection.getresponse()
    text = response.read()
    kind = response.headers.get_content_type()
    return (
        response.status,
        json.loads(text) if kind == "application/json" else text.decode(),
        dict(response.headers),
    )


class Client:
    """A user of one instance, over one kept connection."""

    def __init__(self, service: Service, instance_id: str, token: str) -> None:
        self._service = service
        self._root = f"/httptrading/api/{instance_id}/"
        self._headers = {"HT-TOKEN": token}
        self._connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=45)

    def __call__(
        self,
        method: str,
        route: str,
        body: Any = None,
        **headers: str,
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Asks; a header is written with `_` for `-`. A closed connection is opened again."""
        sent = {**self._headers, **{key.replace("_", "-"): text for key, text in headers.items()}}
        try:
            return ask_over(self._connection, method, self._root + route, body, sent)
        except (OSError, http.client.HTTPException):
            self._connection.close()
            raise

    def close(self) -> None:
        self._connection.close()
