"""Users: who may run which command, on which keys, and listen to which channels. Rules are those of Redis 7.

A user is changed by applying rules to a copy, which then replaces it: a bad rule changes nothing. What a user may run
is a set of command names, made when the user changes. Invariant: passwords are only ever kept as SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from kvdb.acl_log import AclLog
from kvdb.commands.spec import Command
from kvdb.commands.table import TABLE
from kvdb.errors import KvdbError, NoPermError, WrongPassError
from kvdb.glob import matches

if TYPE_CHECKING:
    from kvdb.commands.registry import Bound
    from kvdb.net.client import Client
    from kvdb_protocol.requests import Request

_HASH = re.compile(rb"[0-9a-f]{64}")
# What Redis says, since its users know these.
_MESSAGES = {
    "syntax": "Syntax error",
    "unknown": "Unknown command or category name in ACL",
    "password": "The password you are trying to remove from the user does not exist",
    "hash": "The password hash must be exactly 64 characters and contain only lowercase hexadecimal characters",
    "keys": (
        "Adding a pattern after the * pattern (or the 'allkeys' flag) is not valid and does not have any effect. "
        "Try 'resetkeys' to start with an empty list of patterns"
    ),
    "channels": (
        "Adding a pattern after the * pattern (or the 'allchannels' flag) is not valid and does not have any effect. "
        "Try 'resetchannels' to start with an empty list of channels"
    ),
}


class RuleError(ValueError):
    """A rule that means nothing; the message is what Redis says of it."""


@dataclass(frozen=True, slots=True)
class KeyPattern:
    """Keys a user may touch: for reading, for writing, or both."""

    glob: bytes
    reads: bool = True
    writes: bool = True

    def rule(self) -> bytes:
        """The pattern as a rule."""
        if self.reads and self.writes:
            return b"~" + self.glob
        return (b"%R~" if self.reads else b"%W~") + self.glob


@lru_cache(maxsize=1)
def all_names() -> frozenset[str]:
    """Every command and subcommand, as `config|get`."""
    return frozenset(wire_name(row) for row in TABLE)


def wire_name(row: Command) -> str:
    """`config|get` for CONFIG GET."""
    return row.name.lower().replace(" ", "|")


@lru_cache(maxsize=1)
def categories() -> dict[str, frozenset[str]]:
    """Commands by category. A container belongs to the categories of its subcommands' rules by name only."""
    found: dict[str, set[str]] = {}
    for row in TABLE:
        for name in row.acl_categories:
            found.setdefault(name, set()).add(wire_name(row))
    return {name: frozenset(rows) for name, rows in found.items()}


