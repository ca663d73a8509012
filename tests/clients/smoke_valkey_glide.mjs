// valkey-glide against a running kvdb: `node smoke_valkey_glide.mjs PORT` (npm install @valkey/valkey-glide).
import assert from "node:assert";
import { GlideClient, ProtocolVersion } from "@valkey/valkey-glide";

for (const protocol of [ProtocolVersion.RESP2, ProtocolVersion.RESP3]) {
  const addresses = [{ host: "127.0.0.1", port: Number(process.argv[2]) }];
  const client = await GlideClient.createClient({ addresses, protocol, requestTimeout: 5000 });
  await client.flushall();
  assert.equal(await client.set("s", "x"), "OK");
  assert.equal(await client.get("s"), "x");
  assert.equal(await client.hset("h", { a: "1", b: "2" }), 2);
  assert.equal(await client.hget("h", "b"), "2");
  assert.equal(await client.zadd("z", { a: 1, b: 2.5 }), 2);
  assert.equal(await client.zscore("z", "b"), 2.5);
  assert.equal(await client.expire("s", 100), true);
  assert.ok((await client.ttl("s")) > 90);
  await assert.rejects(client.customCommand(["NOSUCH"]), /unknown command/);
  client.close();
}
console.log("valkey-glide: all right");
process.exit(0);
