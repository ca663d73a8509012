// node-redis against a running kvdb: `node smoke_node_redis.mjs PORT` (npm install redis). RESP2 and RESP3.
import assert from "node:assert";
import { createClient } from "redis";

for (const RESP of [2, 3]) {
  const client = createClient({ RESP, socket: { port: Number(process.argv[2]) } });
  await client.connect();
  await client.flushAll();
  assert.equal(await client.set("s", "x", { EX: 100 }), "OK");
  assert.equal(await client.get("s"), "x");
  assert.equal(await client.hSet("h", { a: "1", b: "2" }), 2);
  assert.deepEqual({ ...(await client.hGetAll("h")) }, { a: "1", b: "2" });
  await client.zAdd("z", [{ score: 1, value: "a" }, { score: 2.5, value: "b" }]);
  assert.deepEqual(await client.zRangeWithScores("z", 0, -1), [{ value: "a", score: 1 }, { value: "b", score: 2.5 }]);
  assert.deepEqual(await client.multi().set("n", "1").incr("n").exec(), ["OK", 2]);
  await assert.rejects(client.hGet("s", "f"), /WRONGTYPE/);
  await assert.rejects(client.sendCommand(["NOSUCH"]), /unknown command/);
  const listener = client.duplicate();
  await listener.connect();
  let hear;
  const heard = new Promise((resolve) => { hear = resolve; });
  await listener.subscribe("c", (message) => hear(message));
  assert.equal(await client.publish("c", "hello"), 1);
  assert.equal(await heard, "hello");
  listener.destroy();
  client.destroy();
}
console.log("node-redis: all right");
