# ruff: noqa: E501  (one line a command in the menu)
"""Random commands on connections and the server, and dialogs: what changes or ends a connection, on one of its own."""

from __future__ import annotations

from collections.abc import Callable

from .compat_menu import Chooser, Words

ACL_RULES = [
    b"on", b"off", b"nopass", b"resetpass", b">secret", b"<secret", b"~app:*", b"%R~in:*", b"%W~out:*", b"resetkeys", b"allkeys",
    b"&news:*", b"resetchannels", b"allchannels", b"+@read", b"-@write", b"+get", b"-set", b"+config|get", b"-@all", b"+@all",
    b"#2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b", b"!2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b",
    b"+nosuch", b"nonsense", b"<absent", b"%X~a", b"#short", b"reset", b"",
]  # fmt: skip
PARAMETERS = [b"hash-max-listpack-entries", b"zset-max-listpack-value", b"maxclients", b"timeout", b"tcp-keepalive", b"databases",
              b"slowlog-max-len", b"slowlog-log-slower-than", b"notify-keyspace-events", b"nosuch", b"appendfsync"]  # fmt: skip
SECTIONS = [
    b"server",
    b"clients",
    b"memory",
    b"stats",
    b"replication",
    b"cpu",
    b"keyspace",
    b"commandstats",
    b"errorstats",
    b"nosuch",
]
CONTAINERS = [b"CLIENT", b"OBJECT", b"PUBSUB", b"CONFIG", b"COMMAND", b"SLOWLOG", b"LATENCY", b"MEMORY", b"ACL"]
LINES = [
    "GET k",
    "SET k v EX 1",
    "MSET a 1 b 2",
    "COPY a b",
    "ZRANGESTORE d s 0 1",
    "PING",
    "HSET h f",
    "NOSUCH x",
    "ZADD z 1 m",
]


