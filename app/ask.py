"""One admitted request: its instance, its deadline, its input."""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Any, Literal, TypeVar
from urllib.parse import unquote_to_bytes

from flask import Request
from marshmallow import EXCLUDE, Schema, ValidationError
from werkzeug.datastructures import MultiDict
from werkzeug.exceptions import RequestEntityTooLarge

from httptrading.brokers.instance import Instance
from httptrading.errors import InvalidRequest
from httptrading.schemas.numbers import HalfSurrogate, load_json

LARGEST_BODY = 64 * 1024
CUT_BODY = "The body could not be read to its end."
SHORTEST_DEADLINE, LONGEST_DEADLINE = 1.0, 30.0

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_SECONDS = re.compile(r"[0-9]{1,3}(\.[0-9]{1,20})?")

_Loaded = TypeVar("_Loaded")


class BodyTooLarge(InvalidRequest):
    """413."""


class WrongContentType(InvalidRequest):
    """415."""


class WrongMethod(InvalidRequest):
    """405."""

    def __init__(self, allowed: str) -> None:
        super().__init__(f"This route takes {allowed} requests.")
        self.allowed = allowed


def request_id_of(request: Request) -> str:
    """The client's `X-Request-ID`, or one of ours: this process's own beginning and a number."""
    given = request.headers.get("X-Request-ID", "")
    return given if _REQUEST_ID.fullmatch(given) else f"{_process()}{next(_numbers):08x}"


_numbers = itertools.count(1)


@cache
def _process() -> str:
    return secrets.token_hex(4)


