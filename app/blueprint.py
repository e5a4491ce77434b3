"""The blueprint: the table of routes, and the one way every request goes.

Admission (instance id and token), method, time limit, view, envelope; any error becomes an answer
here. Nothing of a host application is touched: not its error handlers, its JSON settings or its
logging.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from flask import Blueprint, Request, Response, request
from flask.blueprints import BlueprintSetupState

from httptrading.app import account, compat, market, order
from httptrading.app.answers import (
    envelope,
    error_answer,
    json_answer,
    not_found,
    our_bug,
)
from httptrading.app.ask import (
    Ask,
    BodyTooLarge,
    WrongContentType,
    WrongMethod,
    request_id_of,
)
from httptrading.app.auth import Doorkeeper
from httptrading.app.bulkhead import Bulkhead
from httptrading.app.config import Settings
from httptrading.app.metrics import Metrics
from httptrading.brokers.base import masked
from httptrading.brokers.gateway import Gateway
from httptrading.brokers.worker import asked_by
from httptrading.errors import HttpTradingError
from httptrading.schemas.numbers import dump_json
from httptrading.schemas.response import OrderNode

log = logging.getLogger("httptrading.access")

METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"]


class EveryMethod(set[str]):
    """A rule's methods, with all that there is besides those listed (PROPFIND, say); Flask itself
    knows only lists, and answers what is missing in HTML."""

    def __contains__(self, method: object) -> bool:
        return True


@dataclass(frozen=True)
class Route:
    method: str
    view: Callable[[Ask], Any]


ROUTES: dict[str, Route] = {
    "ping/state": Route("GET", account.ping_state),
    "market/quote": Route("GET", market.market_quote),
    "market/state": Route("GET", market.market_state),
    "cash/state": Route("GET", account.cash_state),
    "position/state": Route("GET", account.position_state),
    "order/place": Route("POST", order.place),
    "order/cancel": Route("POST", order.cancel),
    "order/state": Route("GET", order.state),
    "order/list": Route("GET", order.list_),
    "order/fills": Route("GET", order.fills),
    "order/cancel-all": Route("POST", order.cancel_all),
    "instance/state": Route("GET", account.instance_state),
}

_STATUS_OF = {BodyTooLarge: 413, WrongContentType: 415, WrongMethod: 405}


class Service:
    """What the views of one blueprint share."""

    def __init__(self, settings: Settings, gateway: Gateway, threads: int | None) -> None:
        """`threads`: how many the server has; None: not known, so none are kept free."""
        self.settings = settings
        self.gateway = gateway
        self.metrics = Metrics(gateway) if settings.metrics_token else None
        self.doorkeeper = Doorkeeper(
            (one.broker.instance_id, one.broker.tokens) for one in settings.instances
        )
        self._compat = settings.compat == "1.0"
        self._bulkhead = None if threads is None else Bulkhead(threads, gateway.settings)

    def serve(self, path: str, instance_id: str, request: Request) -> Response:
        """One request below an instance."""
        began = time.monotonic()
        token = request.headers.get(self.settings.token_header, "")
        admitted = self.doorkeeper.admits(instance_id, token)
        route = ROUTES.get(path)
        if admitted is None or route is None:
            return not_found()
        request_id = request_id_of(request)
        asked_by.set(request_id)
        outcome = "OK"
        try:
            with self._place(admitted, changes=route.method == "POST"):
                response = self._answer(path, route, admitted, request, request_id, began)
        except HttpTradingError as error:
            outcome = error.code
            response = self._error(admitted, error, request_id)
        except Exception as error:
            outcome = "INTERNAL"
            bug = our_bug(error, request_id)
            if route.method == "POST":
                bug.outcome = "unknown"  # it may have struck after the order was sent
            response = self._error(admitted, bug, request_id)
        response.headers["X-Request-ID"] = request_id
        seconds = time.monotonic() - began
        if self.metrics is not None:
            self.metrics.observe(path, outcome, seconds)
        log_request(
            request.method,
            path,
            request_id=request_id,
            instance=masked(admitted),
            status=response.status_code,
            outcome=outcome,
            milliseconds=round(seconds * 1000, 2),
        )
        return response

    def _place(self, instance_id: str, *, changes: bool) -> AbstractContextManager[None]:
        if self._bulkhead is None:
            return nullcontext()
        return self._bulkhead.place(instance_id, changes=changes)

    def _answer(
        self,
        path: str,
        route: Route,
        instance_id: str,
        request: Request,
        request_id: str,
        began: float,
    ) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        if method != route.method:
            raise WrongMethod(route.method)
        ask = Ask(
            request,
            self.gateway.instance(instance_id),
            request_id,
            began,
            reword=compat.request_body if self._compat else None,
            order_node=compat.OrderNode10 if self._compat else OrderNode,
        )
        ask.limit_time()
        found = route.view(ask)
        body, placed = found if isinstance(found, tuple) else (found, None)
        if self._compat:
            body = compat.success(path, body, ask.raw_body)
        response = json_answer(envelope(ask.broker, None, placed and placed.time) | body)
        if placed is not None and placed.replayed:
            response.headers["Idempotent-Replayed"] = "true"
        return response

    def _error(self, instance_id: str, error: HttpTradingError, request_id: str) -> Response:
        broker = self.gateway.settings[instance_id].broker
        if self._compat:
            return json_answer(envelope(broker, error.text))
        status = _STATUS_OF.get(type(error))
        response = error_answer(broker, error, request_id, status)
        if isinstance(error, WrongMethod):
            response.headers["Allow"] = error.allowed
        return response

    def metrics_page(self) -> Response:
        if self.metrics is None or not self.metrics.admits(
            request.headers.get("Authorization", ""), self.settings.metrics_token or ""
        ):
            return not_found()
        return self.metrics.page()


def log_request(method: str, path: str, **fields: object) -> None:
    """A line in the access log, without `Logger.info`'s search for the line of code that logs."""
    if log.isEnabledFor(logging.INFO):
        log.handle(
            log.makeRecord(
                log.name, logging.INFO, __file__, 0, "%s %s", (method, path), None, extra=fields
            )
        )


