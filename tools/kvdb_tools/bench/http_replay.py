"""Agent traces through the HTTP gateway: how many of the prompts' tokens come from stored and live states.

A stateless client sends each prompt whole, as token ids, and knows no session. The bound is the trace's own: of each
prompt, the leading blocks that an earlier prompt or answer had. The engine is synthetic, so tokens cost nothing and
only what the gateway finds is measured; its answers are one token long, the trace's answers come with the next prompt.
"""

from __future__ import annotations

import http.client
import time

from kvdb_tools.bench import flash
from kvdb_tools.bench.eviction import trace_directory
from kvdb_tools.bench.http_choices import post
from kvdb_tools.bench.scenario import Bars, Result, Settings
from kvdb_tools.daemon import Daemon, free_port
from kvdb_tools.traces import Trace, read_agent_traces, token_ids

MODEL = "synthetic:dsv4-nano,context=1048576"
N_TRACES = 6
LEAST_SHARE = 0.99  # of what the bound allows; a prompt's last, unfinished group of tokens may be computed


def run(settings: Settings) -> Result:
    """Replay up to six traces, each on a daemon of its own."""
    columns = ("trace", "requests", "prompt tokens", "served %", "bound %", "p50 ms", "p99 ms")
    result = Result("agent traces over HTTP: prompt tokens served from states", columns)
    traces = read_agent_traces(trace_directory(settings))[: 1 if settings.quick else N_TRACES]
    sums = [0, 0, 0, 0]
    for trace in traces:
        served, seen, total, times = _replay(settings, trace)
        sums = [a + b for a, b in zip(sums, (len(times), total, served, seen), strict=True)]
        shares = (100 * served / total, 100 * seen / total)
        p50, p99 = flash.percentile(times, 0.5), flash.percentile(times, 0.99)
        result.rows.append([trace.name, len(times), total, *shares, p50, p99])
        settings.say(f"{trace.name}: {len(times)} requests, {shares[0]:.2f} % of {total:,} tokens served")
    n, total, served, seen = sums
    result.rows.append(["all", n, total, 100 * served / total, 100 * seen / total, None, None])
    claim = f"{100 * served / seen:.2f} % of the tokens that the traces themselves allow were served"
    result.claims.append((claim, served >= LEAST_SHARE * seen))
    result.notes.append("bound: leading blocks of the prompt that an earlier request of the trace had")
    result.bars = Bars("%", ["prompt tokens"], {"served": [100 * served / total], "bound": [100 * seen / total]})
    return result


def _replay(settings: Settings, trace: Trace) -> tuple[int, int, int, list[float]]:
    """(tokens served, tokens that could be, tokens in all, milliseconds of each request)."""
    port = free_port()
    known: set[int] = set()
    served = seen = total = 0
    times = []
    daemon = Daemon(settings.scratch / trace.name, {"model": f"m={MODEL}", "http-port": str(port)})
    with daemon:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        for number, request in enumerate(trace.requests):
            prompt, _ = token_ids(trace, number, 2560)
            body = {"model": "m", "prompt": prompt.tolist(), "max_tokens": 1, "temperature": 0}
            began = time.perf_counter()
            usage = post(connection, "/v1/completions", body)["usage"]
            times.append((time.perf_counter() - began) * 1e3)
            served += usage["prompt_tokens_details"]["cached_tokens"]
            total += usage["prompt_tokens"]
            seen += min(_known_blocks(request.blocks, known) * trace.block_tokens, len(prompt))
            known.update(request.blocks)
    return served, seen, total, times


def _known_blocks(blocks: tuple[int, ...], known: set[int]) -> int:
    return next((n for n, block in enumerate(blocks) if block not in known), len(blocks))
