"""ACL and its subcommands."""

from __future__ import annotations

import math
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kvdb import acl, acl_file
from kvdb.commands.dispatch import find
from kvdb.commands.parse import parse_int
from kvdb.commands.registry import handler
from kvdb.errors import KvdbError
from kvdb_protocol.replies import OK, Reply, format_double

if TYPE_CHECKING:
    from kvdb.net.client import Client


@handler("ACL WHOAMI")
def whoami(client: Client, args: list[bytes]) -> Reply:
    """The user of the connection."""
    return client.user.name


@handler("ACL USERS")
def users(client: Client, args: list[bytes]) -> Reply:
    """All names."""
    return sorted(client.server.acl.users)


@handler("ACL LIST")
def list_(client: Client, args: list[bytes]) -> Reply:
    """All users as rules."""
    return [user.line() for _, user in sorted(client.server.acl.users.items())]


@handler("ACL CAT")
def cat(client: Client, args: list[bytes]) -> Reply:
    """The categories, or the commands of one."""
    if len(args) > 1:
        raise KvdbError("wrong number of arguments for 'acl|cat' command")
    if not args:
        return sorted(acl.categories())
    name = args[0].decode("utf-8", "replace").lower()
    if name not in acl.categories():
        raise KvdbError(f"Unknown category '{args[0].decode('utf-8', 'replace')}'")
    return sorted(acl.categories()[name])


@handler("ACL GETUSER")
def getuser(client: Client, args: list[bytes]) -> Reply:
    """A user's flags, passwords, rules; null if there is none."""
    user = client.server.acl.users.get(args[0])
    if user is None:
        return None
    flags = [b"on" if user.is_enabled else b"off"] + ([b"nopass"] if user.is_nopass else [])
    no_selectors: list[Reply] = []
    return {
        "flags": frozenset(flags),
        "passwords": list(user.passwords),
        "commands": user.describe_commands(),
        "keys": b" ".join(pattern.rule() for pattern in user.keys),
        "channels": b" ".join(b"&" + glob for glob in user.channels),
        "selectors": no_selectors,
    }


@handler("ACL SETUSER")
def setuser(client: Client, args: list[bytes]) -> Reply:
    """Create or change a user."""
    name = args[0]
    if any(byte <= 0x20 for byte in name) or not name:
        raise KvdbError("Usernames can't contain spaces or null characters")
    server = client.server
    rules = args[1:]
    if name not in server.acl.users and server.config.text("acl-pubsub-default") == "allchannels":
        rules = [b"allchannels", *rules]
    server.acl.change(name, rules)
    server.refresh_users()
    return OK


@handler("ACL DELUSER")
def deluser(client: Client, args: list[bytes]) -> Reply:
    """How many were deleted; their connections are closed."""
    if b"default" in args:
        raise KvdbError("The 'default' user cannot be removed")
    gone = sum([client.server.acl.users.pop(name, None) is not None for name in args])
    client.server.refresh_users()
    return gone


@handler("ACL DRYRUN")
def dryrun(client: Client, args: list[bytes]) -> Reply:
    """OK, or why the user may not."""
    user = client.server.acl.users.get(args[0])
    if user is None:
        raise KvdbError(f"User '{args[0].decode('utf-8', 'replace')}' not found")
    request = args[1:]
    try:
        bound = find(client.server.commands, request)
    except KvdbError:
        raise KvdbError(f"Command '{request[0].decode('utf-8', 'replace')}' not found") from None
    if not bound.min_args <= len(request) <= bound.max_args:
        raise KvdbError(f"wrong number of arguments for '{acl.wire_name(bound.command)}' command")
    refusal = acl.refused(user, bound.command, request)
    if refusal is None:
        return OK
    reason, thing = refusal
    if reason == "command":
        return acl.message_of(user, bound.command, reason)
    name, shown = user.name.decode("utf-8", "replace"), thing.decode("utf-8", "replace")
    return f"User {name} has no permissions to access the '{shown}' {reason}"


@handler("ACL GENPASS")
def genpass(client: Client, args: list[bytes]) -> Reply:
    """Random hexadecimal digits, 256 bits of them if not said otherwise."""
    bits = parse_int(args[0]) if args else 256
    if not 1 <= bits <= 4096:
        raise KvdbError(
            "ACL GENPASS argument must be the number of bits for the output password, a positive number up to 4096"
        )
    digits = math.ceil(bits / 4)
    return secrets.token_hex(digits // 2 + 1)[:digits]


@handler("ACL LOG")
def log(client: Client, args: list[bytes]) -> Reply:
    """The latest refusals, or RESET."""
    entries = client.server.acl.log.entries
    if args and args[0].upper() == b"RESET":
        entries.clear()
        return OK
    count = parse_int(args[0]) if args else 10
    now = time.time()
    return [
        {
            "count": entry.count,
            "reason": entry.reason,
            "context": entry.context,
            "object": entry.thing,
            "username": entry.user,
            "age-seconds": format_double(round(now - entry.created, 3)),
            "client-info": entry.client_info,
            "entry-id": entry.id,
            "timestamp-created": int(entry.created * 1000),
            "timestamp-last-updated": int(entry.updated * 1000),
        }
        for entry in entries[: max(count, 0)]
    ]


def _file(client: Client) -> Path:
    name = client.server.config.text("aclfile")
    if not name:
        raise KvdbError(
            "This instance is not configured to use an ACL file. You may want to specify users via the ACL SETUSER "
            "command and then issue a CONFIG REWRITE (assuming you have a configuration file set) in order to store "
            "users in the configuration."
        )
    return Path(name).expanduser()


@handler("ACL LOAD")
def load(client: Client, args: list[bytes]) -> Reply:
    """Take the users of the ACL file instead of the present ones, all or none."""
    client.server.acl.replace_all(acl_file.load(_file(client)))
    client.server.refresh_users()
    return OK


@handler("ACL SAVE")
def save(client: Client, args: list[bytes]) -> Reply:
    """Write the users into the ACL file."""
    acl_file.save(_file(client), client.server.acl.users)
    return OK
