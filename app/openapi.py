"""The OpenAPI 3.1 document, generated from the schemas that load and dump the JSON."""

from __future__ import annotations

from typing import Any

from httptrading.app.config import Settings


def openapi_document(settings: Settings, url_prefix: str) -> dict[str, Any]:
    return {}
