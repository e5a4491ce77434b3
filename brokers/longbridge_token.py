"""The LongBridge token file: read, checked, watched, and rewritten without ever losing a token.

    token = "m_eyJh…"                    # the access token from the developer centre
    expiry = 2026-11-22T08:00:00Z        # when it ends; a TOML time, an ISO text or epoch seconds

Only file handling is here, no network. Several processes (trading, quotes, pushes, other gateways)
share one file: `Renewal` makes sure that one of them renews, and the others find the result.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import re
import time
import tomllib
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

RENEW_BEFORE = 7 * 86400.0
"""Seconds before its end at which a token is renewed; LongPort grants 90 days by default
(open.longportapp.com/docs/refresh-token-api)."""

RENEW_PAUSE = 600.0
"""Seconds between two attempts to renew, at least; a tenth of the token's remaining life if that is
longer, so that a failing renewal, or a broker that grants short lives, is no storm. Half its
remaining life if that is shorter: a token that has ended can no longer be renewed (401003)."""

US_PREFIX = "us_"
"""How the app key, secret and token of an account in LongBridge's US data centre begin; all others
are of Asia-Pacific (longbridge/openapi v4.5.0, rust/crates/geo/src/lib.rs)."""

US_ACCOUNT = (
    "an account in LongBridge's US data centre (us_…), which is not supported: its orders and "
    "positions are told by requests of their own"
)

_LINE = re.compile(r"^[ \t]*(?P<key>token|expiry|\"token\"|\"expiry\"|'token'|'expiry')[ \t]*=")
_TABLE = re.compile(r"^[ \t]*\[")


class TokenFileError(Exception):
    """Why there is no usable token; the text is for the trader and never holds the token."""


@dataclass(frozen=True)
class Token:
    """An access token and the epoch second at which it ends."""

    text: str
    expiry: float

    def __repr__(self) -> str:
        return f"<Token until {_iso(self.expiry)}>"

    def remaining(self) -> float:
        return self.expiry - time.time()


def read_token(path: Path, app_key: str) -> Token:
    """The token in the file; TokenFileError says what is wrong and what to do about it."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise TokenFileError(
            f"The LongBridge token file {path} does not exist: create it with token = "
            '"…" and expiry = "…" from the developer centre'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise TokenFileError(
            f"The LongBridge token file {path} cannot be read ({type(error).__name__})"
        ) from None
    token = parse_token(text, path)
    if token.text.startswith(US_PREFIX):
        raise TokenFileError(f"The token in {path} is of {US_ACCOUNT}")
    claims = claims_of(token.text)
    owner = claims.get("ak")
    if isinstance(owner, str) and owner and owner != app_key:
        raise TokenFileError(
            f"The token in {path} belongs to another LongBridge app key: put the token of this "
            "instance's app_key there"
        )
    own_end = claims.get("exp")
    if isinstance(own_end, int | float):
        token = Token(token.text, min(token.expiry, float(own_end)))
    if token.remaining() <= 0:
        raise TokenFileError(
            f"The LongBridge token in {path} expired at {_iso(token.expiry)} and can no longer be "
            "renewed: fetch a new one in the developer centre and put it there"
        )
    return token


