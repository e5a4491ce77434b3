"""Renews the LongBridge token near its end, once, whoever else wants to.

The old token dies the moment LongPort answers (open.longportapp.com/docs/refresh-token-api), so the
new one goes to disk before anything else. While the old one lives, nothing here stops trading.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from httptrading.brokers.longbridge_rest import LongPortRest, NotSent, Refused
from httptrading.brokers.longbridge_token import (
    RENEW_BEFORE,
    Renewal,
    Token,
    TokenFile,
    TokenFileError,
    claims_of,
    epoch_of,
)

log = logging.getLogger("httptrading.longbridge")

RENEWAL_SECONDS = 20.0
GRANT = timedelta(days=90)
COMPLAINT_SECONDS = 3600.0


def parse_grant(data: Any, asked_end: float) -> Token:
    """A renewed token; ValueError when there is none.

    Whatever its end looks like, the token is kept: the old one is dead by now. The SDK reads only
    `token`, too (rust/src/config.rs, refresh_access_token).
    """
    text = data.get("token") if isinstance(data, Mapping) else None
    if not isinstance(text, str) or not re.fullmatch(r"[!#-\[\]-~]+", text):  # for the file: no " \
        raise ValueError("no token")
    ends = (data.get("expired_at"), claims_of(text).get("exp"))
    known = next((end for end in map(_end_of, ends) if end is not None), asked_end)
    return Token(text, float(int(known)))


def _end_of(value: Any) -> float | None:
    """A moment to come, from ISO text or epoch seconds or milliseconds; None when it is none."""
    try:
        if isinstance(value, str) and re.fullmatch(r"\d{9,}", value):
            value = int(value)
        if isinstance(value, int | float) and value > 1e11:
            value /= 1000
        end = epoch_of(value)
    except (ValueError, OverflowError, OSError):
        return None
    return end if end > time.time() else None


class Renewer:
    """The background part of the trade connection; `look()` is called a few times a minute.

    Without `renews` it only says when the token comes to its end.
    """

    def __init__(
        self,
        file: TokenFile,
        app_key: str,
        make_rest: Callable[[Token], LongPortRest],
        *,
        renews: bool,
    ) -> None:
        self._file = file
        self._app_key = app_key
        self._make_rest = make_rest
        self._renews = renews
        self._unwritten: Token | None = None
        self._running: asyncio.Task[None] | None = None
        self._complaint = ""
        self._complained = 0.0

    async def look(self) -> None:
        try:
            if self._unwritten is not None:
                with Renewal(self._file.path, self._app_key) as renewal:
                    if renewal.is_held:
                        self._write(renewal, self._unwritten)
            elif not self._is_near_its_end():
                return
            elif not self._renews:
                end = datetime.fromtimestamp(self._file.current().expiry, UTC)
                self._complain(
                    f"The LongBridge token ends at {end}: put a new one into {self._file.path}, or "
                    "set auto_refresh_token"
                )
            else:
                with Renewal(self._file.path, self._app_key) as renewal:
                    due = renewal.token is not None
                if due:
                    # A task of its own, never cancelled: half of a renewal loses the token.
                    self._running = asyncio.get_running_loop().create_task(self._renew())
        except TokenFileError as error:
            self._complain(str(error))

    def _complain(self, text: str) -> None:
        """The same complaint is logged once in a while only."""
        now = time.monotonic()
        if text != self._complaint or now > self._complained + COMPLAINT_SECONDS:
            self._complaint, self._complained = text, now
            log.error("%s", text)

    def _is_near_its_end(self) -> bool:
        if self.is_renewing:
            return False
        try:
            return self._file.current().remaining() <= RENEW_BEFORE
        except TokenFileError:
            return False  # whoever uses the token says what is wrong

    @property
    def is_renewing(self) -> bool:
        return self._running is not None and not self._running.done()

    @property
    def holds_the_only_token(self) -> bool:
        """Whether the token that works is, or may any moment be, nowhere but here."""
        return self.is_renewing or self._unwritten is not None

    async def finish(self, seconds: float) -> None:
        """Lets a renewal under way end: its answer holds the only token that will work."""
        if self._running is not None:
            await asyncio.wait([self._running], timeout=seconds)
        if self._unwritten is not None:
            await self.look()

    async def _renew(self) -> None:
        with Renewal(self._file.path, self._app_key) as renewal:
            old = renewal.token
            if old is None:
                return
            rest = self._make_rest(old)
            end = datetime.now(UTC) + GRANT
            query = {"expired_at": end.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
            try:
                renewal.begin()
                async with asyncio.timeout(RENEWAL_SECONDS):
                    data = await rest.request("GET", "/v1/token/refresh", query)
                self._write(renewal, parse_grant(data, end.timestamp()))
            except TokenFileError as error:
                self._complain(str(error))
            except (NotSent, Refused) as error:
                code = f" (code {error.code})" if isinstance(error, Refused) else ""
                log.error(
                    "The LongBridge token, good until %s, could not be renewed%s; the old one goes "
                    "on, and another attempt follows",
                    datetime.fromtimestamp(old.expiry, UTC),
                    code,
                )
            except Exception as error:  # NoAnswer, TimeoutError, an answer that is no token
                log.critical(
                    "LongBridge gave no clear answer to the renewal of the token (%s): the old one "
                    "goes on while it is accepted; if it is not, put a new one in %s",
                    type(error).__name__,
                    self._file.path,
                )
            finally:
                rest.close()

    def _write(self, renewal: Renewal, token: Token) -> None:
        try:
            renewal.write(token)
        except (OSError, TokenFileError) as error:
            log.critical(
                "The renewed LongBridge token could not be written to %s (%s): it lives in memory "
                "only, and writing is tried again",
                self._file.path,
                type(error).__name__,
            )
            self._unwritten = token
            self._file.keep(token)
        else:
            self._unwritten = None
            log.warning(
                "The LongBridge token was renewed; it is good until %s",
                datetime.fromtimestamp(token.expiry, UTC),
            )
