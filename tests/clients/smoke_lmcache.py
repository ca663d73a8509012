"""LMCache against a running kvdb: `PYTHON smoke_lmcache.py PORT`, where PYTHON has lmcache (see test_lmcache.py).

Two parts. `lmcache bench l2` stores, looks up and loads chunks through the native `resp` adapter (and through `valkey`
when valkey-glide-sync is installed), with every loaded byte compared to the stored one. It has no `redis` type: that
remote connector (`redis://`, redis-py) is driven directly, and so is `resp://`, both as LMCache's remote back end does:
put, exists, batched contains, get.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

N_CHUNKS = 8
BENCH = ["--no-skip-verify", "--num-keys", "16", "--rounds", "2", "--lookup-max-hit-rate", "0.5", "--format", "json"]


def bench(port: int) -> None:
    adapters: list[dict[str, Any]] = [{"type": "resp", "host": "127.0.0.1", "port": port}]
    if importlib.util.find_spec("glide_sync") is not None:
        adapters.append({"type": "valkey", "startup_nodes": f"127.0.0.1:{port}"})
    program = Path(sys.executable).parent / "lmcache"
    for adapter in adapters:
        command = [str(program), "bench", "l2", "--l2-adapter", json.dumps(adapter), *BENCH]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        # What was measured is a JSON object between progress lines.
        report, _ = json.JSONDecoder().raw_decode(ran.stdout[ran.stdout.index("\n{") + 1 :])
        metrics = report["metrics"]
        parts = [part for part in metrics.values() if "operation" in part]
        assert [part["operation"] for part in parts] == ["Store", "Lookup", "Load"], metrics
        for part in parts:
            wanted = part["total_keys"] // 2 if part["operation"] == "Lookup" else part["total_keys"]
            assert part["total_success"] == wanted and part["rounds_timed_out"] == 0, part
        rates = ", ".join(f"{part['operation'].lower()} {part['duration_p50_ms']} ms" for part in parts)
        print(f"lmcache bench l2, {adapter['type']}: 16 keys of 256 KiB a round, verified; p50 {rates}")


async def connector(url: str) -> None:
    import torch
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.connector import CreateConnector
    from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend

    config = LMCacheEngineConfig.from_defaults(
        chunk_size=256,
        local_cpu=False,
        max_local_cpu_size=0.06,
        remote_url=url,
        extra_config={"save_chunk_meta": False},
    )
    # 4 layers, keys and values, 256 tokens, 8 heads of 64: a chunk of 2 MiB.
    metadata = LMCacheMetadata(
        model_name="smoke", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0,
        kv_dtype=torch.bfloat16, kv_shape=(4, 2, 256, 8, 64), use_mla=False, chunk_size=256,
    )  # fmt: skip
    backend = LocalCPUBackend(config, metadata, dst_device="cpu")
    remote = CreateConnector(url, asyncio.get_running_loop(), backend, config, metadata)
    shape, dtype = metadata.get_shapes()[0], metadata.get_dtypes()[0]
    scheme = url.partition(":")[0]
    keys = [CacheEngineKey("smoke-" + scheme, 1, 0, 1000 + n, dtype) for n in range(N_CHUNKS)]
    stranger = CacheEngineKey("smoke-" + scheme, 1, 0, 7, dtype)
    chunks = [backend.allocate(shape, dtype, MemoryFormat.KV_2LTD) for _ in keys]
    for chunk in chunks:
        chunk.tensor.copy_(torch.randn(shape).to(dtype))
    wanted = [bytes(chunk.byte_array) for chunk in chunks]  # `put` gives the chunks back
    assert not await remote.exists(keys[0])
    await remote.put(keys[0], chunks[0])
    await remote.batched_put(keys[1:], chunks[1:])
    assert [await remote.exists(key) for key in keys] == [True] * N_CHUNKS
    assert not await remote.exists(stranger)
    assert await remote.batched_async_contains("lookup", [*keys, stranger]) == N_CHUNKS
    for key, data in zip(keys, wanted, strict=True):
        found = await remote.get(key)
        assert found is not None and bytes(found.byte_array) == data
        found.ref_count_down()
    # Not closed: its close() waits for tasks of this very loop, which cannot run meanwhile. Ending the loop ends them.
    print(f"lmcache remote connector {scheme}://: {N_CHUNKS} chunks of {len(wanted[0])} bytes, equal")


def main() -> None:
    port = int(sys.argv[1])
    bench(port)
    for scheme in ("redis", "resp"):
        asyncio.run(connector(f"{scheme}://127.0.0.1:{port}"))
    print("lmcache: all right")


if __name__ == "__main__":
    main()
