"""The LangGraph saver against a real daemon with dsv4-nano."""

from __future__ import annotations

import asyncio
import operator
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import BaseCheckpointSaver, empty_checkpoint
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import END, START, StateGraph

import kvdb
from kvdb.langgraph import KVDBSaver
from kvdb.langgraph.keys import Keys, Place
from kvdb.langgraph.values import BLOCK_BYTES, decode_head, encode_value
from kvdb_tools.daemon import Daemon

EXAMPLE = Path(__file__).parents[3] / "examples" / "langgraph_agent.py"


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("langgraph") / "data") as running:
        yield running


@pytest.fixture
def client(daemon: Daemon) -> Iterator[kvdb.Client]:
    with kvdb.Client("127.0.0.1", daemon.port) as found:
        found.flushall()
        yield found


@pytest.fixture
def saver(client: kvdb.Client) -> KVDBSaver:
    return KVDBSaver(client)


def config_of(thread: str, **more: Any) -> RunnableConfig:
    return {"configurable": {"thread_id": thread, **more}}


def keys_of(client: kvdb.Client, pattern: str) -> set[str]:
    return {key.decode() for key in client.scan_iter(match=pattern, count=1000)}


# -- conformance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [kvdb.Client, kvdb.AsyncClient])
def test_conformance(daemon: Daemon, make: Callable[..., Any]) -> None:
    @checkpointer_test(name=f"KVDBSaver({make.__name__})")
    async def savers() -> AsyncIterator[BaseCheckpointSaver[str]]:
        yield KVDBSaver(make("127.0.0.1", daemon.port))

    report = asyncio.run(validate(savers))
    assert report.conformance_level() == "FULL"
    assert {name: (found.tests_passed, found.tests_failed) for name, found in report.results.items()} == {
        "put": (17, 0),
        "put_writes": (10, 0),
        "get_tuple": (10, 0),
        "list": (16, 0),
        "delete_thread": (5, 0),
        "delete_for_runs": (7, 0),
        "copy_thread": (8, 0),
        "prune": (8, 0),
    }


# -- states ------------------------------------------------------------------------------------------------------------


class Steps(TypedDict):
    seed: int
    texts: Annotated[list[str], operator.add]
    replies: Annotated[list[Any], operator.add]


def write_with(saver: KVDBSaver) -> Callable[[Steps, RunnableConfig], dict[str, Any]]:
    def write(steps: Steps, config: RunnableConfig) -> dict[str, Any]:
        with saver.session(config) as session:
            prompt = session.extend("\n\n") if steps["texts"] else session.prefill("The old clock struck")
            reply = session.generate(5, temperature=1, seed=steps["seed"])
        return {"texts": [reply.text], "replies": [[prompt.reused, prompt.computed, reply.tokens]]}

    return write


def note(steps: Steps) -> dict[str, Any]:
    return {"texts": ["(a tool ran)"]}


def graph_of(saver: KVDBSaver, n_texts: int = 6) -> Any:
    """write, note, write, note ... until there are enough texts."""
    graph = StateGraph(Steps)
    graph.add_node("write", write_with(saver))
    graph.add_node("note", note)
    graph.add_edge(START, "write")
    graph.add_edge("write", "note")
    graph.add_conditional_edges("note", lambda steps: END if len(steps["texts"]) >= n_texts else "write")
    return graph.compile(checkpointer=saver)


START_VALUES = {"seed": 1, "texts": [], "replies": []}


def history(app: Any, config: RunnableConfig) -> list[Any]:
    return list(app.get_state_history(config))


@pytest.mark.parametrize("durability", ["sync", "async"])
def test_going_back_recomputes_nothing(saver: KVDBSaver, durability: str) -> None:
    app = graph_of(saver)
    first = app.invoke(START_VALUES, config_of("t"), durability=durability)
    past = history(app, config_of("t"))[2]
    assert len(past.values["texts"]) == 4
    again = app.invoke(None, past.config, durability=durability)
    assert again["texts"] == first["texts"]  # the same seed from the same state: the same branch
    other = app.invoke(None, app.update_state(past.config, {"seed": 2}), durability=durability)
    assert other["texts"][:4] == first["texts"][:4]
    assert other["texts"][4] != first["texts"][4]
    for run in (first, again, other):
        # Each step computes its own prompt and nothing else, and stands where the step before it ended.
        ends = [end for _, _, end in run["replies"]]
        assert [reused for reused, _, _ in run["replies"]] == [0, *ends[:-1]]
        assert all(computed <= 2 for _, computed, _ in run["replies"][1:])