def make_admin_command(w: Chooser) -> Words:
    """One random command. None of them changes what commands on data answer."""
    key, rng = w.key, w.rng
    user = rng.choice([b"u1", b"u2", b"nobody", b"default"])
    menu: list[Callable[[], Words]] = [
        lambda: [b"CLIENT", w.pick(b"ID", b"INFO", b"GETREDIR", b"TRACKINGINFO", b"UNPAUSE"), *w.maybe(b"x", chance=0.05)],
        lambda: [b"CLIENT", b"SETINFO", w.pick(b"LIB-NAME", b"LIB-VER", b"BAD"), rng.choice([b"lib", b"a b", b"1.0", b""])],
        lambda: [b"CLIENT", b"LIST", *rng.choice([[], [b"TYPE", w.pick(b"NORMAL", b"PUBSUB", b"BAD")], [b"ID", w.integer()], [b"BAD"]])],
        lambda: [b"CLIENT", b"KILL", *rng.choice([[b"1.2.3.4:5"], [b"ID", b"99999999"], [b"ID", b"0"], [b"ID", b"x"], [b"USER", b"nobody"], [b"TYPE", b"bad"], [b"ADDR", b"1.1.1.1:1"], [b"LADDR", b"1.1.1.1:1"], [b"SKIPME", b"maybe"], [b"ID"], [b"BAD", b"x"]])],
        lambda: [b"CLIENT", w.pick(b"NO-EVICT", b"NO-TOUCH"), rng.choice([b"on", b"off", b"bad"])],
        lambda: [b"CLIENT", b"REPLY", rng.choice([b"ON", b"BAD"])],
        lambda: [b"CLIENT", b"PAUSE", *rng.choice([[b"0"], [b"-1"], [b"x"], [b"0", b"WRITE"], [b"0", b"BAD"]])],
        lambda: [b"CLIENT", b"UNBLOCK", rng.choice([b"1", b"x", b"99999999"]), *w.maybe(w.pick(b"TIMEOUT", b"ERROR", b"BAD"))],
        lambda: [b"CLIENT", b"TRACKING", *rng.choice([[b"OFF"], [b"BAD"], [b"OFF"]])],
        lambda: [b"CLIENT", b"CACHING", rng.choice([b"YES", b"NO"])],
        lambda: [rng.choice(CONTAINERS), b"HELP", *w.maybe(b"x", chance=0.05)],
        lambda: [b"OBJECT", b"FREQ", key()],
        lambda: [b"AUTH", *rng.choice([[b"x"], [b"default", b"x"], [b"nobody", b"x"], [b"u1", b"wrong"], [b"default", b"a", b"b"]])],
        lambda: [b"HELLO", *rng.choice([[], [b"4"], [b"1"], [b"x"], [b"3", b"BAD"], [b"3", b"AUTH", b"nobody", b"x"], [b"2", b"SETNAME", b"a b"], [b"3", b"SETNAME"]])],
        lambda: [b"INFO", *rng.choice([[], [rng.choice(SECTIONS)], [b"everything"]])],
        lambda: [b"CONFIG", b"GET", rng.choice(PARAMETERS), *w.maybe(rng.choice(PARAMETERS))],
        lambda: [b"CONFIG", b"SET", *rng.choice([[b"nosuch", b"1"], [b"databases", b"4"], [b"hash-max-listpack-entries", b"128"], [b"timeout", b"0"], [b"timeout", b"x"], [b"maxclients"], [b"slowlog-max-len", b"128", b"timeout", b"0"]])],
        lambda: [b"CONFIG", w.pick(b"RESETSTAT", b"REWRITE"), *w.maybe(b"x", chance=0.05)],
        lambda: [b"COMMAND", *rng.choice([[b"COUNT"], [b"DOCS", b"get"], [b"DOCS", b"nosuch"], [b"INFO", b"get", b"nosuch"], [b"INFO", b"zadd"], [b"LIST", b"FILTERBY", b"PATTERN", b"hset*"], [b"LIST", b"FILTERBY", b"BAD", b"x"], [b"LIST", b"x"]])],
        lambda: [b"COMMAND", b"GETKEYS", *rng.choice(LINES).encode().split()],
        lambda: [w.pick(b"FLUSHDB", b"FLUSHALL"), rng.choice([b"BAD", b"SYNC x", b"ASYNC", b"SYNC"])] if rng.random() < 0.3 else [b"TIME"],
        lambda: [rng.choice([b"SAVE", b"LASTSAVE", b"TIME", b"ROLE", b"LOLWUT"]), *w.maybe(b"x", chance=0.05)],
        lambda: [b"BGSAVE", *rng.choice([[b"SCHEDULE"], [b"BAD"], [b"SCHEDULE", b"x"]])],
        lambda: [b"SHUTDOWN", *rng.choice([[b"ABORT"], [b"BAD"], [b"SAVE", b"NOSAVE"]])],
        lambda: [b"SLOWLOG", *rng.choice([[b"GET"], [b"GET", b"3"], [b"GET", b"x"], [b"GET", b"-2"], [b"LEN"], [b"RESET"]])],
        lambda: [b"LATENCY", *rng.choice([[b"LATEST"], [b"HISTORY", b"command"], [b"RESET"], [b"RESET", b"x"], [b"DOCTOR"], [b"HISTOGRAM", b"nosuch"], [b"HISTOGRAM", b"get"]])],
        lambda: [b"MEMORY", *rng.choice([[b"USAGE", key()], [b"USAGE", key(), b"SAMPLES", w.integer()], [b"USAGE", key(), b"BAD"], [b"STATS"], [b"DOCTOR"], [b"PURGE"]])],
        lambda: [b"ACL", b"SETUSER", rng.choice([b"u1", b"u2", b"u 3"]), *[rng.choice(ACL_RULES) for _ in range(rng.randint(0, 3))]],
        lambda: [b"ACL", b"DELUSER", rng.choice([b"u1", b"u2", b"nobody", b"default"])],
        lambda: [b"ACL", b"GETUSER", user],
        lambda: [b"ACL", b"DRYRUN", user, *rng.choice([*LINES, "SUBSCRIBE news:1", "CONFIG GET x", "RENAME app:1 out:1", "SET out:1 v GET"]).encode().split()],
        lambda: [b"ACL", *rng.choice([[b"USERS"], [b"LIST"], [b"WHOAMI"], [b"SAVE"], [b"LOAD"], [b"LOG", b"RESET"], [b"LOG", b"1"], [b"LOG", b"x"], [b"CAT"], [b"CAT", b"nosuch"], [b"CAT", b"hash"], [b"GENPASS"], [b"GENPASS", b"32"], [b"GENPASS", b"0"], [b"GENPASS", b"x"]])],
        lambda: [b"DEBUG", rng.choice([b"SLEEP", b"OBJECT", b"JMAP"]), b"0"],
        lambda: [rng.choice([b"UNSUBSCRIBE", b"PUNSUBSCRIBE"]), b"channel"],
        lambda: [b"PUBSUB", *rng.choice([[b"NUMSUB", b"channel"], [b"CHANNELS", b"chan*"], [b"NUMPAT", b"x"], [b"BAD"]])],
    ]  # fmt: skip
    words = rng.choice(menu)()
    return [words[0].lower() if rng.random() < 0.1 else words[0], *words[1:]]


