// ioredis against a running kvdb: `node smoke_ioredis.mjs PORT` (npm install ioredis).
import assert from "node:assert";
import Redis from "ioredis";

const client = new Redis(Number(process.argv[2]));
await client.flushall();
assert.equal(await client.set("s", "x", "EX", 100), "OK");
assert.equal(await client.get("s"), "x");
assert.equal(await client.hset("h", { a: 1, b: 2 }), 2);
assert.deepEqual(await client.hgetall("h"), { a: "1", b: "2" });
await client.zadd("z", 1, "a", 2.5, "b");
assert.deepEqual(await client.zrange("z", 0, -1, "WITHSCORES"), ["a", "1", "b", "2.5"]);
assert.deepEqual(await client.multi().set("n", 1).incr("n").exec(), [[null, "OK"], [null, 2]]);
await assert.rejects(client.hget("s", "f"), /WRONGTYPE/);
await assert.rejects(client.call("NOSUCH"), /unknown command/);
const listener = client.duplicate();
const heard = new Promise((resolve) => listener.on("message", (_, message) => resolve(message)));
await listener.subscribe("c");
await client.publish("c", "hello");
assert.equal(await heard, "hello");
let seen = 0;
for await (const keys of client.scanStream()) seen += keys.length;
assert.equal(seen, 4);
listener.disconnect();
client.disconnect();
console.log("ioredis: all right");
