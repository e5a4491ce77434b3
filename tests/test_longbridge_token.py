"""The LongBridge token file: what is read, what is refused, what survives a rewriting."""

import base64
import json
import os
import stat
import subprocess
import sys
import time
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acceptance.kit import wait_for
from httptrading.brokers.longbridge_token import (
    RENEW_PAUSE,
    Renewal,
    Token,
    TokenFile,
    TokenFileError,
    claims_of,
    parse_token,
    read_token,
    replace_file,
    with_token,
)

FAR = datetime(2099, 1, 1, tzinfo=UTC)
TOKENS = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1).map(
    lambda text: f"m_{text}"
)


def write(path: Path, token: str = "old", expiry: str = "2099-01-01T00:00:00Z") -> Path:
    path.write_text(f'token = "{token}"\nexpiry = {expiry}\n')
    return path


def soon(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def jwt(**claims: object) -> str:
    """A token as LongPort makes them, unsigned."""
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in ({}, claims)]
    return f"m_{parts[0].decode().rstrip('=')}.{parts[1].decode().rstrip('=')}.sign"


@pytest.mark.parametrize(
    "expiry",
    [
        "2099-01-01T00:00:00Z",
        "2099-01-01T08:00:00+08:00",
        "2099-01-01T00:00:00",
        "2099-01-01",
        '"2099-01-01T00:00:00Z"',
        '"2099-01-01T00:00:00.000+00:00"',
        str(int(FAR.timestamp())),
        f"{FAR.timestamp()}",
    ],
)
def test_every_way_to_write_the_expiry(tmp_path: Path, expiry: str) -> None:
    path = write(tmp_path / "token.toml", expiry=expiry)
    token = read_token(path, "key")
    assert token == Token("old", FAR.timestamp())
    rewritten = with_token(path.read_text(), Token("new", FAR.timestamp() + 60))
    assert parse_token(rewritten) == Token("new", FAR.timestamp() + 60)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("token = ", "is not TOML"),
        ("", "no text called token"),
        ("token = 5\nexpiry = 2099-01-01", "no text called token"),
        ('token = "a b"\nexpiry = 2099-01-01', "no text called token"),
        ('token = "a\\nb"\nexpiry = 2099-01-01', "no text called token"),
        ('token = "a"', "no time called expiry"),
        ('token = "a"\nexpiry = true', "no time called expiry"),
        ('token = "a"\nexpiry = "soon"', "no time called expiry"),
        ('token = "a"\nexpiry = inf', "no time called expiry"),
        ('token = "a"\nexpiry = 2020-01-01', "expired at 2020-01-01T00:00:00Z"),
        (f'token = "{jwt(ak="other")}"\nexpiry = 2099-01-01', "another LongBridge app key"),
        ('token = "us_m_eyJh.eyJl.sign"\nexpiry = 2099-01-01', "US data centre"),
        (f'token = "{jwt(exp=1600000000)}"\nexpiry = 2099-01-01', "expired at 2020-09-13"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "token.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TokenFileError, match=words) as raised:
        read_token(path, "key")
    assert "m_" not in str(raised.value)


def test_the_file_may_come_from_an_editor_of_windows(tmp_path: Path) -> None:
    path = tmp_path / "token.toml"
    path.write_text(f'token = "old"\nexpiry = {soon(60)}\n', "utf-8-sig", newline="\r\n")
    assert read_token(path, "key").text == "old"
    with Renewal(path, "key") as renewal:
        renewal.begin()
        renewal.write(Token("new", FAR.timestamp()))
    assert read_token(path, "key") == Token("new", FAR.timestamp())


def test_a_folder_or_latin_text_is_no_token_file(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="cannot be read"):
        read_token(tmp_path, "key")
    (tmp_path / "latin").write_bytes(b'token = "\xe9"')
    with pytest.raises(TokenFileError, match="cannot be read"):
        read_token(tmp_path / "latin", "key")


def test_a_tokens_own_claims() -> None:
    assert claims_of(jwt(exp=5, ak="key")) == {"exp": 5, "ak": "key"}
    for text in ("token", "m_a.b.c", "m_a.YQ.c", "m_a.WzFd.c", "m_.é.x"):
        assert claims_of(text) == {}
    own = Token(jwt(exp=1, ak=""), 2.0)
    assert own.text not in repr(own)


@given(TOKENS, st.integers(0, 4102444800), st.booleans())
def test_rewriting_keeps_everything_else(token: str, expiry: int, crlf: bool) -> None:
    text = (
        "# my token\nnote = 'token = 5'\n"
        'token = "m_old"  # from the site\n\nexpiry=2026-01-01T00:00:00Z # utc\n'
        '[token-history]\ntoken = "older"\nexpiry = 1\n'
    )
    if crlf:
        text = text.replace("\n", "\r\n")
    rewritten = with_token(text, Token(token, float(expiry)))
    assert parse_token(rewritten) == Token(token, float(expiry))
    expected, found = tomllib.loads(text), tomllib.loads(rewritten)
    for name in ("note", "token-history"):
        assert found[name] == expected[name]
    for kept in ("# my token", "# from the site", "# utc"):
        assert kept in rewritten
    assert rewritten.count("\r\n") == text.count("\r\n")
    # Rewriting with the old values once more changes nothing but the spelling.
    assert with_token(rewritten, Token(token, float(expiry))) == rewritten


def test_a_file_that_cannot_be_rewritten_is_left_alone() -> None:
    for text in (
        'token = """a"""\nexpiry = 2099-01-01\n',
        'token = """\na"""\nexpiry = 2099-01-01\n',
        'note = """\ntoken = 5\n"""\ntoken = "a"\nexpiry = 2099-01-01\n',
    ):
        try:
            rewritten = with_token(text, Token("new", FAR.timestamp()))
        except TokenFileError:
            continue
        found = tomllib.loads(rewritten)
        assert found["token"] == "new" and found.get("note") == tomllib.loads(text).get("note")


def test_the_file_is_replaced_whole_with_its_permissions(tmp_path: Path) -> None:
    real = write(tmp_path / "real.toml")
    real.chmod(0o640)
    link = tmp_path / "token.toml"
    link.symlink_to(real)
    replace_file(link, "x = 1\n")
    assert link.is_symlink() and real.read_text() == "x = 1\n"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["real.toml", "token.toml"]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = write(tmp_path / "token.toml")
    script = """
import sys
from pathlib import Path
from httptrading.brokers.longbridge_token import Token, replace_file, with_token
path, number = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    number += 1
    token = Token("t" * 3000 + str(number), 4000000000.0)
    replace_file(path, with_token(path.read_text(), token))
"""
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert writer.stdout is not None and writer.stdout.readline()
        before = path.stat().st_ino
        wait_for(lambda before=before: path.stat().st_ino != before, "the file to be replaced")
        writer.kill()
        writer.communicate()
        assert read_token(path, "key").expiry in (4000000000.0, FAR.timestamp())


class TestTokenFile:
    """One process's view of the file."""

    def test_a_change_is_seen_and_a_passing_fault_is_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path / "token.toml")
        file = TokenFile(path, "key")
        assert file.current().text == "old"
        replace_file(path, 'token = "new"\nexpiry = 2099-01-01T00:00:00Z\n')
        assert file.current().text == "new"
        path.write_text("token =")  # somebody is saving it
        assert file.current().text == "new"
        monkeypatch.setattr(TokenFile, "PATIENCE", -1.0)
        with pytest.raises(TokenFileError, match="is not TOML"):
            file.current()
        path.unlink()
        with pytest.raises(TokenFileError, match="does not exist"):
            file.current()
        write(path, "repaired")
        assert file.current().text == "repaired"

    def test_it_expires_while_it_is_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write(tmp_path / "token.toml", expiry=soon(3600))
        file = TokenFile(path, "key")
        later = file.current().expiry + 0.001
        monkeypatch.setattr(time, "time", lambda: later)
        with pytest.raises(TokenFileError, match="expired"):
            file.current()

    def test_a_token_that_could_not_be_written_is_kept(self, tmp_path: Path) -> None:
        path = write(tmp_path / "token.toml")
        file = TokenFile(path, "key")
        file.keep(Token("unwritten", FAR.timestamp()))
        assert file.current().text == "unwritten"
        replace_file(path, 'token = "by-hand"\nexpiry = 2099-01-01T00:00:00Z\n')
        assert file.current().text == "by-hand"