# Each goes out on a fresh connection; everything until the marker's answer or the end is compared.
DIALOGS: list[list[str]] = [
    ["QUIT", "PING"],
    ["QUIT x"],
    ["RESET", "CLIENT GETNAME"],
    ["SELECT 3", "CLIENT SETNAME me", "MULTI", "SET a 1", "RESET", "CLIENT GETNAME", "EXEC"],
    ["CLIENT REPLY SKIP", "PING", "ECHO a"],
    ["CLIENT REPLY OFF", "PING", "SET a 1", "CLIENT REPLY ON", "GET a"],
    ["CLIENT REPLY OFF", "CLIENT REPLY SKIP", "PING", "CLIENT REPLY ON"],
    ["SUBSCRIBE c d", "PING", "PING x", "GET a", "UNSUBSCRIBE c", "UNSUBSCRIBE", "PING", "GET nokey"],
    ["PSUBSCRIBE c* d*", "PUNSUBSCRIBE", "PUNSUBSCRIBE nothing", "PING"],
    ["SUBSCRIBE c", "PSUBSCRIBE c*", "PUBLISH c m", "UNSUBSCRIBE", "PUNSUBSCRIBE", "PUBLISH c m"],
    ["SUBSCRIBE c", "MULTI", "QUIT"],
    ["MULTI", "SUBSCRIBE c", "EXEC", "UNSUBSCRIBE"],
    ["MULTI", "MULTI", "SET a 1", "EXEC"],
    ["MULTI", "NOSUCH", "SET a 1", "EXEC", "GET a"],
    ["MULTI", "WATCH a", "EXEC"],
    ["WATCH a", "SET a 2", "MULTI", "GET a", "EXEC", "MULTI", "GET a", "EXEC"],
    ["HELLO 3", "SUBSCRIBE c", "PUBLISH c m", "GET nokey", "UNSUBSCRIBE"],
    ["HELLO 3 SETNAME me", "CLIENT GETNAME", "HELLO 2", "CLIENT GETNAME"],
    ["MONITOR", "QUIT"],
    ["SUBSCRIBE c", "RESET", "GET nokey"],
    ["SUBSCRIBE c", "CLIENT REPLY OFF", "QUIT"],
    ["EXEC", "DISCARD", "UNWATCH"],
    ["CLIENT NO-EVICT on", "CLIENT TRACKING off", "CLIENT CACHING YES"],
    ["SHUTDOWN ABORT", "SHUTDOWN NOSAVE SAVE"],
]  # fmt: skip
