"""Who is asking: the key of a request -> the user whose password it is, and what that user may do.

A key is the password of an enabled user (`requirepass` is the default user's). Where the default user needs no
password, requests without a key, or with one that opens no account, are the default user's: SDKs insist on sending one.
A user needs the right to run PREFILL and GENERATE, and to touch the session and snapshot keys that a request names.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from kvdb.acl import Acl, User, message_of, refused
from kvdb.commands.spec import Command
from kvdb.commands.table import TABLE
from kvdb.errors import NoAuthError, NoPermError, WrongPassError

_ROWS = {row.name: row for row in TABLE}
_NEEDED: tuple[Command, ...] = (_ROWS["PREFILL"], _ROWS["GENERATE"])
# What the gateway keeps for itself is under this prefix; a user with any key pattern may use it through the gateway.
PREFIX = "http:"


def key_of(headers: Mapping[str, str]) -> str | None:
    """The key a request carries: `Authorization: Bearer KEY` (OpenAI) or `x-api-key: KEY` (Anthropic)."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key") or None


def user_of(acl: Acl, key: str | None) -> User:
    """The user a key belongs to. Raises NoAuthError without a key, WrongPassError for one that opens nothing."""
    if key is not None:
        data = key.encode()
        for user in acl.users.values():
            if not user.is_nopass and user.accepts(data):
                return user
    default = acl.default
    if default.is_enabled and default.is_nopass:
        return default
    if key is None:
        raise NoAuthError("a key is needed: send it as Authorization: Bearer KEY, or as x-api-key")
    raise WrongPassError("the key opens no account")


def check_local(peer: str | None, asked: str | None) -> None:
    """Raise NoPermError unless a request without a password comes from this machine and is addressed to it.

    peer: the address it comes from, None for a socket without one. asked: the host of its URL. A name that is not
    `localhost` is that of a web page whose owner has let it point here, so that a browser lets the page read answers.
    """
    if peer is not None and not ipaddress.ip_address(peer.partition("%")[0]).is_loopback:
        raise NoPermError("protected mode: no password is set, so only this machine is served; set requirepass")
    if asked is not None and asked != "localhost" and not asked.endswith(".localhost"):
        try:
            ipaddress.ip_address(asked.partition("%")[0])
        except ValueError:
            raise NoPermError(
                f"protected mode: no password is set, so '{asked}' is not served, only localhost and addresses;"
                " set requirepass"
            ) from None


def check(user: User, session: str | None, snapshot: str | None) -> None:
    """Raise NoPermError unless the user may run what an answer takes, on the keys that the request names."""
    requests = [(row, [row.name.encode(), (session or "").encode(), b"TEXT", b""]) for row in _NEEDED]
    if snapshot is not None:
        row = _ROWS["SNAPSHOT"]
        requests.append((row, [row.name.encode(), (session or snapshot).encode(), snapshot.encode()]))
    for row, words in requests:
        found = refused(user, row, words)
        if found is None or (found[0] == "key" and session is None and row is not _ROWS["SNAPSHOT"]):
            continue
        raise NoPermError(message_of(user, row, found[0]))
