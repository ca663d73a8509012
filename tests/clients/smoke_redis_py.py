"""redis-py against a running kvdb: `python smoke_redis_py.py PORT`. Sync and asyncio, RESP2 and RESP3."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import redis
import redis.asyncio


def check(actual: Any, expected: Any) -> None:
    if actual != expected:
        raise AssertionError(f"{actual!r} is not {expected!r}")


def sync(port: int, protocol: int) -> None:
    client = redis.Redis(port=port, protocol=protocol, decode_responses=True)
    client.flushall()
    check(client.ping(), True)
    check(client.set("s", "ü", ex=100), True)
    check((client.get("s"), client.ttl("s") > 90, client.exists("s", "none")), ("ü", True, 1))
    check(client.set("s", "x", nx=True), None)
    check(client.incrbyfloat("f", 1.5), 1.5)
    check(client.hset("h", mapping={"a": 1, "b": 2}), 2)
    check((client.hgetall("h"), client.hmget("h", "a", "c")), ({"a": "1", "b": "2"}, ["1", None]))
    check(client.zadd("z", {"a": 1, "b": 2.5}), 2)
    pairs = [tuple(pair) for pair in client.zrange("z", 0, -1, withscores=True)]
    check((pairs, client.zscore("z", "b")), ([("a", 1.0), ("b", 2.5)], 2.5))
    check(sorted(client.scan_iter("*")), ["f", "h", "s", "z"])
    check(dict(client.hscan_iter("h")), {"a": "1", "b": "2"})
    with client.pipeline(transaction=True) as pipe:
        pipe.watch("s")
        pipe.multi()
        pipe.set("s", "1").incr("s")
        check(pipe.execute(), [True, 2])
    pubsub = client.pubsub(ignore_subscribe_messages=True)
    pubsub.subscribe("c")
    while client.publish("c", "hello") == 0:
        pass
    message = None
    while message is None:
        message = pubsub.get_message(timeout=5)
    check(message["data"], "hello")
    pubsub.close()
    check(client.info("server")["redis_mode"], "standalone")
    check(client.config_get("port")["port"], str(port))
    check(client.client_setname("smoke") and client.client_getname(), "smoke")
    check(client.type("z"), "zset")
    try:
        client.execute_command("NOSUCH", "x")
    except redis.ResponseError as error:
        check("unknown command" in str(error), True)
    try:
        client.hget("s", "x")
    except redis.ResponseError as error:
        check(str(error).startswith("WRONGTYPE"), True)
    lock = client.client_list()
    check(any(row["name"] == "smoke" for row in lock), True)
    big = bytes(range(256)) * 8192
    raw = redis.Redis(port=port, protocol=protocol)
    check((raw.set("big", big), raw.get("big") == big), (True, True))
    raw.close()
    client.close()


async def with_asyncio(port: int, protocol: int) -> None:
    client = redis.asyncio.Redis(port=port, protocol=protocol, decode_responses=True)
    await client.flushall()
    check(await client.set("a", 1), True)
    check(await asyncio.gather(*[client.incr("a") for _ in range(50)]) != [], True)
    check(await client.get("a"), "51")
    async with client.pipeline(transaction=True) as pipe:
        check(await pipe.set("b", 2).get("b").execute(), [True, "2"])
    pubsub = client.pubsub()
    await pubsub.psubscribe("n*")
    await pubsub.get_message(timeout=5)
    await client.publish("news", "hi")
    message = await pubsub.get_message(timeout=5)
    check(message is not None and message["data"], "hi")
    await pubsub.aclose()
    await client.aclose()


def main(port: int) -> None:
    for protocol in (2, 3):
        sync(port, protocol)
        asyncio.run(with_asyncio(port, protocol))
    sys.stdout.write("redis-py: all right\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