@dataclass(slots=True)
class User:
    """A user. `rules`: the command rules as given, in order, for ACL LIST; `allowed`: what they come to."""

    name: bytes
    is_enabled: bool = False
    is_nopass: bool = False
    passwords: tuple[str, ...] = ()
    keys: tuple[KeyPattern, ...] = ()
    channels: tuple[bytes, ...] = ()
    rules: tuple[str, ...] = ("-@all",)
    allowed: frozenset[str] = field(default_factory=frozenset)
    is_unrestricted: bool = False

    def accepts(self, password: bytes) -> bool:
        """Whether this password opens the account."""
        if not self.is_enabled:
            return False
        digest = hashlib.sha256(password).hexdigest()
        return self.is_nopass or any([hmac.compare_digest(digest, known) for known in self.passwords])

    def apply(self, rule: bytes) -> None:
        """Apply one rule; an empty one does nothing. Raises RuleError."""
        word = rule.lower()
        if not word:
            return
        if word in (b"on", b"off"):
            self.is_enabled = word == b"on"
        elif word in (b"nopass", b"resetpass"):
            self.is_nopass, self.passwords = word == b"nopass", ()
        elif word in (b"allkeys", b"~*"):
            self.keys = (KeyPattern(b"*"),)
        elif word == b"resetkeys":
            self.keys = ()
        elif word in (b"allchannels", b"&*"):
            self.channels = (b"*",)
        elif word == b"resetchannels":
            self.channels = ()
        elif word in (b"allcommands", b"+@all"):
            self.rules, self.allowed = ("+@all",), all_names()
        elif word in (b"nocommands", b"-@all"):
            self.rules, self.allowed = ("-@all",), frozenset()
        elif word == b"reset":
            for each in (b"resetpass", b"resetkeys", b"resetchannels", b"off", b"-@all"):
                self.apply(each)
        elif rule[:1] in (b">", b"<", b"#", b"!"):
            self._change_passwords(rule)
        elif rule[:1] in (b"~", b"%"):
            self._add_keys(rule)
        elif rule[:1] == b"&":
            if b"*" in self.channels:
                raise RuleError(_MESSAGES["channels"])
            self.channels = tuple(dict.fromkeys((*self.channels, rule[1:])))
        elif rule[:1] in (b"+", b"-"):
            self._change_commands(rule.decode("utf-8", "replace").lower())
        else:
            raise RuleError(_MESSAGES["syntax"])
        self.is_unrestricted = (
            self.allowed == all_names() and self.keys == (KeyPattern(b"*"),) and self.channels == (b"*",)
        )

    def _change_passwords(self, rule: bytes) -> None:
        kind, text = rule[:1], rule[1:]
        if kind in (b"#", b"!"):
            if not _HASH.fullmatch(text):
                raise RuleError(_MESSAGES["hash"])
            digest = text.decode()
        else:
            digest = hashlib.sha256(text).hexdigest()
        if kind in (b">", b"#"):
            self.passwords = tuple(dict.fromkeys((*self.passwords, digest)))
            self.is_nopass = False
        elif digest not in self.passwords:
            raise RuleError(_MESSAGES["password"])
        else:
            self.passwords = tuple(known for known in self.passwords if known != digest)

    def _add_keys(self, rule: bytes) -> None:
        pattern = KeyPattern(rule[1:])
        if rule[:1] == b"%":
            modes, tilde, glob = rule[1:].upper().partition(b"~")
            if not tilde or not modes or set(modes) - set(b"RW"):
                raise RuleError(_MESSAGES["syntax"])
            pattern = KeyPattern(rule[2 + len(modes) :], b"R" in modes, b"W" in modes)
            del glob
        if KeyPattern(b"*") in self.keys:
            raise RuleError(_MESSAGES["keys"])
        self.keys = tuple(dict.fromkeys((*self.keys, pattern)))

    def _change_commands(self, rule: str) -> None:
        adds, name = rule[0] == "+", rule[1:]
        if name.startswith("@"):
            named = categories().get(name[1:])
            if named is None:
                raise RuleError(_MESSAGES["unknown"])
        elif name not in all_names():
            raise RuleError(_MESSAGES["unknown"])
        else:
            named = frozenset(other for other in all_names() if other == name or other.startswith(name + "|"))
            if "|" in name and adds:  # the container's name alone may be sent, to be told that it needs a subcommand
                named |= {name.partition("|")[0]} & self.allowed
        self.allowed = self.allowed | named if adds else self.allowed - named
        kept = tuple(old for old in self.rules if old[1:] != name and not old[1:].startswith(name + "|"))
        self.rules = (*kept, rule)

    def describe_commands(self) -> str:
        """The command rules, as ACL LIST shows them."""
        return " ".join(self.rules)

    def line(self) -> bytes:
        """The user as rules, as in an ACL file."""
        words = [b"user", self.name, b"on" if self.is_enabled else b"off"]
        words += [b"nopass"] if self.is_nopass else []
        words += [b"#" + digest.encode() for digest in self.passwords]
        words += [pattern.rule() for pattern in self.keys] or []
        # As Redis writes it: an ACL file that says nothing of channels may mean all of them.
        words += [] if b"*" in self.channels else [b"resetchannels"]
        words += [b"&" + glob for glob in self.channels]
        words.append(self.describe_commands().encode())
        return b" ".join(words)


def default_user() -> User:
    """The user of connections that do not authenticate, as it is without any configuration."""
    user = User(b"default")
    for rule in (b"on", b"nopass", b"~*", b"&*", b"+@all"):
        user.apply(rule)
    return user


class Acl:
    """All users, and the log of refusals."""

    def __init__(self) -> None:
        self.users: dict[bytes, User] = {b"default": default_user()}
        self.log = AclLog()

    @property
    def default(self) -> User:
        """The user of connections that have not authenticated."""
        return self.users[b"default"]

    def set_default_password(self, password: str) -> None:
        """`requirepass`: the default user's only password; empty for none."""
        self.change(b"default", [b"resetpass", b">" + password.encode() if password else b"nopass"])

    def change(self, name: bytes, rules: list[bytes]) -> None:
        """ACL SETUSER: apply all rules or none. Raises KvdbError naming the first bad one.

        The user object stays the same one, so that connections see the change at once.
        """
        old = self.users.get(name)
        new = copy(old) if old is not None else User(name)
        for rule in rules:
            try:
                new.apply(rule)
            except RuleError as error:
                raise KvdbError(f"Error in ACL SETUSER modifier '{rule.decode('utf-8', 'replace')}': {error}") from None
        if old is None:
            self.users[name] = new
        else:
            for slot in User.__slots__:
                setattr(old, slot, getattr(new, slot))

    def replace_all(self, users: dict[bytes, User]) -> None:
        """ACL LOAD: these users instead of the present ones; the default user always exists."""
        users.setdefault(b"default", default_user())
        self.users = users

    def authenticate(self, client: Client, name: bytes, password: bytes) -> None:
        """Make `client` this user. Raises WrongPassError."""
        user = self.users.get(name)
        if user is None or not user.accepts(password):
            client.server.statistics.auth_failures += 1
            self.log.add(client, "auth", "toplevel", b"AUTH", name)
            raise WrongPassError("invalid username-password pair or user is disabled.")
        client.user = user
        client.authenticated = True
        client.update_gate()

    def check(self, client: Client, bound: Bound, request: Request) -> None:
        """Raise NoPermError if the client's user may not run this; refusals are logged."""
        refusal = refused(client.user, bound.command, request)
        if refusal is None:
            return
        reason, thing = refusal
        context = "multi" if client.transaction is not None else "toplevel"
        self.log.add(client, reason, context, thing, client.user.name)
        bound.rejected_calls += 1
        raise NoPermError(message_of(client.user, bound.command, reason))


