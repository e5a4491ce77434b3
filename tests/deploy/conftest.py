"""One service behind one nginx for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from deployment import Site, accepts, free_port, running_nginx, running_service, wait_until


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    port = free_port()
    service = running_service(tmp_path_factory.mktemp("service"), port=port)
    with service as process:
        wait_until(lambda: process.poll() is not None or accepts(("127.0.0.1", port)))
        with running_nginx(tmp_path_factory.mktemp("nginx"), f"127.0.0.1:{port}") as running:
            wait_until(lambda: running.ask("GET", "/httptrading/healthz").status == 200)
            yield running
