"""Random commands on data: mostly right, sometimes of another type or broken, as clients send them."""

from __future__ import annotations

import random
from collections.abc import Callable

Words = list[bytes]

KEYS = [b"k%d" % n for n in range(12)] + [b"", b"key with space", b"\x00\xff\r\n", b"x" * 600]
FIELDS = [b"f%d" % n for n in range(8)] + [b"", b"\xfe\x00"]
TYPED = {
    "string": [b"s%d" % n for n in range(6)],
    "number": [b"n%d" % n for n in range(4)],
    "hash": [b"h%d" % n for n in range(4)],
    "zset": [b"z%d" % n for n in range(4)],
    "lex": [b"l%d" % n for n in range(2)],
}


class Chooser:
    """Random arguments: mostly right, sometimes of another type or broken, as clients send them."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def key(self, kind: str = "any") -> bytes:
        if kind == "lex":  # never another sorted set: ranges by name say nothing when scores differ
            return self.rng.choice([*TYPED["lex"], b"missing"])
        if kind == "any" or self.rng.random() < 0.05:
            return self.rng.choice(KEYS + [key for keys in TYPED.values() for key in keys if key not in TYPED["lex"]])
        return self.rng.choice(TYPED[kind])

    def pick(self, *options: bytes) -> bytes:
        word = self.rng.choice(options)
        return word.lower() if self.rng.random() < 0.2 else word

    def maybe(self, *words: bytes, chance: float = 0.3) -> Words:
        return list(words) if self.rng.random() < chance else []

    def value(self) -> bytes:
        kind = self.rng.random()
        if kind < 0.3:
            return self.integer()
        if kind < 0.9:
            return self.rng.randbytes(self.rng.choice([0, 1, 3, 10, 60, 70]))
        return self.rng.randbytes(self.rng.choice([500, 5000]))

    def integer(self) -> bytes:
        if self.rng.random() < 0.1:
            return self.rng.choice(
                [
                    b"",
                    b"abc",
                    b"1.5",
                    b"01",
                    b"+1",
                    b" 1",
                    b"-0",
                    b"9223372036854775807",
                    b"-9223372036854775808",
                    b"9223372036854775808",
                    b"99999999999999999999",
                    b"1e3",
                    b"-",
                ]
            )
        return b"%d" % self.rng.choice([0, 1, 2, 5, 10, -1, -2, -7, 100, 12345, self.rng.randint(-50, 50)])

    def number(self) -> bytes:
        if self.rng.random() < 0.1:
            return self.rng.choice(
                [
                    b"",
                    b"x",
                    b"inf",
                    b"-inf",
                    b"+inf",
                    b"nan",
                    b"1e400",
                    b"0x10",
                    b"1.",
                    b".5",
                    b" 1",
                    b"1 ",
                    b"infinity",
                    b"-0",
                ]
            )
        return self.rng.choice(
            [
                b"%d" % self.rng.randint(-20, 20),
                b"%.2f" % self.rng.uniform(-9, 9),
                b"0.1",
                b"3.0e3",
                b"1e20",
                b"-2.5",
                b"1e-7",
            ]
        )

    def score_bound(self) -> bytes:
        return self.pick(b"", b"(") + self.rng.choice([b"-inf", b"+inf", self.number()])

    def name_bound(self) -> bytes:
        return self.rng.choice([b"-", b"+", b"[" + self.field(), b"(" + self.field(), b"[" + self.field(), b"bad", b""])

    def field(self) -> bytes:
        return self.rng.choice(FIELDS)

    def many(self, one: Callable[[], Words], least: int = 1, most: int = 4) -> Words:
        return [word for _ in range(self.rng.randint(least, most)) for word in one()]

    def pattern(self) -> bytes:
        return self.rng.choice(
            [b"*", b"k?", b"[a-k]*", b"[^k]*", b"*1", b"k[13]", b"\\k1", b"", b"**2", b"[z-a]?", b"k[", b"*e*"]
        )

    def expiry(self) -> Words:
        far = self.rng.randint(100_000, 200_000)
        return self.rng.choice(
            [
                [b"EX", b"%d" % far],
                [b"PX", b"%d000" % far],
                [b"EXAT", b"4000000000"],
                [b"PXAT", b"4000000000000"],
                [b"EX", b"0"],
                [b"EX", b"-5"],
                [b"EX"],
                [b"PX", b"x"],
                [b"EX", b"9223372036854775807"],
                [b"EXAT", b"1"],
                [b"PXAT", b"1000"],
            ]
        )


def make_command(w: Chooser) -> Words:
    """One random command. The lambdas are grouped as in docs/commands.md."""
    key, rng = w.key, w.rng
    integer, number = w.integer, w.number
    menu: list[Callable[[], Words]] = [
        # strings
        lambda: [b"GET", key("string")],
        lambda: [b"SET", key("string"), w.value()],
        lambda: [
            b"SET",
            key("string"),
            w.value(),
            *w.maybe(b"GET"),
            *w.maybe(w.pick(b"NX", b"XX")),
            *rng.choice([[], [b"KEEPTTL"], w.expiry()]),
        ],
        lambda: [b"MGET", *w.many(lambda: [key("string")])],
        lambda: [b"MSET", *w.many(lambda: [key("string"), w.value()]), *w.maybe(b"odd", chance=0.1)],
        lambda: [b"MSETNX", *w.many(lambda: [key(), w.value()])],
        lambda: [b"SETNX", key("string"), w.value()],
        lambda: [b"SETEX", key("string"), rng.choice([b"1000", b"0", b"-1", b"x"]), w.value()],
        lambda: [b"PSETEX", key("string"), rng.choice([b"1000000", b"0", b"-1", b"x"]), w.value()],
        lambda: [b"GETSET", key("string"), w.value()],
        lambda: [b"GETDEL", key("string")],
        lambda: [b"GETEX", key("string"), *rng.choice([[], [b"PERSIST"], w.expiry(), [b"BAD"]])],
        lambda: [b"APPEND", key("string"), w.value()],
        lambda: [b"STRLEN", key("string")],
        lambda: [w.pick(b"GETRANGE", b"SUBSTR"), key("string"), integer(), integer()],
        lambda: [b"SETRANGE", key("string"), rng.choice([b"0", b"3", b"90", b"-1", b"x", b"536870912"]), w.value()],
        lambda: [b"INCR", key("number")],
        lambda: [b"DECR", key("number")],
        lambda: [b"INCRBY", key("number"), integer()],
        lambda: [b"DECRBY", key("number"), integer()],
        lambda: [b"INCRBYFLOAT", key("number"), number()],
        # hashes
        lambda: [
            w.pick(b"HSET", b"HMSET"),
            key("hash"),
            *w.many(lambda: [w.field(), w.value()]),
            *w.maybe(b"odd", chance=0.05),
        ],
        lambda: [b"HSETNX", key("hash"), w.field(), w.value()],
        lambda: [b"HGET", key("hash"), w.field()],
        lambda: [b"HMGET", key("hash"), *w.many(lambda: [w.field()])],
        lambda: [b"HGETALL", key("hash")],
        lambda: [w.pick(b"HKEYS", b"HVALS"), key("hash")],
        lambda: [b"HLEN", key("hash")],
        lambda: [b"HDEL", key("hash"), *w.many(lambda: [w.field()])],
        lambda: [b"HEXISTS", key("hash"), w.field()],
        lambda: [b"HSTRLEN", key("hash"), w.field()],
        lambda: [b"HINCRBY", key("hash"), w.field(), integer()],
        lambda: [b"HINCRBYFLOAT", key("hash"), w.field(), number()],
        lambda: [
            b"HSCAN",
            key("hash"),
            b"0",
            *w.maybe(b"MATCH", w.pattern()),
            *w.maybe(b"COUNT", rng.choice([b"10000", b"0", b"x"])),
        ],
        lambda: [
            b"HRANDFIELD",
            key("hash"),
            *rng.choice([[], [integer()], [integer(), b"WITHVALUES"], [b"1", b"BAD"]]),
        ],
        # sorted sets
        lambda: [
            b"ZADD",
            key("zset"),
            *w.maybe(w.pick(b"NX", b"XX")),
            *w.maybe(w.pick(b"GT", b"LT")),
            *w.maybe(b"CH"),
            *w.maybe(b"INCR", chance=0.1),
            *w.many(lambda: [number(), w.field()]),
        ],
        lambda: [b"ZADD", rng.choice(TYPED["lex"]), *w.many(lambda: [b"1", w.field()])],
        lambda: [b"ZCARD", key("zset")],
        lambda: [b"ZINCRBY", key("zset"), number(), w.field()],
        lambda: [b"ZSCORE", key("zset"), w.field()],
        lambda: [b"ZMSCORE", key("zset"), *w.many(lambda: [w.field()])],
        lambda: [w.pick(b"ZRANK", b"ZREVRANK"), key("zset"), w.field()],
        lambda: [b"ZREM", key("zset"), *w.many(lambda: [w.field()])],
        lambda: [w.pick(b"ZPOPMIN", b"ZPOPMAX"), key("zset"), *w.maybe(integer())],
        lambda: [
            b"ZRANGE",
            key("zset"),
            integer(),
            integer(),
            *w.maybe(b"REV"),
            *w.maybe(b"WITHSCORES"),
            *w.maybe(b"LIMIT", b"0", b"2", chance=0.1),
        ],
        lambda: [
            b"ZRANGE",
            key("zset"),
            w.score_bound(),
            w.score_bound(),
            b"BYSCORE",
            *w.maybe(b"REV"),
            *w.maybe(b"WITHSCORES"),
            *w.maybe(b"LIMIT", integer(), integer()),
        ],
        lambda: [
            b"ZRANGE",
            key("lex"),
            w.name_bound(),
            w.name_bound(),
            b"BYLEX",
            *w.maybe(b"REV"),
            *w.maybe(b"WITHSCORES", chance=0.1),
            *w.maybe(b"LIMIT", integer(), integer()),
        ],
        lambda: [
            b"ZRANGESTORE",
            key("zset"),
            key("zset"),
            w.score_bound(),
            w.score_bound(),
            b"BYSCORE",
            *w.maybe(b"LIMIT", b"0", integer()),
        ],
        lambda: [b"ZRANGESTORE", key("zset"), key("zset"), integer(), integer(), *w.maybe(b"REV")],
        lambda: [b"ZREVRANGE", key("zset"), integer(), integer(), *w.maybe(b"WITHSCORES")],
        lambda: [
            w.pick(b"ZRANGEBYSCORE", b"ZREVRANGEBYSCORE"),
            key("zset"),
            w.score_bound(),
            w.score_bound(),
            *w.maybe(b"WITHSCORES"),
            *w.maybe(b"LIMIT", integer(), integer()),
        ],
        lambda: [
            w.pick(b"ZRANGEBYLEX", b"ZREVRANGEBYLEX"),
            key("lex"),
            w.name_bound(),
            w.name_bound(),
            *w.maybe(b"LIMIT", integer(), integer()),
        ],
        lambda: [b"ZCOUNT", key("zset"), w.score_bound(), w.score_bound()],
        lambda: [b"ZLEXCOUNT", key("lex"), w.name_bound(), w.name_bound()],
        lambda: [b"ZREMRANGEBYRANK", key("zset"), integer(), integer()],
        lambda: [b"ZREMRANGEBYSCORE", key("zset"), w.score_bound(), w.score_bound()],
        lambda: [b"ZREMRANGEBYLEX", key("lex"), w.name_bound(), w.name_bound()],
        lambda: [b"ZSCAN", key("zset"), b"0", *w.maybe(b"MATCH", w.pattern()), *w.maybe(b"COUNT", integer())],
        lambda: [b"ZRANDMEMBER", key("zset"), *rng.choice([[], [integer()], [integer(), b"WITHSCORES"]])],
        # keys
        lambda: [w.pick(b"DEL", b"UNLINK"), *w.many(lambda: [key()])],
        lambda: [w.pick(b"EXISTS", b"TOUCH"), *w.many(lambda: [key()])],
        lambda: [b"TYPE", key()],
        lambda: [b"KEYS", w.pattern()],
        lambda: [
            b"SCAN",
            b"0",
            b"COUNT",
            b"10000",
            *w.maybe(b"MATCH", w.pattern()),
            *w.maybe(b"TYPE", w.pick(b"string", b"hash", b"zset", b"nope")),
        ],
        lambda: [
            b"SCAN",
            rng.choice([b"x", b"-1", b"0"]),
            *rng.choice([[b"COUNT", b"0"], [b"MATCH"], [b"COUNT", b"x"], [b"BAD", b"x"]]),
        ],
        lambda: [b"RANDOMKEY"],
        lambda: [b"RENAME", key(), key()],
        lambda: [b"RENAMENX", key(), key()],
        lambda: [
            b"COPY",
            key(),
            key(),
            *w.maybe(b"DB", rng.choice([b"0", b"1", b"16", b"x"]), chance=0.2),
            *w.maybe(b"REPLACE"),
        ],
        lambda: [b"MOVE", key(), rng.choice([b"1", b"0", b"99", b"x"])],
        lambda: [
            b"EXPIRE",
            key(),
            rng.choice([b"100000", b"200000", b"-1", b"0", b"x", b"9223372036854775807"]),
            *w.maybe(w.pick(b"NX", b"XX", b"GT", b"LT", b"BAD")),
        ],
        lambda: [
            b"PEXPIRE",
            key(),
            rng.choice([b"100000000", b"-1", b"x"]),
            *w.maybe(w.pick(b"NX", b"XX", b"GT", b"LT")),
        ],
        lambda: [
            b"EXPIREAT",
            key(),
            rng.choice([b"4000000000", b"4000000001", b"1"]),
            *w.maybe(w.pick(b"NX", b"XX", b"GT", b"LT")),
            *w.maybe(w.pick(b"NX", b"GT")),
        ],
        lambda: [b"PEXPIREAT", key(), rng.choice([b"4000000000123", b"4000000001499", b"1", b"9223372036854775807"])],
        lambda: [w.pick(b"TTL", b"PTTL", b"EXPIRETIME", b"PEXPIRETIME"), key()],
        lambda: [b"PERSIST", key()],
        lambda: [b"DBSIZE"],
        lambda: [b"OBJECT", w.pick(b"ENCODING", b"REFCOUNT", b"IDLETIME"), key()],
        # transactions, connection
        lambda: [b"MULTI"],
        lambda: [b"EXEC"],
        lambda: [b"EXEC"],
        lambda: [b"DISCARD"],
        lambda: [b"WATCH", key()],
        lambda: [b"UNWATCH"],
        lambda: [b"PING", *w.maybe(w.value())],
        lambda: [b"ECHO", w.value()],
        lambda: [b"SELECT", rng.choice([b"0", b"0", b"0", b"1", b"16", b"x", b"-1"])],
        lambda: [b"CLIENT", b"SETNAME", rng.choice([b"me", b"a b", b""])],
        lambda: [b"CLIENT", b"GETNAME"],
        # broken
        lambda: [rng.choice([b"NOSUCH", b"get2", b"\xff\x00", b"HGETX"]), *w.many(lambda: [w.value()], 0, 4)],
        lambda: [
            rng.choice([b"GET", b"SET", b"HSET", b"ZADD", b"EXPIRE", b"COPY", b"ZRANGE", b"MULTI"]),
            *w.many(lambda: [key()], 0, 1),
        ],
        lambda: [
            rng.choice([b"OBJECT", b"CLIENT", b"CONFIG", b"PUBSUB"]),
            rng.choice([b"NOPE", b"nope"]),
            *w.many(lambda: [key()], 0, 1),
        ],
        lambda: [rng.choice([b"OBJECT", b"CLIENT", b"CONFIG"])],
        lambda: [b"PUBLISH", b"channel", w.value()],
        lambda: [b"PUBSUB", w.pick(b"CHANNELS", b"NUMPAT", b"NUMSUB")],
    ]
    words = rng.choice(menu)()
    return [words[0].lower() if rng.random() < 0.1 else words[0], *words[1:]]
