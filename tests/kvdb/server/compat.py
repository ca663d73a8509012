"""The same commands to kvdb and to a real redis-server; the replies must be equal, byte by byte.

What may differ is listed in DIFFERENCES, with the reason.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from kvdb.commands.table import TABLE

from .compat_admin import DIALOGS, make_admin_command
from .compat_menu import Chooser, Words, make_command
from .conftest import Tree, Wire, request

BATCH = 100
MARKER = b"--marker--"
NAMES = {row.name for row in TABLE if not row.is_container}
# Not comparable: the rest of the table is, and `run` counts how often.
OWN_GROUPS = {"state", "engine", "store"}
WITHOUT_REDIS = {row.name for row in TABLE if row.group in OWN_GROUPS}

# Why a reply may differ, and what is compared then.
DIFFERENCES = {
    "facts": "HELLO, INFO, CLIENT LIST, TIME, MEMORY, COMMAND DOCS ... are about the server: only types compare",
    "new": "CLIENT SETINFO and NO-TOUCH, the words of ACL DRYRUN, ACL rules shown as given: Redis 7.2, not 7.0",
    "name": "an error that calls the server Redis says so without the name",
    "sanitize": "sanitize-payload is about payloads of Redis' RESTORE: accepted nowhere, shown nowhere",
    "monitor": "MONITOR shows a command before its reply is sent, Redis after: seen by a monitor that sends commands",
    "save": "SAVE and BGSAVE never wait for each other: `Background save already in progress` is Redis' alone",
    "random": "RANDOMKEY, HRANDFIELD and ZRANDMEMBER draw at random: only type and length are compared",
    "order": "KEYS, SCAN and large hashes (a value over 64 bytes is enough) have no order: compared as sets",
    "clock": "TTL and EXPIRETIME: two processes read the clock; 1,500 ms apart at most",
    "idle": "OBJECT IDLETIME: kvdb does not time the uses of plain keys and answers 0",
    "expired": "SET with a moment in the past: Redis counts the key in DBSIZE until it is touched, kvdb deletes it",
    "shared": "OBJECT REFCOUNT: Redis shares small integers (2147483647), kvdb shares no value (1)",
    "encoding": "OBJECT ENCODING: kvdb derives it from the value as it is, Redis from its history (APPEND, deletions)",
}


def same(words: Words, ours: Tree, theirs: Tree) -> bool:
    """Whether two replies to a command are equal, up to DIFFERENCES."""
    if ours == theirs:
        return True
    name = words[0].upper()
    if name in (b"RANDOMKEY", b"HRANDFIELD", b"ZRANDMEMBER"):
        return shape(ours) == shape(theirs)
    if name == b"HSCAN" and theirs[0] == ours[0] == "*" and theirs[1][0] != ("$", b"0"):  # type: ignore[index]
        return True  # Redis gives a part of a large hash, kvdb all of it
    if name in (b"KEYS", b"SCAN", b"HGETALL", b"HKEYS", b"HVALS", b"HSCAN"):
        return flat(ours) == flat(theirs)
    if name == b"OBJECT" and words[1].upper() == b"IDLETIME":
        return ours == (":", b"0") and theirs[0] == ":"
    if name.endswith((b"TTL", b"EXPIRETIME")):
        slack = 1500 if name.startswith(b"P") else 2
        return ours[0] == theirs[0] == ":" and abs(int(ours[1]) - int(theirs[1])) <= slack  # type: ignore[call-overload]
    if name == b"DBSIZE":
        return ours[0] == theirs[0] == ":" and 0 <= int(theirs[1]) - int(ours[1]) <= 3  # type: ignore[call-overload]
    if name == b"OBJECT" and words[1].upper() == b"REFCOUNT":
        return theirs == (":", b"2147483647") and ours == (":", b"1")
    if name == b"OBJECT" and words[1].upper() == b"ENCODING":
        both = {ours[1], theirs[1]}
        return both <= {b"embstr", b"raw", b"int"} or both <= {b"listpack", b"hashtable", b"skiplist"}
    return False


def shape(tree: Tree) -> object:
    kind, value = tree
    return (kind, [shape(item) for item in value]) if isinstance(value, list) else kind


def flat(tree: Tree) -> object:
    value = tree[1]
    if not isinstance(value, list):
        return tree
    return (tree[0], sorted(repr([flat(part) for part in item] if tree[0] == "%" else flat(item)) for item in value))


@dataclass
class Result:
    """How often each command was compared, and what was not equal."""

    counts: Counter[str] = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def name_of(words: Words) -> str:
    """The command's name in the table, with its subcommand; else what was sent."""
    name = words[0].upper().decode("latin1")
    sub = f"{name} {words[1].upper().decode('latin1')}" if len(words) > 1 else name
    return sub if sub in NAMES else name


