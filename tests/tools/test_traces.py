"""Traces: the repository's three sessions, Mooncake's format, and tokens that agree where blocks do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from kvdb_tools.traces import Request, Trace, TraceError, read_agent_trace, read_agent_traces, read_mooncake, token_ids

TRACES = Path(__file__).parents[1] / "vectors" / "traces"


def test_the_repository_has_three_sessions() -> None:
    traces = read_agent_traces(TRACES)
    assert [(t.name, t.block_tokens, len(t.requests)) for t in traces] == [
        ("trace_0206", 64, 31),
        ("trace_0298", 64, 20),
        ("trace_0555", 64, 44),
    ]
    for trace in traces:
        times = [request.time_s for request in trace.requests]
        assert times == sorted(times)
        assert all(len(r.blocks) in (r.n_in // 64, r.n_in // 64 + 1) for r in trace.requests)


def test_nested_requests_are_merged_in_order_of_time(tmp_path: Path) -> None:
    inner = {"t": 2, "in": 64, "out": 1, "hash_ids": [1]}
    tree = {
        "id": "x",
        "block_size": 64,
        "requests": [
            {"t": 1, "in": 64, "out": 1, "hash_ids": [1], "subagent": [inner]},
            {"t": 1.5, "in": 128, "out": 1, "hash_ids": [1, 2]},
        ],
    }
    path = tmp_path / "x.json"
    path.write_text(json.dumps(tree))
    assert [request.time_s for request in read_agent_trace(path).requests] == [1, 1.5, 2]


def test_mooncake(tmp_path: Path) -> None:
    path = tmp_path / "moon.jsonl.gz"
    row = {"timestamp": 1500, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}
    path.write_bytes(gzip.compress((json.dumps(row) + "\n\n").encode()))
    assert read_mooncake(path) == Trace("moon", 512, (Request(1.5, 600, 5, (0, 1)),))


@pytest.mark.parametrize("data", [b"{}", b"[1", b"\x1f\x8bgarbage", b'{"requests": 3}'])
def test_what_is_no_trace_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / ("a.json.gz" if data.startswith(b"\x1f") else "a.json")
    path.write_bytes(data)
    with pytest.raises(TraceError, match=r"a\.json"):
        read_agent_trace(path)
    path.write_bytes(b"")
    with pytest.raises(TraceError, match=r"a\.json"):
        read_mooncake(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"no \*\.json"):
        read_agent_traces(tmp_path)
    with pytest.raises(TraceError, match="unreadable"):
        read_agent_trace(tmp_path / "none.json")


def test_answers_continue_into_the_next_prompt() -> None:
    trace = Trace("t", 64, (Request(0, 100, 20, (1, 2)), Request(1, 200, 10, (1, 3, 4, 5)), Request(2, 70, 5, (9, 10))))
    first, answer = token_ids(trace, 0, 1000)
    second, _ = token_ids(trace, 1, 1000)
    assert (len(first), len(answer), len(second)) == (100, 20, 200)
    # Block 2 is half full and unlike block 3: the tokens are those that the next prompt shows there.
    assert np.array_equal(np.concatenate([first, answer]), second[:120])
    other, _ = token_ids(trace, 2, 1000)
    assert not np.array_equal(other[:64], first[:64])
    again, _ = token_ids(trace, 0, 1000)
    assert np.array_equal(first, again) and first.max() < 1000 and first.dtype == np.uint32


def test_an_answer_that_nobody_continues_is_its_own() -> None:
    trace = Trace("t", 64, (Request(0, 128, 200, (1, 2)), Request(1, 128, 200, (1, 2))))
    one, two = token_ids(trace, 0, 1 << 17), token_ids(trace, 1, 1 << 17)
    assert np.array_equal(one[0], two[0]) and len(one[1]) == len(two[1]) == 200
    assert not np.array_equal(one[1], two[1])


def test_every_step_of_a_real_session_begins_with_the_shared_tokens() -> None:
    trace = read_agent_trace(TRACES / "trace_0298.json.gz")
    states = [np.concatenate(token_ids(trace, number, 129280)) for number in range(4)]
    prompts = [token_ids(trace, number, 129280)[0] for number in range(4)]
    for number in range(3):
        a, b = trace.requests[number].blocks, trace.requests[number + 1].blocks
        shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        n = 64 * min(shared, trace.requests[number].n_in // 64)
        assert np.array_equal(states[number][:n], prompts[number + 1][:n])
