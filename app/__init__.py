"""The HTTP side: `create_app` for a service of its own, `create_blueprint` for anybody's app."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from flask import Blueprint, Flask
from flask.blueprints import BlueprintSetupState
from werkzeug.exceptions import NotFound

from httptrading.app.answers import not_found
from httptrading.app.blueprint import Service, make_blueprint
from httptrading.app.bulkhead import SPARE
from httptrading.app.config import Settings, default_data_dir, load_settings
from httptrading.app.config_checks import check_instances, check_service
from httptrading.brokers.base import BaseBroker
from httptrading.brokers.gateway import Gateway
from httptrading.brokers.settings import InstanceSettings

log = logging.getLogger("httptrading.app")


def create_app(
    config: str | os.PathLike[str] | Settings | None = None,
    *,
    brokers: Iterable[BaseBroker | InstanceSettings] | None = None,
    **options: Any,
) -> Flask:
    """A Flask app with nothing but the service.

    `config` is the path of a TOML file or loaded `Settings`; without it and without `brokers`, the
    file named by `HTTPTRADING_CONFIG`, else one made-up paper account. `brokers` and `options` are
    those of `create_blueprint`. Raises ConfigurationError with every mistake.
    """
    if brokers is not None:
        blueprint = create_blueprint(brokers, **options)
    else:
        if not isinstance(config, Settings):
            config = load_settings(None if config is None else Path(config), os.environ)
        blueprint = _blueprint(config, "/httptrading", config.threads + SPARE)
    app = Flask("httptrading", static_folder=None)
    app.register_blueprint(blueprint)
    # A path that is nobody's looks like an instance that is nobody's.
    app.register_error_handler(NotFound, lambda _: not_found())
    return app


def create_blueprint(
    brokers: Iterable[BaseBroker | InstanceSettings],
    *,
    url_prefix: str = "/httptrading",
    token_header: str = "HT-TOKEN",
    compat: str | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    journal_url: str | None = None,
    metrics_token: str | None = None,
    threads: int | None = None,
) -> Blueprint:
    """The routes for these accounts, to be registered in any Flask app.

    `threads`: how many requests the server runs at a time, if it does nothing else; then some are
    kept free for each account, and for orders, however many wait for a broker that hangs.
    Nothing starts before the first request (so it may be made before a fork); the gateway stands
    in `app.extensions["httptrading"]`, with `start()`, `drain()` and `close()`.
    """
    instances = tuple(
        one if isinstance(one, InstanceSettings) else InstanceSettings(broker=one)
        for one in brokers
    )
    check_service(journal_url, metrics_token)
    settings = Settings(
        instances=instances,
        data_dir=Path(data_dir) if data_dir is not None else default_data_dir(os.environ),
        token_header=token_header,
        compat=compat,
        journal_url=journal_url,
        metrics_token=metrics_token,
        warnings=check_instances(instances),
    )
    if compat not in (None, "1.0"):
        raise ValueError('compat must be None or "1.0"')
    return _blueprint(settings, url_prefix, threads)


def _blueprint(settings: Settings, url_prefix: str, threads: int | None) -> Blueprint:
    for warning in settings.warnings:
        log.warning("%s", warning)
    gateway = Gateway(settings.instances, settings.data_dir, settings.journal_url)
    atexit.register(gateway.close)
    blueprint = make_blueprint(Service(settings, gateway, threads), url_prefix)

    def remember(state: BlueprintSetupState) -> None:
        state.app.extensions["httptrading"] = gateway

    blueprint.record(remember)
    return blueprint


__all__: Sequence[str] = ("create_app", "create_blueprint")