def make_blueprint(service: Service, url_prefix: str) -> Blueprint:
    """Every route answers every method itself, so that a stranger learns nothing from a 405."""
    blueprint = Blueprint("httptrading", __name__, url_prefix=url_prefix)
    endpoints: list[str] = []

    def add(rule: str, endpoint: str, view: Callable[..., Response]) -> None:
        blueprint.add_url_rule(
            rule,
            endpoint,
            view,
            methods=METHODS,
            provide_automatic_options=False,
            merge_slashes=False,  # a doubled slash is another path, and no redirection
        )
        endpoints.append(endpoint)

    def take_every_method(state: BlueprintSetupState) -> None:
        for endpoint in endpoints:
            full = f"{state.name_prefix}.{state.name}.{endpoint}".lstrip(".")
            for rule in state.app.url_map.iter_rules(full):
                rule.methods = EveryMethod(METHODS)

    for path in ROUTES:
        name = path.replace("/", "_").replace("-", "_")
        add(f"/api/<instance_id>/{path}", name, _view(service, path))
    add(
        "/api/<instance_id>/<path:path>",
        "unknown",
        lambda instance_id, path: _view(service, path)(instance_id),
    )
    blueprint.record(take_every_method)
    blueprint.add_url_rule("/healthz", "healthz", lambda: json_answer({"status": "ok"}))
    blueprint.add_url_rule("/metrics", "metrics", service.metrics_page)

    @lru_cache(8)  # the same blueprint may stand below several prefixes, and its host below others
    def document(prefix: str) -> str:
        from httptrading.app.openapi import openapi_document  # apispec costs the start time

        return dump_json(openapi_document(service.settings, prefix))

    def openapi() -> Response:
        prefix = request.script_root + str(request.url_rule).removesuffix("/openapi.json")
        return Response(document(prefix), 200, content_type="application/json")

    blueprint.add_url_rule("/openapi.json", "openapi", openapi)
    return blueprint


def _view(service: Service, path: str) -> Callable[[str], Response]:
    def view(instance_id: str) -> Response:
        # Not the proxy, which looks the request up anew at each use.
        current: Request = cast(Any, request)._get_current_object()
        return service.serve(path, instance_id, current)

    return view