class Ask:
    """What a view works on."""

    def __init__(
        self,
        request: Request,
        instance: Instance,
        request_id: str,
        began: float,
        *,
        reword: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None,
        order_node: type[Schema],
    ) -> None:
        """`began`: when the request arrived, in `time.monotonic()` seconds.

        The others differ under `compat="1.0"`: `reword` puts a body into the words of today, and
        unknown keys, the body's content type and a query beside it are ignored then; `order_node`
        is how an order is worded."""
        self.request = request
        self.instance = instance
        self.broker = instance.broker
        self.request_id = request_id
        self.reword = reword
        self.order_node = order_node
        self.began = began
        self.deadline = self.began + instance.settings.deadline
        self.fresh = "no-cache" in request.headers.get("Cache-Control", "").lower()
        self.raw_body: Any = None

    def limit_time(self) -> None:
        """Takes the client's own limit, `HT-TIMEOUT`, in seconds."""
        given = self.request.headers.get("HT-TIMEOUT")
        if given is None:
            return
        seconds = float(given) if _SECONDS.fullmatch(given) else 0.0
        if not SHORTEST_DEADLINE <= seconds <= LONGEST_DEADLINE:
            raise InvalidRequest(
                "The header HT-TIMEOUT must be a number of seconds from 1 to 30.",
                {"HT-TIMEOUT": ["must be a number of seconds from 1 to 30"]},
            )
        self.deadline = self.began + seconds

    def query(self, schema: type[Schema], kind: type[_Loaded]) -> _Loaded:
        return _of_kind(_load_query(schema, tuple(self._parameters().items(multi=True))), kind)

    def _parameters(self) -> MultiDict[str, str]:
        """The query's; those that are no text are named. werkzeug raises for raw bytes that are not
        UTF-8, and leaves quoted ones as they are, for an order id that nobody has."""
        query = self.request.query_string
        if not query.isascii() or b"%" in query:
            bad = [pair for pair in query.split(b"&") if not _is_utf8(unquote_to_bytes(pair))]
            names = [unquote_to_bytes(pair.partition(b"=")[0]) for pair in bad]
            fields = {name.decode("utf-8", "replace"): ["is not UTF-8 text"] for name in names}
            if fields:
                raise InvalidRequest(f"The query is not UTF-8 text: {', '.join(fields)}.", fields)
        return self.request.args

    def refuse_query(self) -> None:
        """Of a route that takes none: a clientOrderId or a region that stands there would be
        overlooked."""
        if names := sorted(self._parameters()):
            raise InvalidRequest(
                f"This route takes no query, and this one names {', '.join(names)}.",
                {name: ["must stand in the body, if at all"] for name in names},
            )

    @property
    def has_body(self) -> bool:
        return bool(self.request.content_length) or "Transfer-Encoding" in self.request.headers

    def body(self, schema: type[Schema], kind: type[_Loaded]) -> _Loaded:
        """The JSON body, loaded; every bad field is named."""
        if self.reword is None:
            self.refuse_query()
        mimetype = self.request.mimetype
        is_json = mimetype == "application/json" or mimetype.endswith("+json")
        if self.reword is None and not is_json:
            raise WrongContentType("Send the body as JSON, with Content-Type: application/json.")
        # One more than allowed: of a chunked body werkzeug returns so much and says nothing.
        self.request.max_content_length = LARGEST_BODY + 1
        try:
            text = self.request.get_data(cache=False)
        except RequestEntityTooLarge:
            text = None
        except Exception:  # ClientDisconnected, or what the server makes of bad chunks
            raise InvalidRequest(CUT_BODY) from None
        if text is None or len(text) > LARGEST_BODY:
            raise BodyTooLarge(f"The body is larger than {LARGEST_BODY} bytes.")
        # gunicorn ends a body that is cut like a whole one.
        if len(text) < (self.request.content_length or 0):
            raise InvalidRequest(CUT_BODY)
        try:
            self.raw_body = load_json(text.decode("utf-8"))
        except UnicodeDecodeError:
            raise InvalidRequest("The body is not UTF-8 text.") from None
        except HalfSurrogate as error:
            named = {error.field: ["must not have half a surrogate pair"]} if error.field else None
            raise InvalidRequest(f"The body {error}.", named) from None
        except ValueError as error:
            raise InvalidRequest(f"The body {error}.") from None
        if not isinstance(self.raw_body, dict):
            raise InvalidRequest("The body must be a JSON object.")
        if self.reword is not None:
            return _of_kind(_load(_loader(schema, EXCLUDE), self.reword(self.raw_body)), kind)
        return _of_kind(_load(_loader(schema), self.raw_body), kind)


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@cache
def _loader(schema: type[Schema], unknown: Literal["exclude"] | None = None) -> Schema:
    """One instance for all requests: making one costs more than loading with it."""
    return schema(unknown=unknown)


@lru_cache(1000)
def _load_query(schema: type[Schema], query: tuple[tuple[str, str], ...]) -> Any:
    """Who polls asks the same again and again; what is loaded is never changed."""
    data = dict(query)
    if len(data) < len(query):
        raise InvalidRequest("The query names a parameter twice.")
    return _load(_loader(schema), data)


def _load(schema: Schema, data: Any) -> Any:
    try:
        return schema.load(data)
    except ValidationError as error:
        fields = _flat(error.messages_dict)
        listed = "; ".join(f"{name} {', '.join(texts)}" for name, texts in fields.items())
        raise InvalidRequest(f"The request is not valid: {listed}.", fields) from None


def _of_kind(loaded: Any, kind: type[_Loaded]) -> _Loaded:
    if not isinstance(loaded, kind):
        raise TypeError(f"the schema loads a {type(loaded).__name__}, not a {kind.__name__}")
    return loaded


def _flat(messages: Any) -> dict[str, list[str]]:
    """marshmallow's messages, a list of sentences for each field."""
    flat: dict[str, list[str]] = {}
    for name, texts in messages.items():
        sentences = texts if isinstance(texts, list) else [str(texts)]
        flat[str(name)] = [_sentence(str(text)) for text in sentences]
    return flat


def _sentence(text: str) -> str:
    return {
        "Missing data for required field.": "is missing",
        "Unknown field.": "is not a known field",
        "Field may not be null.": "must not be null",
    }.get(text, text)
