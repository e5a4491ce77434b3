"""The OpenAPI 3.1 document, generated from the schemas that load and dump the JSON."""

from __future__ import annotations

import enum
from typing import Any

import marshmallow
from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from apispec.ext.marshmallow.openapi import OpenAPIConverter
from marshmallow import Schema

import httptrading
from httptrading.app.answers import HTTP_STATUS
from httptrading.app.ask import LARGEST_BODY, LONGEST_DEADLINE, SHORTEST_DEADLINE
from httptrading.app.config import Settings
from httptrading.brokers.base import OPERATIONS
from httptrading.errors import ERRORS
from httptrading.model import UnifiedStatus
from httptrading.schemas import fields, request, response

Json = dict[str, Any]


class _QuoteQuery(request.ContractQuery):
    """As parameters have it, which cannot say that one of the two is needed."""

    ticker = fields.Text(
        request.ANY_TEXT, "", metadata={"description": "Or symbol; one is needed."}
    )
    symbol = fields.Text(request.ANY_TEXT, "", metadata={"description": "Another name of ticker."})


_BODY_EXAMPLE = {
    "tradeType": "Securities",
    "ticker": "AAPL",
    "region": "US",
    "price": 200.01,
    "qty": 12,
    "orderType": "Limit",
    "timeInForce": "DAY",
    "lifecycle": "ETH",
    "direction": "BUY",
    "clientOrderId": "rebalance-2025-05-28-1",
}
_STRING: Json = {"type": "string"}
_BOOLEAN: Json = {"type": "boolean"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_TIME: Json = {
    "type": "string",
    "format": "date-time",
    "examples": ["2025-05-28T05:20:07.062298+00:00"],
}
_NODES: tuple[type[Schema], ...] = (
    response.ContractNode,
    response.QuoteNode,
    response.MarketStatusNode,
    response.CashNode,
    response.PositionNode,
    response.OrderNode,
    response.AskedNode,
    response.FillNode,
    response.CombinationNode,
    response.ArgsNode,
)


def openapi_document(settings: Settings, url_prefix: str) -> Json:
    """The routes below `url_prefix`, as these settings make them."""
    plugin = MarshmallowPlugin(schema_name_resolver=_component_name)
    spec = APISpec(
        title="httptrading",
        version=httptrading.__version__,
        openapi_version="3.1.0",
        plugins=[plugin],
        info={"description": _about(settings)},
        security=[{"token": []}],
        tags=[
            {"name": "account", "description": "Connection, cash and holdings"},
            {"name": "market", "description": "Quotes and market states"},
            {"name": "order", "description": "Orders"},
        ],
    )
    assert plugin.converter is not None  # set by APISpec's constructor
    plugin.converter.add_attribute_function(_own_field)  # type: ignore[no-untyped-call]
    token = {"type": "apiKey", "in": "header", "name": settings.token_header}
    spec.components.security_scheme("token", token)
    for node in _NODES:
        if _component_name(node) not in spec.components.schemas:  # else it was nested in another
            spec.components.schema(_component_name(node), schema=node)
    for body in (request.PlaceOrder, request.CancelOrder, request.CancelAll):
        spec.components.schema(_component_name(body), schema=body)
    schemas: Json = spec.components.schemas
    for node in _NODES:
        _close(schemas[_component_name(node)])
    del schemas["Args"]["required"][schemas["Args"]["required"].index("price")]
    listed = {**schemas["Order"]["properties"], **schemas.pop("Asked")["properties"]}
    schemas["ListedOrder"] = _node(listed)
    schemas |= _plain_nodes()
    _complete_bodies(schemas)
    for name, one in _parameters().items():
        spec.components.parameter(name, one["in"], one)
    for name, one in _responses().items():
        spec.components.response(name, one)
    _add_paths(spec, url_prefix)
    document = spec.to_dict()
    if settings.compat == "1.0":
        _reword_as_1_0(document)
    return document


def _about(settings: Settings) -> str:
    text = (
        "One HTTP API over several brokers. Every answer carries the same envelope; `ex` is null, "
        "or a sentence that says what went wrong and what to do. Numbers are plain decimals."
    )
    if settings.compat == "1.0":
        text += (
            ' This service runs with compat="1.0": every error after authentication is answered '
            "with status 200 and `ex` alone, and successes are worded as in httptrading 1.0."
        )
    return text


def _component_name(schema: Any) -> str:
    kind = schema if isinstance(schema, type) else type(schema)
    return str(kind.__name__).removesuffix("Node")


def _own_field(self: OpenAPIConverter, field: marshmallow.fields.Field[Any], **_: Any) -> Json:
    """What our kinds of fields mean in JSON Schema."""
    nullable = bool(field.allow_none)
    found: Json
    match field:
        case fields.Price():
            found = {
                "type": "number",
                "exclusiveMinimum": 0,
                "maximum": int(fields.LARGEST_PRICE),
                "description": f"At most {fields.SIGNIFICANT_DIGITS} significant digits, kept as "
                "typed.",
            }
        case fields.Quantity():
            found = {"type": "integer", "minimum": 1, "maximum": fields.LARGEST_QTY}
        case fields.EnumName() | fields.OneOf():
            found = {"type": "string", "enum": list(field.names)}
        case fields.Text():
            found = {"type": "string", "pattern": f"^(?:{field.form.pattern})$"}
        case response.Number():
            found = {"type": "number"}
        case response.Timestamp():
            found = {"type": "integer", "description": "Milliseconds since the epoch."}
        case response.Name():
            kind: type[enum.Enum] = field.kind
            names = [member.name for member in kind]
            found = {"type": "string", "enum": [*names, None] if nullable else names}
        case marshmallow.fields.Constant():
            return {"type": "string", "const": field.constant}
        case _:
            return {}
    if nullable:
        found["type"] = [found["type"], "null"]
    return found


def _node(properties: Json) -> Json:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _close(schema: Json) -> None:
    """A node that we print has all of its fields, always, and no other."""
    schema |= _node(schema["properties"])


def _complete_bodies(schemas: Json) -> None:
    """What holds between fields, which marshmallow checks in code."""
    place = schemas["PlaceOrder"]
    place["additionalProperties"] = False
    place["properties"]["ticker"] |= {"description": _TICKER}
    place["properties"]["symbol"] = {
        **place["properties"]["ticker"],
        "description": "Another name of ticker.",
    }
    place["required"].remove("ticker")
    place["allOf"] = [
        {"oneOf": [{"required": ["ticker"]}, {"required": ["symbol"]}]},
        {
            "if": {"properties": {"orderType": {"const": "Market"}}},
            "then": {"properties": {"price": {"type": "null"}}},
            "else": {"properties": {"price": {"type": "number"}}, "required": ["price"]},
        },
    ]
    place["examples"] = [_BODY_EXAMPLE]
    cancel = schemas["CancelOrder"]
    cancel["additionalProperties"] = False
    # One of the two; client generators understand it better than a oneOf of nothing but "required".
    cancel |= {"minProperties": 1, "maxProperties": 1}
    cancel["examples"] = [{"orderId": "69788888"}]
    schemas["CancelAll"] |= {"additionalProperties": False, "examples": [{}]}


_TICKER = (
    "US: letters and digits, `.` before a share class (BRK.B). HK: 1 to 5 digits, shown as five. "
    "CN: six digits."
)


def _plain_nodes() -> Json:
    """The nodes that are put together in code."""
    states = {"type": "object", "additionalProperties": _ref("MarketStatus")}
    error = _node(
        {
            "code": {"type": "string", "enum": list(ERRORS)},
            "retryable": _BOOLEAN,
            "outcome": {
                "type": "string",
                "enum": ["none", "unknown"],
                "description": "none: this request sent nothing; an earlier one with the same "
                "clientOrderId may have.",
            },
            "fields": {
                "type": "object",
                "additionalProperties": {"type": "array", "items": _STRING},
                "description": "Each bad field, and what is wrong with it.",
            },
            "clientOrderId": {**_STRING, "description": "The order in question."},
            "requestId": {**_STRING, "description": "The same as the header X-Request-ID."},
        }
    )
    error["required"] = ["code", "retryable", "outcome", "requestId"]
    return {
        "MarketStatusMap": {
            "type": "object",
            "properties": {"type": {"const": "marketStatusMap"}},
            "required": ["type"],
            "additionalProperties": states,
            "description": f"unifiedStatus is one of {', '.join(UnifiedStatus.__members__)}.",
        },
        "Cancellation": _node(
            {
                "type": {"const": "cancellation"},
                "orderId": _STRING,
                "requested": _BOOLEAN,
                "ex": {"type": ["string", "null"]},
            }
        ),
        "Connection": _node(
            {
                "type": {"const": "connection"},
                "name": _STRING,
                "connected": _BOOLEAN,
                "since": _TIME,
                "lastError": _STRING,
                "queued": _COUNT,
                "reconnects": _COUNT,
                "replacements": _COUNT,
            }
        ),
        "Limit": _node(
            {
                "type": {"const": "limit"},
                "name": _STRING,
                "limit": _COUNT,
                "seconds": {"type": "number"},
                "left": _COUNT,
                "kept": {**_COUNT, "description": "Of the limit, for cancellations alone."},
                "keptForOrders": {
                    **_COUNT,
                    "description": "Of the limit, besides, not for reads.",
                },
            }
        ),
        "InstanceState": _node(
            {
                "type": {"const": "instanceState"},
                "connections": _list("Connection"),
                "limits": _list("Limit"),
                "operations": {
                    "type": "array",
                    "items": {"type": "string", "enum": list(OPERATIONS)},
                },
                "orders": {
                    "type": ["array", "null"],
                    "items": _ref("Combination"),
                    "description": "The kinds of orders this broker takes; null: no table.",
                },
                "quoteRegions": {"type": ["array", "null"], "items": _STRING},
                "unsettledOrders": _COUNT,
                "oldestUnsettled": {**_TIME, "type": ["string", "null"]},
            }
        ),
        "Error": error,
        "ErrorAnswer": _envelope({"error": _ref("Error")}, ex=_STRING),
    }


def _envelope(body: Json, ex: Json | None = None) -> Json:
    return _node(
        {
            "type": {"const": "apiResponse"},
            "instanceId": _STRING,
            "broker": {**_STRING, "examples": ["futu"]},
            "brokerDisplay": {**_STRING, "examples": ["富途证券"]},
            "time": _TIME,
            "ex": ex or {"type": "null"},
            **body,
        }
    )


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(name: str) -> Json:
    return {"type": "array", "items": _ref(name)}


def _parameters() -> Json:
    return {
        "instanceId": {
            "in": "path",
            "name": "instanceId",
            "required": True,
            "schema": {"type": "string", "minLength": 16, "maxLength": 32},
        },
        "timeout": {
            "in": "header",
            "name": "HT-TIMEOUT",
            "description": "Seconds within which the request is answered.",
            "schema": {
                "type": "number",
                "minimum": SHORTEST_DEADLINE,
                "maximum": LONGEST_DEADLINE,
            },
            "example": 10,
        },
        "requestId": {
            "in": "header",
            "name": "X-Request-ID",
            "description": "Comes back in the answer and stands in the log; one that is not 1 to "
            "64 of A-Z a-z 0-9 . _ : - is replaced.",
            "schema": _STRING,
        },
        "cacheControl": {
            "in": "header",
            "name": "Cache-Control",
            "description": "`no-cache` asks the broker, never the memory.",
            "schema": _STRING,
        },
        "idempotencyKey": {
            "in": "header",
            "name": "Idempotency-Key",
            "description": "The same as clientOrderId in the body.",
            "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
        },
    }


_REQUEST_ID = {"X-Request-ID": {"schema": _STRING, "description": "The request's, or one of ours."}}
_RETRY_AFTER = {
    "Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds."}
}
_WORDS = {
    400: "The input is wrong; each bad field is named. Nothing was sent.",
    404: "Wrong instance, wrong or missing token: plain text, the same bytes for all of them.",
    405: "Another method than the documented one.",
    413: f"The body is larger than {LARGEST_BODY} bytes.",
    415: "The body is not sent as application/json.",
    422: "Valid, but the broker does not take it, or refused it.",
    429: "A rate limit is used up. Nothing was sent.",
    500: "A bug; the log has the details under the request id.",
    503: "Too much is waiting, or the broker is not connected. Nothing was sent.",
    504: "The deadline passed; `outcome` says whether something was sent.",
}


