"""ACL files: one `user NAME rule ...` line each, read and written whole."""

from __future__ import annotations

import os
from pathlib import Path

from kvdb.acl import RuleError, User
from kvdb.errors import KvdbError


def read_users(text: bytes, where: str) -> dict[bytes, User]:
    """The users of a file's text. Raises KvdbError naming the line; a file is taken whole or not at all."""
    users: dict[bytes, User] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith(b"#"):
            continue
        if len(words) < 2 or words[0].lower() != b"user":
            raise KvdbError(f"{where}:{number}: should start with user keyword followed by a username")
        if words[1] in users:
            raise KvdbError(f"{where}:{number}: user '{words[1].decode('utf-8', 'replace')}' is defined twice")
        user = User(words[1])
        for rule in words[2:]:
            try:
                user.apply(rule)
            except RuleError as error:
                raise KvdbError(f"{where}:{number}: {rule.decode('utf-8', 'replace')}: {error}") from None
        users[words[1]] = user
    return users


def load(path: Path) -> dict[bytes, User]:
    """Read an ACL file. Raises KvdbError."""
    try:
        return read_users(path.read_bytes(), str(path))
    except OSError as error:
        raise KvdbError(f"cannot read the ACL file {path}: {error.strerror}") from None


def save(path: Path, users: dict[bytes, User]) -> None:
    """Replace an ACL file in one step. Raises KvdbError; then the old file is as it was."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(b"".join(user.line() + b"\n" for user in users.values()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise KvdbError(f"There was an error trying to save the ACLs: {error.strerror}") from None