def test_every_checkpoint_after_the_first_step_owns_a_state(saver: KVDBSaver, client: kvdb.Client) -> None:
    app = graph_of(saver)
    app.invoke(START_VALUES, config_of("t"))
    tokens = []
    for point in reversed(history(app, config_of("t"))):
        key = saver.state_key(point.config)
        tokens.append(client.snapinfo(key).tokens if key else None)
    assert tokens[:2] == [None, None]  # the input, and the point before the first step
    assert all(tokens[2:])
    assert tokens[2] == tokens[3] < tokens[4] == tokens[5] < tokens[6] == tokens[7]
    assert keys_of(client, "langgraph:next:*") == set()


def test_deleting_and_pruning_free_the_states(saver: KVDBSaver, client: kvdb.Client) -> None:
    app = graph_of(saver)
    app.invoke(START_VALUES, config_of("t"))
    app.invoke(START_VALUES, config_of("u"))
    kept = saver.state_key(app.get_state(config_of("t")).config)
    before = app.get_state(config_of("t")).values
    saver.prune(["t"])
    assert keys_of(client, "langgraph:state:t:*") == {kept}
    assert app.get_state(config_of("t")).values == before
    assert client.restore(kept, "s").recomputed == 0
    other = app.invoke({"seed": 3}, config_of("t"))
    assert other["replies"][-1][0] == client.snapinfo(kept).tokens
    for thread in ("t", "u"):
        saver.delete_thread(thread)
    client.delete("s")
    assert keys_of(client, "*") == set()
    client.store_gc()
    assert client.prefix("The old clock struck") is None


def test_a_copied_thread_has_states_of_its_own(saver: KVDBSaver, client: kvdb.Client) -> None:
    app = graph_of(saver)
    app.invoke(START_VALUES, config_of("t"))
    saver.copy_thread("t", "copy: of t")
    points = history(app, config_of("copy: of t"))
    assert [point.values for point in points] == [point.values for point in history(app, config_of("t"))]
    saver.delete_thread("t")
    assert keys_of(client, "*:t:*") | keys_of(client, "*:t") == set()
    key = saver.state_key(points[2].config)
    assert client.restore(key, "s").tokens == points[2].values["replies"][-1][2]
    branch = app.invoke(None, points[2].config)
    assert branch["texts"] == points[0].values["texts"]


def test_runs_are_deleted_with_their_states(saver: KVDBSaver, client: kvdb.Client) -> None:
    app = graph_of(saver, 2)
    app.invoke(START_VALUES, config_of("t", run_id="r1"))
    n_first = len(keys_of(client, "langgraph:state:*"))
    app.invoke({"seed": 2}, config_of("t", run_id="r2"))
    assert len(keys_of(client, "langgraph:state:*")) > n_first
    saver.delete_for_runs(["r2", "none"])
    assert len(keys_of(client, "langgraph:state:*")) == n_first
    assert app.get_state(config_of("t")).values["seed"] == 1
    saver.delete_for_runs(["r1"])
    assert keys_of(client, "langgraph:*") == {"langgraph:session:t"}


def test_a_session_that_the_config_names_is_taken_at_each_checkpoint(saver: KVDBSaver, client: kvdb.Client) -> None:
    def write(steps: Steps) -> dict[str, Any]:
        return {"texts": [client.session("mine").generate(3, seed=4).text]}

    graph = StateGraph(Steps)
    graph.add_sequence([("one", write), ("two", write)])
    graph.add_edge(START, "one")
    app = graph.compile(checkpointer=saver)
    client.prefill("mine", "Call me")
    config = config_of("t", kvdb_session="mine")
    app.invoke(START_VALUES, config, durability="sync")
    points = history(app, config)
    sizes = [client.snapinfo(saver.state_key(point.config)).tokens for point in reversed(points)]
    first = sizes[0]
    assert sizes == [first, first, first + 3, first + 6]
    client.restore(saver.state_key(points[1].config), "mine", replace=True)
    past = points[1].config["configurable"]["checkpoint_id"]
    again = app.invoke(None, config_of("t", kvdb_session="mine", checkpoint_id=past))
    assert again["texts"] == app.get_state(points[0].config).values["texts"]


