"""`run()`: the service in one call, on gunicorn with one process and many threads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from flask import Blueprint, Flask

from httptrading.app import create_app, hooks
from httptrading.app.bulkhead import SPARE
from httptrading.app.config import address
from httptrading.brokers.base import BaseBroker
from httptrading.brokers.settings import InstanceSettings


def run(
    host: str,
    port: int,
    brokers: Iterable[BaseBroker | InstanceSettings],
    *,
    token_header: str = "HT-TOKEN",
    compat: str | None = None,
    blueprints: Iterable[Blueprint] = (),
    data_dir: str | None = None,
    threads: int = 32,
    **options: Any,
) -> None:
    """Serves these accounts until told to stop (SIGTERM, Ctrl-C).

    `blueprints`: routes of your own beside the service's. `options`: as for `create_blueprint`.
    Raises ConfigurationError for bad ids, tokens or limits before anything listens.
    """
    from gunicorn.app.base import BaseApplication

    app = create_app(
        brokers=brokers,
        token_header=token_header,
        compat=compat,
        data_dir=data_dir,
        threads=threads + SPARE,
        **options,
    )
    for blueprint in blueprints:
        app.register_blueprint(blueprint)

    def on_starting(server: Any) -> None:
        hooks.on_starting(server)
        hooks.refuse_second_owner(app.extensions["httptrading"])
        hooks.refuse_taken_address(server)

    class Server(BaseApplication):  # type: ignore[misc]
        def load_config(self) -> None:
            # gunicorn.conf.py says what each of these is for.
            settings = {
                "bind": address(host, port),
                "proc_name": "httptrading",
                "workers": 1,
                "worker_class": hooks.WORKER_CLASS,
                "threads": threads + SPARE,
                "timeout": 60,
                "graceful_timeout": hooks.STOP_WITHIN,
                "keepalive": 75,
                "control_socket_disable": True,
                "on_starting": on_starting,
                "post_worker_init": hooks.post_worker_init,
                "worker_exit": hooks.worker_exit,
            }
            for name, value in settings.items():
                self.cfg.set(name, value)

        def load(self) -> Flask:
            return app

    Server().run()
