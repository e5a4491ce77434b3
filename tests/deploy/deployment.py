"""The service and nginx as real processes, with the shipped sample between them."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from simulators.exchange import keep_port

ROOT = Path(__file__).parents[2]
PAPER = "kQ4xV8mT1zR6pW9c"
SLOW = "slowInstance00001"
TOKEN = "b7Jd-2Ls9Qa0Xe5Ru8Yt"
METRICS_TOKEN = "metrics-token-0123456789"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Site:
    """nginx as a client sees it."""

    def __init__(self, port: int, directory: Path) -> None:
        self.port = port
        self.directory = directory

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        timeout: float = 60,
        **headers: str,
    ) -> Answer:
        context = ssl.create_default_context(cafile=str(self.directory / "fullchain.pem"))
        connection = http.client.HTTPSConnection(
            "localhost", self.port, timeout=timeout, context=context
        )
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            sent["Content-Type"] = "application/json"
        with contextlib.closing(connection):
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def api(self, method: str, route: str, body: Any = None, **headers: str) -> Answer:
        headers.setdefault("HT_TOKEN", TOKEN)
        headers.setdefault("HT_TIMEOUT", "30")
        text = None if body is None else json.dumps(body)
        return self.ask(method, f"/httptrading/api/{PAPER}/{route}", text, **headers)

    def log(self) -> str:
        return (self.directory / "httptrading.log").read_text()


def free_port() -> int:
    """Nobody else is given it as long as these tests run."""
    return keep_port(free_port)


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come up"
        time.sleep(0.05)


def accepts(address: str | tuple[str, int]) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as client:
        return client.connect_ex(address) == 0


def certificate(directory: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=2))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    (directory / "fullchain.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (directory / "privkey.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def nginx_files(directory: Path, port: int, upstream: str) -> Path:
    """The shipped sample with this machine's ports and paths, and a frame around it."""
    sample = (ROOT / "deploy" / "nginx.conf").read_text()
    replaced, left = sample, re.sub(r"#.*", "", sample)
    for old, new in {
        "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
        "    listen [::]:443 ssl;\n": "",
        "api.example.com;": "localhost;",
        "/etc/letsencrypt/live/api.example.com": str(directory),
        "/var/log/nginx": str(directory),
        "server 127.0.0.1:8080;": f"server {upstream};",
    }.items():
        assert old in replaced, f"deploy/nginx.conf has no {old!r} any more"
        replaced, left = replaced.replace(old, new), left.replace(old, "")
    # What was put in is not searched: a free port may well contain 443.
    assert not re.search(r"443|/etc/|/var/", left)
    (directory / "httptrading.conf").write_text(replaced)
    certificate(directory)
    temporary = "".join(
        f"    {kind}_temp_path {directory}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    frame = directory / "nginx.conf"
    frame.write_text(
        ("user root;\n" if os.geteuid() == 0 else "")
        + f"daemon off;\nworker_processes 1;\npid {directory}/nginx.pid;\n"
        f"error_log {directory}/error.log;\nevents {{ worker_connections 256; }}\n"
        f"http {{\n{temporary}    include {directory}/httptrading.conf;\n}}\n"
    )
    return frame


@contextlib.contextmanager
def running_nginx(directory: Path, upstream: str) -> Iterator[Site]:
    assert shutil.which("nginx"), "nginx is needed: apt-get install nginx"
    port = free_port()
    frame = nginx_files(directory, port, upstream)
    process = subprocess.Popen(["nginx", "-c", str(frame), "-e", str(directory / "error.log")])
    try:
        wait_until(lambda: process.poll() is not None or accepts(("127.0.0.1", port)))
        assert process.poll() is None, (directory / "error.log").read_text()
        yield Site(port, directory)
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def running_service(directory: Path, *options: str, port: int = 0) -> Iterator[subprocess.Popen]:
    """gunicorn with gunicorn.conf.py, as `deploy/httptrading.service` starts it."""
    config = directory / "httptrading.toml"
    config.write_text(f"""
metrics_token = "{METRICS_TOKEN}"
[[instance]]
broker = "Paper"
id = "{PAPER}"
tokens = ["{TOKEN}"]
[[instance]]
broker = "slow_broker:SlowBroker"
id = "{SLOW}"
tokens = ["{TOKEN}-slow"]
""")
    config.chmod(0o600)
    with (directory / "service.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *options],
            cwd=ROOT,
            stderr=log,
            env=os.environ
            | {
                "HTTPTRADING_CONFIG": str(config),
                "HTTPTRADING_DATA_DIR": str(directory / "data"),
                "HTTPTRADING_PORT": str(port or free_port()),
                "PYTHONPATH": str(Path(__file__).parent),
            },
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