def message_of(user: User, command: Command, reason: str) -> str:
    """Redis' words for a refusal."""
    if reason == "command":
        name = user.name.decode("utf-8", "replace")
        return f"User {name} has no permissions to run the '{wire_name(command)}' command"
    if reason == "key":
        return "No permissions to access a key"
    return "No permissions to access a channel"


def refused(user: User, command: Command, request: Request) -> tuple[str, bytes] | None:
    """Why a user may not run a request: (`command`, `key` or `channel`, the thing), or None if he may."""
    if wire_name(command) not in user.allowed:
        return "command", wire_name(command).encode()
    first, last, step = command.keys
    if first:
        stop = last + 1 if last > 0 else len(request) + last + 1
        for number, key in enumerate(request[first:stop:step]):
            reads, writes = _access(command, number, request)
            if not _may_touch(user, key, reads=reads, writes=writes):
                return "key", key
    if command.name in ("SUBSCRIBE", "PSUBSCRIBE", "PUBLISH"):
        named = request[1:2] if command.name == "PUBLISH" else request[1:]
        for channel in named:
            # A pattern to listen to must itself be one of the allowed ones, as in Redis.
            allowed = channel in user.channels if command.name == "PSUBSCRIBE" else False
            if not allowed and not any(_channel_matches(glob, channel, command.name) for glob in user.channels):
                return "channel", channel
    return None


def _channel_matches(glob: bytes, channel: bytes, command: str) -> bool:
    return glob == b"*" if command == "PSUBSCRIBE" else matches(glob, channel)


# What commands do with their keys, as in Redis' key specifications. Writes that answer nothing of the old value: %W~ is
# enough.
_BLIND_WRITES = frozenset(
    {"SET", "MSET", "SETEX", "PSETEX", "SETNX", "MSETNX", "DEL", "UNLINK", "EXPIRE", "PEXPIRE", "EXPIREAT", "PEXPIREAT",
     "PERSIST", "HSET", "HMSET", "HDEL", "HSETNX", "ZADD", "ZREM", "ZREMRANGEBYRANK", "ZREMRANGEBYSCORE",
     "ZREMRANGEBYLEX", "APPEND", "SETRANGE"}
)  # fmt: skip
# What is not about a value's content: any pattern will do.
_LOOKS = frozenset(
    {"EXISTS", "TYPE", "TTL", "PTTL", "EXPIRETIME", "PEXPIRETIME", "TOUCH", "WATCH", "STRLEN", "HLEN", "HEXISTS",
     "HSTRLEN", "ZCARD"}
)  # fmt: skip
# The first key is read, the others are written.
_COPIES = frozenset({"COPY", "SNAPSHOT", "RESTORE", "FORK"})
_MOVES = frozenset({"RENAME", "RENAMENX"})


def _access(command: Command, number: int, request: Request) -> tuple[bool, bool]:
    """Whether a request reads and whether it writes its key of this number, counted from 0."""
    name = command.name
    if name in _COPIES:
        return number == 0, number > 0
    if name in _MOVES:
        return number == 0, True
    if name == "ZRANGESTORE":
        return number > 0, number == 0
    if name in _LOOKS:
        return False, False
    writes = "write" in command.flag_set
    if name == "SET" and len(request) > 3:
        return any(word.upper() == b"GET" for word in request[3:]), True
    return name not in _BLIND_WRITES, writes


def _may_touch(user: User, key: bytes, *, reads: bool, writes: bool) -> bool:
    return any(
        (pattern.reads or not reads) and (pattern.writes or not writes) and matches(pattern.glob, key)
        for pattern in user.keys
    )