def _responses() -> Json:
    """One for each status; which codes it may carry stands in its description."""
    codes: dict[int, list[str]] = {405: [], 413: [], 415: []}
    for code, status in HTTP_STATUS.items():
        codes.setdefault(status, []).append(code)
    found: Json = {}
    for status, words in _WORDS.items():
        stranger = status == 404
        listed = ", ".join(codes[status]) or "INVALID_REQUEST"
        headers: Json = dict(_REQUEST_ID)
        if status in (429, 503):
            headers |= _RETRY_AFTER
        if status == 405:
            headers["Allow"] = {"schema": _STRING}
        found[str(status)] = {
            "description": words if stranger else f"{words} {listed}",
            "headers": {} if stranger else headers,
            "content": {"text/plain": {"schema": {"const": "Not Found\n"}}}
            if stranger
            else {"application/json": {"schema": _ref("ErrorAnswer")}},
        }
    found["OrderNotFound"] = {
        "description": f"{_WORDS[404]} With the envelope: no such order. ORDER_NOT_FOUND",
        # JSON first: client generators take the first kind for the only one.
        "content": {
            "application/json": {"schema": _ref("ErrorAnswer")},
            **found["404"]["content"],
        },
    }
    return found


def _add_paths(spec: APISpec, prefix: str) -> None:
    def route(
        method: str,
        path: str,
        summary: str,
        answer: Json,
        *,
        query: type[Schema] | None = None,
        body: type[Schema] | None = None,
        knows_orders: bool = False,
    ) -> None:
        parameters: list[Any] = ["timeout", "requestId"]
        statuses = [400, 404, 405, 422, 429, 500, 503, 504]
        operation: Json = {
            "operationId": path.replace("/", "_").replace("-", "_"),
            "summary": summary,
            "tags": [_TAGS[path.partition("/")[0]]],
        }
        headers: Json = dict(_REQUEST_ID)
        if method == "get":
            parameters.append("cacheControl")
        if query is not None:
            parameters.append({"in": "query", "schema": query})
        if body is not None:
            statuses += [413, 415]
            operation["requestBody"] = {
                "required": body is not request.CancelAll,
                "content": {"application/json": {"schema": _ref(_component_name(body))}},
            }
        if path == "order/place":
            parameters.append("idempotencyKey")
            headers["Idempotent-Replayed"] = {
                "schema": {"const": "true"},
                "description": "This is the stored answer of an earlier request.",
            }
        operation["parameters"] = parameters
        operation["responses"] = {
            "200": {
                "description": "Done.",
                "headers": headers,
                "content": {"application/json": {"schema": _envelope(answer)}},
            },
            **{
                str(status): "OrderNotFound" if knows_orders and status == 404 else str(status)
                for status in sorted(statuses)
            },
        }
        spec.path(
            f"{prefix}/api/{{instanceId}}/{path}",
            parameters=["instanceId"],  # type: ignore[list-item]  # a component by its name
            operations={method: operation},
        )

    route("get", "ping/state", "Is the connection well?", {"pong": _BOOLEAN})
    route(
        "get",
        "market/quote",
        "A snapshot of one security",
        {"quote": _ref("Quote")},
        query=_QuoteQuery,
    )
    route(
        "get",
        "market/state",
        "The markets' states",
        {"marketStatus": _ref("MarketStatusMap")},
    )
    route(
        "get",
        "cash/state",
        "Cash that may be spent",
        {"cash": _ref("Cash")},
        query=request.CashQuery,
    )
    route(
        "get",
        "position/state",
        "The holdings, or one of them",
        {"positions": _list("Position")},
        query=request.PositionQuery,
    )
    route(
        "post",
        "order/place",
        "Sends one order",
        {"orderId": _STRING, "args": _ref("Args"), "clientOrderId": _STRING},
        body=request.PlaceOrder,
    )
    route(
        "post",
        "order/cancel",
        "Asks for the cancellation of one order",
        {},
        body=request.CancelOrder,
        knows_orders=True,
    )
    route(
        "get",
        "order/state",
        "What became of one order",
        {"order": _ref("Order")},
        query=request.OrderQuery,
        knows_orders=True,
    )
    route(
        "get",
        "order/list",
        "The account's orders, newest first",
        {"orders": _list("ListedOrder")},
        query=request.OrderListQuery,
    )
    route(
        "get",
        "order/fills",
        "One order's executions",
        {"fills": _list("Fill")},
        query=request.FillsQuery,
        knows_orders=True,
    )
    route(
        "post",
        "order/cancel-all",
        "Asks for the cancellation of every open order",
        {"orders": _list("Cancellation")},
        body=request.CancelAll,
    )
    route(
        "get",
        "instance/state",
        "Connections, limits, and what this broker can do",
        {"state": _ref("InstanceState")},
    )
    alive = {"schema": _node({"status": {"const": "ok"}})}
    spec.path(
        f"{prefix}/healthz",
        operations={
            "get": {
                "operationId": "healthz",
                "summary": "The service is alive; says nothing of brokers",
                "security": [],
                "responses": {
                    "200": {"description": "Alive.", "content": {"application/json": alive}}
                },
            }
        },
    )