class TestRenewal:
    """Who may renew, and how often."""

    def test_only_near_its_end(self, tmp_path: Path) -> None:
        path = write(tmp_path / "token.toml", expiry=soon(30 * 86400))
        with Renewal(path, "key") as renewal:
            assert renewal.is_held and renewal.token is None
        write(path, expiry=soon(3600))
        with Renewal(path, "key") as renewal:
            assert renewal.token is not None and renewal.token.text == "old"

    def test_one_at_a_time(self, tmp_path: Path) -> None:
        path = write(tmp_path / "token.toml", expiry=soon(3600))
        with Renewal(path, "key") as first:
            assert first.token is not None
            (link := tmp_path / "link.toml").symlink_to(path)
            for same in (path, link):
                with Renewal(same, "key") as second:
                    assert second.token is None and not second.is_held
        with Renewal(path, "key") as third:
            assert third.token is not None

    def test_not_again_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write(tmp_path / "token.toml", expiry=soon(3600))
        with Renewal(path, "key") as renewal:
            renewal.begin()  # and then it failed
        with Renewal(path, "key") as renewal:
            assert renewal.token is None
        later = time.time() + RENEW_PAUSE + 5
        monkeypatch.setattr(time, "time", lambda: later)
        with Renewal(path, "key") as renewal:
            assert renewal.token is not None

    def test_again_before_the_token_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever is left of it: an ended one can no longer be renewed."""
        end = time.time() + 300
        path = write(tmp_path / "token.toml", expiry=f"{end:.0f}")
        moments = []
        for moment in range(int(end) - 300, int(end), 5):
            monkeypatch.setattr(time, "time", lambda now=moment: float(now))
            with Renewal(path, "key") as renewal:
                if renewal.token is not None:
                    renewal.begin()  # and then it failed
                    moments.append(int(end) - moment)
        assert moments[0] == 300 and 3 < len(moments) < 12, "no storm"
        assert moments[1] > 150 and moments[-1] < 20

    def test_at_once_for_a_file_put_there_by_hand(self, tmp_path: Path) -> None:
        path = write(tmp_path / "token.toml", expiry=soon(3600))
        with Renewal(path, "key") as renewal:
            renewal.begin()
        before = path.stat().st_mtime_ns
        replace_file(path, f'token = "by-hand"\nexpiry = {soon(1800)}\n')
        # On a file system whose clock ticks slowly the two could be of one moment.
        os.utime(path, ns=(before + 10**9, before + 10**9))
        with Renewal(path, "key") as renewal:
            assert renewal.token is not None

    def test_a_short_grant_is_no_storm(self, tmp_path: Path) -> None:
        path = write(tmp_path / "token.toml", expiry=soon(3600))
        with Renewal(path, "key") as renewal:
            renewal.begin()
            renewal.write(Token("new", time.time() + 1800))
        assert read_token(path, "key").text == "new"
        with Renewal(path, "key") as renewal:
            assert renewal.token is None

    def test_refused_before_it_begins_when_it_could_not_end(self, tmp_path: Path) -> None:
        path = tmp_path / "token.toml"
        text = f'token = """\na"""\nexpiry = "{soon(3600)}"\n'
        path.write_text(text)
        with Renewal(path, "key") as renewal:
            assert renewal.token is not None
            with pytest.raises(TokenFileError, match="rewritten"):
                renewal.begin()
        assert path.read_text() == text

    def test_a_missing_file_or_folder_renews_nothing(self, tmp_path: Path) -> None:
        with Renewal(tmp_path / "missing.toml", "key") as renewal:
            assert renewal.token is None
        with pytest.raises(TokenFileError, match="folder writable"):
            with Renewal(tmp_path / "no folder" / "token.toml", "key"):
                pass
