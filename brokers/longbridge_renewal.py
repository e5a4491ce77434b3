"""Renews the LongBridge token near its end, once, whoever else wants to.

The old token dies the moment LongPort answers (open.longportapp.com/docs/refresh-token-api), so the
new one goes to disk before anything else. While the old one lives, nothing here stops trading.
The request and the writing have a process of their own, so that neither the end of the service nor
that of a connection's child comes between the two.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
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
from httptrading.brokers.process import LOADER, front_door

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


@dataclass(frozen=True)
class Account:
    """What a renewal is made with, beside the token."""

    app_key: str
    app_secret: str
    http_url: str

    def __repr__(self) -> str:
        return "<Account>"


class Renewer:
    """The background part of the trade connection; `look()` is called a few times a minute.

    Without `renews` it only says when the token comes to its end.
    """

    def __init__(self, file: TokenFile, account: Account, *, renews: bool) -> None:
        self._file = file
        self._account = account
        self._renews = renews
        self._unwritten: Token | None = None
        self._running: asyncio.Task[None] | None = None
        self._complaint = ""
        self._complained = 0.0

    async def look(self) -> None:
        try:
            if self._unwritten is not None:
                with Renewal(self._file.path, self._account.app_key) as renewal:
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
                with Renewal(self._file.path, self._account.app_key) as renewal:
                    due = renewal.token is not None
                if due:
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
        """Waits for a renewal under way, which ends without us, too (unless everything ends, as
        a container does); begins none."""
        if self._running is not None:
            await asyncio.wait([self._running], timeout=seconds)
        if self._unwritten is not None:
            await self.look()

    async def _renew(self) -> None:
        """Starts the renewal's process and takes what it could not write."""
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, str(front_door())],
                stdin=subprocess.PIPE,  # secrets have no place in a command line
                stdout=subprocess.PIPE,
                start_new_session=True,  # no signal that is for the service
            )
            assert process.stdin is not None and process.stdout is not None
            with process.stdin as pipe:
                pipe.write(json.dumps([str(self._file.path), asdict(self._account)]).encode())
        except OSError as error:
            self._complain(f"The LongBridge token cannot be renewed ({type(error).__name__})")
            return
        while process.poll() is None:
            await asyncio.sleep(0.05)
        with process.stdout as answer:
            unwritten = answer.read()
        if unwritten:
            self._unwritten = Token(**json.loads(unwritten))
            self._file.keep(self._unwritten)
        elif process.returncode:  # killed where memory ran out, say, perhaps before it wrote
            log.critical(
                "The process that renews the LongBridge token died (%s): the token in %s goes on "
                "while it is accepted; if it is not, put a new one there",
                process.returncode,
                self._file.path,
            )

    def _write(self, renewal: Renewal, token: Token) -> None:
        if write(renewal, token):
            self._unwritten = None


# --- the renewal's own process ------------------------------------------------------------------
_BOOTSTRAP = f"""{LOADER}
from httptrading.brokers.longbridge_renewal import main
main()
"""


def main() -> None:
    """Renews once, whatever becomes of those who wait for it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING)
    path, account = json.load(sys.stdin)
    file = Path(path)
    unwritten = asyncio.run(renew(file, Account(**account)))
    if unwritten is not None:
        try:
            os.write(1, json.dumps(asdict(unwritten)).encode())
        except OSError:  # nobody is left who could write it later
            _write_somehow(file, account["app_key"], unwritten)


async def renew(path: Path, account: Account) -> Token | None:
    """The new token if it could not be written."""
    with Renewal(path, account.app_key) as renewal:
        old = renewal.token
        if old is None:
            return None
        rest = LongPortRest(account.http_url, account.app_key, account.app_secret, lambda: old.text)
        end = datetime.now(UTC) + GRANT
        query = {"expired_at": end.isoformat(timespec="milliseconds").replace("+00:00", "Z")}
        try:
            renewal.begin()
            async with asyncio.timeout(RENEWAL_SECONDS):
                data = await rest.request("GET", "/v1/token/refresh", query)
            new = parse_grant(data, end.timestamp())
            return None if write(renewal, new) else new
        except TokenFileError as error:
            log.error("%s", error)
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
                path,
            )
        finally:
            rest.close()
    return None


def write(renewal: Renewal, token: Token) -> bool:
    """Whether it is on disk now."""
    try:
        renewal.write(token)
    except (OSError, TokenFileError) as error:
        log.critical(
            "The renewed LongBridge token could not be written (%s): it lives in memory only, and "
            "writing is tried again",
            type(error).__name__,
        )
        return False
    log.warning(
        "The LongBridge token was renewed; it is good until %s",
        datetime.fromtimestamp(token.expiry, UTC),
    )
    return True


def _write_somehow(path: Path, app_key: str, token: Token) -> None:
    end = time.monotonic() + RENEWAL_SECONDS
    while time.monotonic() < end:
        with Renewal(path, app_key) as renewal:
            if renewal.is_held and write(renewal, token):
                return
        time.sleep(0.5)