def _reword_as_1_0(document: Json) -> None:
    """One layer over the finished document, as app/compat.py is over the finished answer."""
    components, schemas = document["components"], document["components"]["schemas"]
    _add_field(schemas["Contract"], "symbol", {**_STRING, "description": "The same as ticker."})
    _add_field(schemas["Order"], "isCancelable", _BOOLEAN)
    schemas["Args"] = {"type": "object", "description": "The request's body as it came."}
    schemas["ErrorAnswer"] = _envelope({}, ex=_STRING)
    del schemas["Error"]
    components["responses"] = {"404": components["responses"]["404"]}
    _loosen_bodies(schemas)
    for path, item in document["paths"].items():
        for operation in item.values():
            if not isinstance(operation, dict) or "404" not in operation["responses"]:
                continue  # parameters, and what answers without a token
            done = operation["responses"]["200"]
            body = done["content"]["application/json"]
            if path.endswith("/order/place"):
                body["schema"]["required"].remove("clientOrderId")
                del body["schema"]["properties"]["clientOrderId"]
            elif path.endswith("/order/cancel"):
                _add_field(body["schema"], "canceled", {"const": True})
            body["schema"] = {"oneOf": [body["schema"], _ref("ErrorAnswer")]}
            done["description"] = "Done; or `ex` says what went wrong."
            operation["responses"] = {"200": done, "404": {"$ref": "#/components/responses/404"}}


def _add_field(node: Json, name: str, schema: Json) -> None:
    node["properties"][name] = schema
    node["required"].append(name)


def _loosen_bodies(schemas: Json) -> None:
    """What 1.0 took beside the words of today; see `compat.request_body`."""
    for name in ("PlaceOrder", "CancelOrder", "CancelAll"):
        del schemas[name]["additionalProperties"]
    place, cancel = schemas["PlaceOrder"], schemas["CancelOrder"]
    place["properties"]["price"] = {
        "type": ["number", "string", "null"],
        "description": "A number or its text; for a limit order. A market order's is ignored.",
    }
    place["allOf"].pop()  # what a price has to do with the kind of order
    cancel["properties"]["orderId"]["type"] = ["string", "integer"]
    del cancel["minProperties"], cancel["maxProperties"]
    cancel["oneOf"] = [{"required": [name]} for name in ("orderId", "clientOrderId")]


_TAGS = {
    "ping": "account",
    "cash": "account",
    "position": "account",
    "instance": "account",
    "market": "market",
    "order": "order",
}
