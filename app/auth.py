"""Instance id and token before everything else: one way through, whoever asks.

The same number of comparisons of equal cost is made whether the instance exists or not, so that
neither the answer nor its time tells an instance id from a wrong one.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable

TOKEN_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")


class Doorkeeper:
    """Knows the digests of every instance's tokens."""

    def __init__(self, tokens: Iterable[tuple[str, Iterable[str]]]) -> None:
        """Pairs of an instance id and its tokens, plain or `sha256:…`."""
        known = {
            _digest(instance_id): (instance_id, [token_digest(token) for token in its])
            for instance_id, its in tokens
        }
        most = max((len(digests) for _, digests in known.values()), default=1)
        nobody = secrets.token_bytes(32)
        for _, digests in known.values():
            digests.extend([nobody] * (most - len(digests)))
        self._known = known
        self._stranger = ("", [nobody] * most)

    def admits(self, instance_id: str, token: str) -> str | None:
        """The instance id when the token is one of its own, else None."""
        found, digests = self._known.get(_digest(instance_id), self._stranger)
        given = _digest(token)
        matches = 0
        for digest in digests:
            matches |= hmac.compare_digest(digest, given)
        return found if matches and found else None


def token_digest(token: str) -> bytes:
    """The SHA-256 of a token as it stands in a configuration, plain or already a digest."""
    if TOKEN_DIGEST.fullmatch(token):
        return bytes.fromhex(token.removeprefix("sha256:"))
    return hashlib.sha256(token.encode()).digest()


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