def run(connect: tuple[Callable[[], Wire], Callable[[], Wire]], resp: int, n_commands: int, seed: int) -> Result:
    """Compare random commands in batches; every tenth batch is of administration, with dialogs between."""
    w = Chooser(random.Random(seed + resp))
    result = Result()
    wires = [connect[0](), connect[1]()]
    for wire in wires:
        wire("FLUSHALL")
        wire("HELLO", resp)
        for user in ("u1", "u2"):
            wire("ACL", "DELUSER", user)
        wire("CONFIG", "SET", "slowlog-log-slower-than", -1)
        for name, value in (("hash-max-listpack-entries", 128), ("slowlog-max-len", 128), ("timeout", 0)):
            wire("CONFIG", "SET", name, value)
    done = 0
    while done < n_commands and len(result.differences) < 200:
        if done // BATCH % 8 == 7:
            batch = [make_admin_command(w) for _ in range(BATCH)]
            compare_alone(wires, batch, result, resp)
            for dialog in w.rng.sample(DIALOGS, 4):
                compare_dialog(connect, dialog, resp, result)
        else:
            batch = [make_command(w) for _ in range(BATCH)]
            compare_batch(wires, batch, result)
        done += BATCH
    for wire in wires:
        wire.close()
    return result


def compare_batch(wires: list[Wire], batch: list[Words], result: Result) -> None:
    """Pipelined commands on data, transactions included."""
    data = b"".join(request(*words) for words in batch)
    for wire in wires:
        wire.raw(data)
    n_before = len(result.differences)
    queued: list[Words] | None = None
    for words in batch:
        mine, yours = wires[0].reply(), wires[1].reply()
        result.counts[name_of(words)] += 1
        if len(result.differences) > n_before:
            continue  # what follows may only follow from it
        name = words[0].upper()
        if name == b"EXEC" and queued is not None and mine[0] == yours[0] == "*" and mine[1] and yours[1]:
            pairs = list(zip(queued, mine[1], yours[1], strict=True))  # type: ignore[call-overload]
        else:
            pairs = [(words, mine, yours)]
        for one, a, b in pairs:
            if not same(one, a, b):
                result.differences.append(f"{one!r}\n    kvdb  {a!r}\n    redis {b!r}")
        if name == b"MULTI" and mine[0] == "+":
            queued = []
        elif name in (b"EXEC", b"DISCARD"):
            queued = None
        elif queued is not None and yours == ("+", b"QUEUED"):
            queued.append(words)
    for wire in wires:
        wire("DISCARD"), wire("SELECT", 0)
        if len(result.differences) > n_before:
            wire("FLUSHALL")


def compare_alone(wires: list[Wire], batch: list[Words], result: Result, resp: int) -> None:
    """Commands on the server, one by one."""
    for words in batch:
        mine, yours = (wire(*words) for wire in wires)
        result.counts[name_of(words)] += 1
        if not same_admin(words, mine, yours):
            result.differences.append(f"{words!r}\n    kvdb  {str(mine)[:600]}\n    redis {str(yours)[:600]}")
        if words[0].upper() == b"HELLO":
            for wire in wires:
                wire("HELLO", resp)


def compare_dialog(
    connect: tuple[Callable[[], Wire], Callable[[], Wire]], lines: list[str], resp: int, result: Result
) -> None:
    """A connection of its own on both sides: all its replies up to the marker's, or to the end."""
    heard = []
    for make in connect:
        wire = make()
        wire("HELLO", resp)
        replies: list[Tree] = []
        try:
            wire.raw(b"".join(request(*line.split()) for line in [*lines, "CLIENT REPLY ON"]) + request("PING", MARKER))
            while not replies or MARKER not in _leaves(replies[-1]):
                replies.append(masked(wire.reply()))
        except OSError:
            replies.append(("closed", None))
        wire.close()
        heard.append(replies)
    for line in lines:
        result.counts[name_of([word.encode() for word in line.split()])] += 1
    if heard[0] != heard[1]:
        result.differences.append(f"dialog {lines} in RESP{resp}\n    kvdb  {heard[0]}\n    redis {heard[1]}")