def parse_token(text: str, path: Path | str = "the token file") -> Token:
    """The two values of the file's text, whatever their age."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise TokenFileError(
            f'The LongBridge token file {path} is not TOML: it needs token = "…" and expiry = "…"'
        ) from None
    token = values.get("token")
    # What HTTP cannot carry in a header cannot be a token.
    if not isinstance(token, str) or not re.fullmatch(r"[!-~]+", token):
        raise TokenFileError(f"The LongBridge token file {path} has no text called token")
    try:
        expiry = epoch_of(values["expiry"])
    except (KeyError, ValueError, OverflowError, OSError):
        raise TokenFileError(
            f"The LongBridge token file {path} has no time called expiry, like 2026-11-22T08:00:00Z"
        ) from None
    return Token(token, expiry)


def epoch_of(value: Any) -> float:
    """Of a time, an ISO text or epoch seconds; ValueError, OverflowError or OSError."""
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if isinstance(value, datetime):
        # A time without a zone is UTC, as the SDK takes it.
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return datetime.fromtimestamp(value, UTC).timestamp()
    raise ValueError("not a time")


def claims_of(token: str) -> dict[str, Any]:
    """What the token says of itself (LongPort's are `m_` and a JWT: `exp`, `ak` the app key);
    empty when it says nothing. Nothing here proves it genuine, that is the broker's business."""
    parts = token.removeprefix("m_").split(".")
    if len(parts) != 3:
        return {}
    try:
        data = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        claims = json.loads(data)
    except (binascii.Error, ValueError):
        return {}
    return claims if isinstance(claims, dict) else {}


def with_token(text: str, token: Token) -> str:
    """The file's text with another token and expiry; everything else, comments too, unchanged.

    TokenFileError when the file is written in a way in which that cannot be done.
    """
    old = tomllib.loads(text)
    kind = old.get("expiry")
    if isinstance(kind, int | float):
        expiry = str(int(token.expiry))
    else:
        expiry = f'"{_iso(token.expiry)}"' if isinstance(kind, str) else _iso(token.expiry)
    new = {"token": f'"{token.text}"', "expiry": expiry}
    lines = text.splitlines(keepends=True)
    end = next((place for place, line in enumerate(lines) if _TABLE.match(line)), len(lines))
    for place, line in enumerate(lines[:end]):
        if found := _LINE.match(line):
            ending = line[len(line.rstrip("\r\n")) :]
            key = found["key"].strip("\"'")
            lines[place] = f"{key} = {new[key]}{_comment(line)}{ending}"
    rewritten = "".join(lines)
    try:
        done = tomllib.loads(rewritten)
        same = parse_token(rewritten) == Token(token.text, float(int(token.expiry)))
    except (tomllib.TOMLDecodeError, TokenFileError):
        done, same = {}, False
    names = ("token", "expiry")
    others = {key: value for key, value in old.items() if key not in names}
    if not same or others != {key: value for key, value in done.items() if key not in names}:
        raise TokenFileError(
            "The LongBridge token file is written in a way that cannot be rewritten safely: "
            "give token and expiry one line each, before any [table]"
        )
    return rewritten


def _comment(line: str) -> str:
    """The comment at the end of a `key = value` line, if its value is a plain one."""
    found = re.match(
        r"^[^=]*=[ \t]*(?:\"[^\"]*\"|'[^']*'|[^\s#\"']+)([ \t]*#[^\r\n]*)$", line.rstrip()
    )
    return found[1] if found else ""


def replace_file(path: Path, text: str) -> None:
    """Puts `text` in the file's place: a crash at any moment leaves the old file or the new one."""
    target = path.resolve()  # a link stays a link
    found = target.stat()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(descriptor)
        os.chmod(temporary, found.st_mode & 0o7777)
        if os.geteuid() == 0:
            os.chown(temporary, found.st_uid, found.st_gid)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


class TokenFile:
    """The file as one process sees it; `current()` is cheap enough to be asked before every call.

    A bad file is taken for a passing one (somebody is just saving it) for `PATIENCE` seconds.
    """

    PATIENCE = 2.0

    def __init__(self, path: Path, app_key: str) -> None:
        self.path = path
        self._app_key = app_key
        self._seen: tuple[int, ...] | None = None
        self._token: Token | None = None
        self._bad_since: float | None = None

    def read(self) -> Token:
        """The token as it is in the file now."""
        self._seen = self._stamp()
        self._token = read_token(self.path, self._app_key)
        self._bad_since = None
        return self._token

    def current(self) -> Token:
        """The token, read again only when the file has changed; TokenFileError as `read()`."""
        if self._token is None:
            return self.read()
        if self._seen != self._stamp() or self._bad_since is not None:
            try:
                return self.read()
            except TokenFileError:
                now = time.monotonic()
                self._bad_since = self._bad_since or now
                if now - self._bad_since > self.PATIENCE or self._token.remaining() <= 0:
                    raise
        if self._token.remaining() <= 0:
            return self.read()  # raises and says so
        return self._token

    def keep(self, token: Token) -> None:
        """Goes on with this token although it could not be written."""
        self._token = token
        self._seen = self._stamp()

    def _stamp(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return (found.st_mtime_ns, found.st_size, found.st_ino)


class Renewal:
    """The right to renew the token, held by one process at a time, and not too often.

    with Renewal(file) as renewal:
        if renewal.token is not None:      # near its end, and nobody else has renewed it
            renewal.begin()                # proves that the answer can be written
            renewal.write(new_token)
    """

    def __init__(self, path: Path, app_key: str) -> None:
        self.token: Token | None = None
        self._path = path
        self._app_key = app_key
        target = path.resolve()  # one lock, whichever link leads to the file
        self._lock_path = target.with_name(f".{target.name}.lock")
        self._lock: int | None = None
        self._locked = False

    def __enter__(self) -> Renewal:
        """Never waits: where another process holds the lock, that one renews. TokenFileError when
        there can be no lock at all."""
        try:
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return self
        except OSError as error:
            raise self._unwritable(error) from None
        self._locked = True
        try:
            token = read_token(self._path, self._app_key)
            if self._is_due(token):
                self.token = token
        except TokenFileError:
            pass  # nothing to renew; whoever uses the token says what is wrong
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)  # which also unlocks
            self._lock, self._locked = None, False

    @property
    def is_held(self) -> bool:
        return self._locked

    def _is_due(self, token: Token) -> bool:
        remaining = token.remaining()
        if remaining > RENEW_BEFORE:
            return False
        # The lock file's content is when somebody last tried, and with which file.
        assert self._lock is not None
        os.lseek(self._lock, 0, os.SEEK_SET)
        tried = os.read(self._lock, 100).decode("ascii", "replace").split()
        if len(tried) != 2 or tried[1] != str(self._path.stat().st_mtime_ns):
            return True  # never tried with this file
        try:
            last = float(tried[0])
        except ValueError:
            return True
        pause = min(max(RENEW_PAUSE, remaining / 10), remaining / 2)
        return not 0 <= time.time() - last < pause

    def begin(self) -> None:
        """Notes the attempt, and proves that a new token could be written; TokenFileError if not.

        The old token dies the moment the broker answers, so this must be known before.
        """
        assert self.token is not None
        try:
            self._note_attempt()
            text = self._path.read_text("utf-8-sig")
            with_token(text, Token("x" * 1000, self.token.expiry))
            replace_file(self._path, text)
            self._note_attempt()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> TokenFileError:
        return TokenFileError(
            f"The LongBridge token cannot be renewed because {self._path} cannot be rewritten "
            f"({type(error).__name__}): make its folder writable"
        )

    def write(self, token: Token) -> None:
        """OSError or TokenFileError when it cannot be written after all."""
        replace_file(self._path, with_token(self._path.read_text("utf-8-sig"), token))
        self._note_attempt()

    def _note_attempt(self) -> None:
        assert self._lock is not None
        note = f"{int(time.time())} {self._path.stat().st_mtime_ns}"
        os.lseek(self._lock, 0, os.SEEK_SET)
        os.write(self._lock, note.ljust(60).encode())


def _iso(epoch: float) -> str:
    return datetime.fromtimestamp(int(epoch), UTC).isoformat().replace("+00:00", "Z")