def test_a_failed_step_stores_nothing_and_can_be_repeated(saver: KVDBSaver) -> None:
    failures = [RuntimeError("once")]
    write = write_with(saver)

    def flaky(steps: Steps, config: RunnableConfig) -> dict[str, Any]:
        if steps["texts"] and failures:
            with saver.session(config) as session:
                session.generate(3)
                raise failures.pop()
        return write(steps, config)

    def build(node: Any) -> Any:
        graph = StateGraph(Steps)
        graph.add_sequence([("one", node), ("two", node)])
        graph.add_edge(START, "one")
        return graph.compile(checkpointer=saver)

    app = build(flaky)
    with pytest.raises(RuntimeError, match="once"):
        app.invoke(START_VALUES, config_of("t"))
    resumed = app.invoke(None, config_of("t"))
    assert resumed["texts"] == build(write).invoke(START_VALUES, config_of("u"))["texts"]


def test_what_session_refuses(saver: KVDBSaver, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="needs the config that LangGraph passes"), saver.session(config_of("t")):
        pass
    monkeypatch.setattr("kvdb.langgraph.STATE_TIMEOUT_S", 0.05)
    with pytest.raises(RuntimeError, match="durability"):
        graph_of(saver).invoke(START_VALUES, config_of("t"), durability="exit")

    def nested(steps: Steps, config: RunnableConfig) -> dict[str, Any]:
        with saver.session(config), saver.session(config):
            return {}

    graph = StateGraph(Steps)
    graph.add_node("nested", nested)
    graph.add_edge(START, "nested")
    with pytest.raises(RuntimeError, match="is open in another step"):
        graph.compile(checkpointer=saver).invoke(START_VALUES, config_of("t"))
    with pytest.raises(ValueError, match="unknown strategy"):
        saver.prune(["t"], strategy="some")
    with pytest.raises(TypeError, match="asynchronous methods"):
        KVDBSaver(kvdb.AsyncClient("127.0.0.1", daemon.port)).get_tuple(config_of("t"))


async def test_the_asyncio_saver_keeps_states(daemon: Daemon) -> None:
    async with kvdb.AsyncClient("127.0.0.1", daemon.port) as client:
        await client.flushall()
        saver = KVDBSaver(client)

        async def write(steps: Steps, config: RunnableConfig) -> dict[str, Any]:
            async with saver.asession(config) as session:
                await (session.extend("\n\n") if steps["texts"] else session.prefill("The old clock struck"))
                return {"texts": [(await session.generate(5, seed=steps["seed"])).text]}

        graph = StateGraph(Steps)
        graph.add_node("write", write)
        graph.add_edge(START, "write")
        graph.add_conditional_edges("write", lambda steps: END if len(steps["texts"]) > 2 else "write")
        app = graph.compile(checkpointer=saver)
        first = await app.ainvoke(START_VALUES, config_of("t"))
        points = [point async for point in app.aget_state_history(config_of("t"))]
        again = await app.ainvoke(None, points[2].config)
        assert again["texts"] == first["texts"]
        assert await saver.astate_key(points[0].config) is not None


def test_states_in_subgraphs(saver: KVDBSaver, client: kvdb.Client) -> None:
    inner = StateGraph(Steps)
    inner.add_sequence([("a", write_with(saver)), ("b", write_with(saver))])
    inner.add_edge(START, "a")
    outer = StateGraph(Steps)
    outer.add_node("first", write_with(saver))
    outer.add_node("inner", lambda steps, config: {"texts": inner.compile().invoke(steps, config)["texts"][-2:]})
    outer.add_node("last", write_with(saver))
    outer.add_edge(START, "first")
    outer.add_edge("first", "inner")
    outer.add_edge("inner", "last")
    app = outer.compile(checkpointer=saver)
    done = app.invoke(START_VALUES, config_of("t"))
    assert len(done["texts"]) == 4
    points = history(app, config_of("t"))
    tokens = [client.snapinfo(saver.state_key(point.config)).tokens for point in points[:3]]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] - tokens[1] < tokens[1] - tokens[2]  # the subgraph wrote two texts, the last node one


# -- storage -----------------------------------------------------------------------------------------------------------