def _leaves(tree: Tree) -> list[object]:
    value = tree[1]
    if not isinstance(value, list):
        return [value]
    items = [part for pair in value for part in pair] if tree[0] == "%" else value
    return [leaf for item in items for leaf in _leaves(item)]


def masked(tree: Tree) -> Tree:
    """Without what two servers cannot agree on: MONITOR's time and address, the greeting's facts."""
    kind, value = tree
    if kind == "+" and isinstance(value, bytes):
        return (kind, re.sub(rb"^[0-9.]+ \[(\d+) [^]]*\]", rb"T [\1 A]", value))
    if (kind == "%" and "server" in str(value)) or (kind == "*" and "b'server'" in str(value)):
        return (kind, "greeting")
    return tree


# Debian's redis-server is 7.0: there these are compared by the tests of CLIENT alone.
SINCE_7_2 = {"CLIENT SETINFO", "CLIENT NO-TOUCH"}
# How replies of the server are compared: equal unless a word here says otherwise.
ADMIN: dict[str, str] = {
    **dict.fromkeys(["CLIENT ID", "MEMORY USAGE", "LASTSAVE", "COMMAND COUNT", "ACL GENPASS", "HELLO", "CLIENT INFO",
                     "CLIENT LIST", "INFO", "TIME", "LOLWUT", "MEMORY STATS", "MEMORY DOCTOR", "LATENCY DOCTOR",
                     "COMMAND DOCS", "LATENCY HISTOGRAM", "ACL LOG", "ACL CAT", "COMMAND INFO"], "type"),
    **dict.fromkeys([name for name in NAMES if name.endswith(" HELP")], "type"),
    **dict.fromkeys(["COMMAND LIST", "ACL USERS", "CONFIG GET", "ACL LIST"], "order"),
    **dict.fromkeys(["BGSAVE", "SAVE"], "ok"),
    "ACL GETUSER": "user",
    "ACL DRYRUN": "dryrun",
}  # fmt: skip


def same_admin(words: Words, ours: Tree, theirs: Tree) -> bool:
    """Whether replies to a command on the server agree in what they can."""
    name = name_of(words)
    if name in ("ACL LIST", "ACL GETUSER"):
        ours, theirs = without_rules(ours), without_rules(theirs)
    if ours == theirs or (name in SINCE_7_2 and b"unknown subcommand" in (theirs[1] or b"")):  # type: ignore[operator]
        return True
    how = ADMIN.get(name, "equal")
    if ours[0] == theirs[0] == "-":
        # The words of Redis but for its name.
        return ours[1] == theirs[1].replace(b"Redis ", b"")  # type: ignore[attr-defined]
    if how == "dryrun":
        return b"no permissions" in ours[1] and _since_7_2(ours[1]) == theirs[1]  # type: ignore[operator,arg-type]
    if how == "type":
        return _kind(ours) == _kind(theirs)
    if how == "order":
        return ours[0] == theirs[0] and flat(ours) == flat(theirs)
    if how == "ok":
        return ours[0] == theirs[0] or b"in progress" in (theirs[1] or b"")  # type: ignore[operator]
    return False


def without_rules(tree: Tree) -> Tree:
    """Without the command rules, which kvdb and Redis 7.2 keep as they were given and 7.0 makes anew from their sum."""
    kind, value = tree
    if isinstance(value, list):
        items = [tuple(map(without_rules, item)) if kind == "%" else without_rules(item) for item in value]
        if all(item[0] == "$" for item in items):
            items = sorted(item for item in items if item[1])
        return (kind, items)
    return (kind, re.sub(rb"(^| )([+-]\S+|sanitize-payload)", b"", value) if isinstance(value, bytes) else value)


def _since_7_2(text: bytes) -> bytes:
    """The words of 7.0 for a refusal, which name no user and a key."""
    return re.sub(rb"^User \S+ has", b"This user has", text)


def _kind(tree: Tree) -> str:
    """Reply types that differ by value alone are one: a float may be a whole number, a bulk string verbatim."""
    return str(tree[0]) if tree[1] is not None else "nil"
