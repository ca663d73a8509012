"""Users: who may run which command on which keys."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from kvdb.errors import NoPermError, WrongPassError

if TYPE_CHECKING:
    from kvdb.commands.registry import Bound
    from kvdb.net.client import Client
    from kvdb_protocol.resp import Request


class User:
    """A user. Passwords are kept as SHA-256 in hex."""

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.is_enabled = True
        self.is_nopass = False
        self.passwords: dict[str, None] = {}
        self.is_unrestricted = False

    def accepts(self, password: bytes) -> bool:
        """Whether this password opens the account."""
        return self.is_enabled and (self.is_nopass or hashlib.sha256(password).hexdigest() in self.passwords)


class Acl:
    """All users. `default` is the user of connections that have not authenticated."""

    def __init__(self) -> None:
        self.default = User(b"default")
        self.default.is_nopass = self.default.is_unrestricted = True
        self.users: dict[bytes, User] = {b"default": self.default}

    def set_default_password(self, password: str) -> None:
        """`requirepass`: the default user's only password; empty for none."""
        self.default.passwords = {hashlib.sha256(password.encode()).hexdigest(): None} if password else {}
        self.default.is_nopass = not password

    def authenticate(self, client: Client, name: bytes, password: bytes) -> None:
        """Make `client` this user. Raises WrongPassError."""
        user = self.users.get(name)
        if user is None or not user.accepts(password):
            raise WrongPassError("invalid username-password pair or user is disabled.")
        client.user = user
        client.authenticated = True
        client.update_gate()

    def check(self, client: Client, bound: Bound, request: Request) -> None:
        """Raise NoPermError if the client's user may not run this."""
        raise NoPermError(f"User {client.user.name.decode()} has no permissions")