def test_long_lists_share_their_blocks() -> None:
    serde = JsonPlusSerializer()
    elements = [{"n": n, "text": "x" * 500} for n in range(40)]
    short, long = encode_value(serde, elements[:-1]), encode_value(serde, elements)
    assert short.blocks and set(short.blocks) <= set(long.blocks)
    assert len(long.data) < BLOCK_BYTES + 1000
    assert decode_head(encode_value(serde, [1]).data)[0] is not None  # a short list is a plain value


def stored_bytes(client: kvdb.Client) -> int:
    keys = keys_of(client, "langgraph:value:*") | keys_of(client, "langgraph:block:*")
    return sum(client.strlen(key) for key in keys)


def test_storage_grows_with_what_changed(saver: KVDBSaver, client: kvdb.Client) -> None:
    """A growing message list: the bytes of 40 more steps are those of the first 40, not three times as many."""
    config, messages, sizes = config_of("t", checkpoint_ns=""), [], []
    for step in range(80):
        messages.append({"role": "user", "content": f"{step} " + "word " * 60})
        checkpoint = empty_checkpoint()
        checkpoint["channel_values"] = {"messages": list(messages)}
        version = saver.get_next_version(str(step) if step else None, None)
        checkpoint["channel_versions"] = {"messages": version}
        config = saver.put(config, checkpoint, {"source": "loop", "step": step, "parents": {}}, {"messages": version})
        config["configurable"]["checkpoint_ns"] = ""
        if step in (39, 79):
            sizes.append(stored_bytes(client))
            found = saver.get_tuple(config)
            assert found is not None and found.checkpoint["channel_values"]["messages"] == messages
    assert sizes[1] < 2.3 * sizes[0]
    whole = sum(300 * n for n in range(80))
    assert sizes[1] < whole / 4
    saver.prune(["t"])
    assert saver.get_tuple(config_of("t")).checkpoint["channel_values"]["messages"] == messages
    assert stored_bytes(client) < 80 * 450


def test_a_missing_block_is_an_error_not_a_shorter_list(saver: KVDBSaver, client: kvdb.Client) -> None:
    checkpoint = empty_checkpoint()
    checkpoint["channel_values"] = {"m": ["x" * 3000] * 4}
    checkpoint["channel_versions"] = {"m": "1"}
    config = saver.put(config_of("t", checkpoint_ns=""), checkpoint, {}, {"m": "1"})
    client.delete(*keys_of(client, "langgraph:block:*"))
    with pytest.raises(KeyError, match="is missing"):
        saver.get_tuple(config)


def append_all(items: list[str], writes: Any) -> list[str]:
    return [*items, *(item for write in writes for item in write)]


class Deltas(TypedDict):
    items: Annotated[list[str], DeltaChannel(append_all, snapshot_frequency=3)]


def test_delta_channels_survive_pruning_and_copying(saver: KVDBSaver) -> None:
    graph = StateGraph(Deltas)
    graph.add_node("add", lambda state: {"items": [f"n{len(state['items'])}"]})
    graph.add_edge(START, "add")
    app = graph.compile(checkpointer=saver)
    n_made = 0
    for turn in range(5):
        app.invoke({"items": [f"turn {turn}"]}, config_of("t"))
        expected = app.get_state(config_of("t")).values["items"]
        assert len(expected) == 2 * (turn + 1)
        n_made += 2 + (turn > 0)
        saver.copy_thread("t", f"copy {turn}")
        saver.prune(["t"])
        assert app.get_state(config_of("t")).values["items"] == expected
        assert app.get_state(config_of(f"copy {turn}")).values["items"] == expected
    assert len(history(app, config_of("t"))) < n_made / 2


def test_key_names_keep_threads_apart() -> None:
    keys = Keys("p:")
    assert keys.checkpoint(Place("a:b", "", "c")) != keys.checkpoint(Place("a", "b", "c"))
    assert keys.value("t", "n", "c:1", 1) != keys.value("t", "n", "c", "1:1")


def test_the_worked_example(daemon: Daemon) -> None:
    command = [sys.executable, str(EXAMPLE), f"kvdb://127.0.0.1:{daemon.port}"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first, second = (part.split("\n  - ")[1:] for part in out.split("branch:")[1:3])
    assert len(first) == 4
    assert second[:2] == first[:2]
    assert second[2] != first[2]
    assert "computed at each step: [33, 1, 1, 1]" in out
