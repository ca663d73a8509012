#!/bin/sh
# redis-cli and redis-benchmark against a running kvdb: `sh smoke_redis_cli.sh PORT`.
set -eu
cli() { redis-cli -p "$PORT" "$@"; }
PORT=$1
test "$(cli ping)" = PONG
test "$(cli flushall)" = OK
test "$(cli set k 'a b')" = OK
test "$(cli --no-raw get k)" = '"a b"'
test "$(printf 'incr n\nincr n\nget n\n' | cli | tail -1)" = 2
test "$(printf 'SET p 1\r\nSET q 2\r\n' | cli --pipe | tail -1)" = 'errors: 0, replies: 2'
test "$(cli -3 --json hset h a 1)" = 1
test "$(cli -3 --json hgetall h)" = '{"a":"1"}'
test "$(cli --scan | sort | tr '\n' ' ')" = 'h k n p q '
cli nosuch 2>&1 | grep -q 'unknown command'
cli --bigkeys | grep -q 'Sampled 5 keys'
cli --stat -i 0.01 2>/dev/null | head -2 | grep -q keys
redis-benchmark -p "$PORT" -q -n 2000 -P 4 -t ping,set,get,incr,hset,zadd,mset | grep -c 'requests per second' | grep -q 8
echo 'redis-cli, redis-benchmark: all right'
