"""What the saver does, without I/O: generators that yield the commands to send and get their replies.

Each function here is one operation of the checkpointer, written once for the synchronous and the asyncio saver. It
yields
- `Watch(keys)`: start an optimistic transaction; the operation begins anew if one of the keys changes before its Commit
- a list of commands: send them, get the list of their replies
- `Commit(commands)`: send them as MULTI ... EXEC

Invariant: a checkpoint is visible (in the index) only together with all its values, and its state is a key of its own,
so deleting a checkpoint deletes its state and frees what no other state shares.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgpack
from langgraph.checkpoint.base import WRITES_IDX_MAP, CheckpointTuple, get_checkpoint_metadata, writes_sort_key

from kvdb.langgraph.keys import Keys, Place, member, place_of
from kvdb.langgraph.values import Serde, decode_block, decode_head, encode_value

T = TypeVar("T")
Words = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Watch:
    """Start an optimistic transaction on these keys."""

    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Commit:
    """Send these as one transaction."""

    commands: tuple[Words, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """The snapshot that becomes a checkpoint's state: its key, whether the key is moved or copied, and who took it.

    by: "node" for a step's own session block, "put" for the session that the config names. What a node took stays right
    in the steps after it that run no model; a named session is looked at again at every checkpoint.
    """

    key: str
    is_moved: bool
    by: str


Steps = Generator[Watch | Commit | list[Words], Any, T]


def place_from(config: Mapping[str, Any], checkpoint_id: str) -> Place:
    """The checkpoint a config names."""
    found = config["configurable"]
    return Place(str(found["thread_id"]), found.get("checkpoint_ns", ""), checkpoint_id)


def config_of(place: Place) -> dict[str, Any]:
    """The config that names a checkpoint."""
    return {"configurable": {"thread_id": place.thread, "checkpoint_ns": place.ns, "checkpoint_id": place.id}}


def put(
    keys: Keys,
    serde: Serde,
    config: Mapping[str, Any],
    checkpoint: Mapping[str, Any],
    metadata: Mapping[str, Any],
    new_versions: Mapping[str, Any],
    origin: Origin | None,
) -> Steps[dict[str, Any]]:
    """Store a checkpoint; `origin` says which snapshot becomes its state."""
    place = place_from(config, checkpoint["id"])
    parent = config["configurable"].get("checkpoint_id")
    head = {name: value for name, value in checkpoint.items() if name != "channel_values"}
    values = checkpoint["channel_values"]
    full = get_checkpoint_metadata(config, metadata)  # type: ignore[arg-type]
    registry = keys.values(place.thread)
    # Values are immutable once a version has one, so the same version again changes nothing.
    stored = {
        keys.value(place.thread, place.ns, channel, version): encode_value(serde, values[channel])
        for channel, version in new_versions.items()
        if channel in values
    }
    blocks = {keys.block(place.thread, name): data for value in stored.values() for name, data in value.blocks}
    yield Watch((registry,))
    known: set[str] = set()
    if blocks:
        (scores,) = yield [("ZMSCORE", registry, *blocks)]
        known = {key for key, score in zip(blocks, scores, strict=True) if score is not None}
    written = {key: value.data for key, value in stored.items()}
    written.update({key: data for key, data in blocks.items() if key not in known})
    commands: list[Words] = [("SET", key, data) for key, data in written.items()]
    if written:
        commands.append(("ZADD", registry, *(word for key in written for word in (0, key))))
    kind, data = serde.dumps_typed(head)
    meta_kind, meta_data = serde.dumps_typed(full)
    run = str(full.get("run_id") or "")
    fields: dict[str, Any] = {"type": kind, "checkpoint": data, "meta_type": meta_kind, "metadata": meta_data}
    if parent:
        fields["parent"] = parent
    if run:
        fields["run"] = run
        commands.append(("ZADD", keys.run(run), 0, "\0".join((place.thread, place.ns, place.id))))
    if origin is not None:
        fields["state"] = origin.by
        if origin.key != keys.state(place):
            copy: Words = ("COPY", origin.key, keys.state(place), "REPLACE")
            commands.append(("RENAME", *copy[1:3]) if origin.is_moved else copy)
    commands.append(("HSET", keys.checkpoint(place), *(word for pair in fields.items() for word in pair)))
    commands.append(("ZADD", keys.index(place.thread), 0, member(place.ns, place.id)))
    commands.append(("ZADD", keys.threads, 0, place.thread))
    yield Commit(tuple(commands))
    return config_of(place)


def put_writes(
    keys: Keys,
    serde: Serde,
    config: Mapping[str, Any],
    writes: Sequence[tuple[str, Any]],
    task_id: str,
    task_path: str,
) -> Steps[None]:
    """Store a task's writes. Ordinary writes are kept as first stored; errors and interrupts are replaced."""
    key = keys.writes(place_from(config, config["configurable"]["checkpoint_id"]))
    commands: list[Words] = []
    for position, (channel, value) in enumerate(writes):
        number = WRITES_IDX_MAP.get(channel, position)
        data = msgpack.packb([channel, *serde.dumps_typed(value), task_path])
        commands.append(("HSETNX" if number >= 0 else "HSET", key, f"{task_id}\0{number}", data))
    if commands:
        yield Commit(tuple(commands))


def _pending(serde: Serde, found: Mapping[bytes, bytes]) -> list[tuple[str, str, Any]]:
    rows = []
    for field, data in found.items():
        task_id, _, number = field.decode().partition("\0")
        channel, kind, raw, task_path = msgpack.unpackb(data)
        rows.append((writes_sort_key(task_path, task_id, int(number)), task_id, channel, (kind, raw)))
    rows.sort(key=lambda row: row[0])
    return [(task_id, channel, serde.loads_typed(typed)) for _, task_id, channel, typed in rows]


def _values(keys: Keys, serde: Serde, place: Place, versions: Mapping[str, Any]) -> Steps[dict[str, Any]]:
    """The channel values of a checkpoint. Raises KeyError if a block is missing: a list is never shortened silently."""
    if not versions:
        return {}
    wanted = {channel: keys.value(place.thread, place.ns, channel, version) for channel, version in versions.items()}
    found = yield [("MGET", *wanted.values())]
    result: dict[str, Any] = {}
    for channel, data in zip(wanted, found[0], strict=True):
        if data is None:
            continue  # an empty channel
        plain, block, tail = decode_head(data)
        if plain is not None:
            result[channel] = serde.loads_typed(plain)
            continue
        parts = [tail]
        while block is not None:
            ((raw,),) = yield [("MGET", keys.block(place.thread, block))]
            if raw is None:
                raise KeyError(f"block {block} of channel '{channel}' of thread '{place.thread}' is missing")
            block, elements = decode_block(raw)
            parts.append(elements)
        result[channel] = [serde.loads_typed(typed) for part in reversed(parts) for typed in part]
    return result


def _load(keys: Keys, serde: Serde, place: Place, config: Mapping[str, Any] | None) -> Steps[CheckpointTuple | None]:
    head, writes = yield [("HGETALL", keys.checkpoint(place)), ("HGETALL", keys.writes(place))]
    if not head:
        return None
    checkpoint = serde.loads_typed((head[b"type"].decode(), head[b"checkpoint"]))
    values = yield from _values(keys, serde, place, checkpoint["channel_versions"])
    parent = head.get(b"parent")
    return CheckpointTuple(
        config=dict(config) if config is not None else config_of(place),  # type: ignore[arg-type]
        checkpoint={**checkpoint, "channel_values": values},  # type: ignore[typeddict-item]
        metadata=serde.loads_typed((head[b"meta_type"].decode(), head[b"metadata"])),
        parent_config=config_of(Place(place.thread, place.ns, parent.decode())) if parent else None,  # type: ignore[arg-type]
        pending_writes=_pending(serde, writes),
    )


def latest(keys: Keys, thread: str, ns: str) -> Steps[Place | None]:
    """The newest checkpoint of a namespace."""
    lowest, highest = f"[{ns}\0", f"({ns}\1"
    (found,) = yield [("ZRANGE", keys.index(thread), highest, lowest, "BYLEX", "REV", "LIMIT", 0, 1)]
    return place_of(thread, found[0]) if found else None


def get_tuple(keys: Keys, serde: Serde, config: Mapping[str, Any]) -> Steps[CheckpointTuple | None]:
    """The checkpoint a config names, or the newest of its namespace."""
    checkpoint_id = config["configurable"].get("checkpoint_id")
    if checkpoint_id:
        return (yield from _load(keys, serde, place_from(config, checkpoint_id), config))
    place = yield from latest(keys, str(config["configurable"]["thread_id"]), place_from(config, "").ns)
    return None if place is None else (yield from _load(keys, serde, place, None))


def places(keys: Keys, config: Mapping[str, Any] | None, before: Mapping[str, Any] | None) -> Steps[list[Place]]:
    """The checkpoints that `list` goes through, newest first within a thread."""
    if config is None:
        (threads,) = yield [("ZRANGE", keys.threads, 0, -1)]
        names = [name.decode() for name in threads]
        ns = wanted = None
    else:
        names = [str(config["configurable"]["thread_id"])]
        ns = config["configurable"].get("checkpoint_ns")
        wanted = config["configurable"].get("checkpoint_id")
    cursor = before["configurable"].get("checkpoint_id") if before else None
    result: list[Place] = []
    for thread in names:
        (members,) = yield [("ZRANGE", keys.index(thread), 0, -1)]
        found = [place_of(thread, one) for one in members]
        found = [place for place in found if ns is None or place.ns == ns]
        found = [place for place in found if not wanted or place.id == wanted]
        found = [place for place in found if not cursor or place.id < cursor]
        result += sorted(found, key=lambda place: place.id, reverse=True)
    return result


def load_matching(
    keys: Keys, serde: Serde, place: Place, wanted: Mapping[str, Any] | None
) -> Steps[CheckpointTuple | None]:
    """A checkpoint for `list`: None when it is gone or its metadata does not match."""
    if wanted:
        ((kind, data),) = yield [("HMGET", keys.checkpoint(place), "meta_type", "metadata")]
        if kind is None:
            return None
        metadata = serde.loads_typed((kind.decode(), data))
        if any(name not in metadata or metadata[name] != value for name, value in wanted.items()):
            return None
    return (yield from _load(keys, serde, place, None))


# -- deleting and copying ----------------------------------------------------------------------------------------------


def _run_removals(found: Sequence[tuple[Place, bytes | None]], keys: Keys) -> list[Words]:
    return [("ZREM", keys.run(run.decode()), "\0".join((p.thread, p.ns, p.id))) for p, run in found if run]


def delete_thread(keys: Keys, thread: str) -> Steps[None]:
    """Delete everything of a thread, with its states and its session."""
    index, registry = keys.index(thread), keys.values(thread)
    yield Watch((index, registry))
    members, stored = yield [("ZRANGE", index, 0, -1), ("ZRANGE", registry, 0, -1)]
    found = [place_of(thread, one) for one in members]
    runs = (yield [("HGET", keys.checkpoint(place), "run") for place in found]) if found else []
    doomed = [key for place in found for key in keys.all_of(place)]
    commands: list[Words] = [("UNLINK", index, registry, keys.session(thread), *doomed, *stored)]
    commands += _run_removals(list(zip(found, runs, strict=True)), keys)
    commands.append(("ZREM", keys.threads, thread))
    yield Commit(tuple(commands))


def _reachable(keys: Keys, serde: Serde, kept: Sequence[Place]) -> Steps[set[bytes]]:
    """The value and block keys that these checkpoints stand on."""
    result: set[bytes] = set()
    for place in kept:
        ((kind, data),) = yield [("HMGET", keys.checkpoint(place), "type", "checkpoint")]
        versions = serde.loads_typed((kind.decode(), data))["channel_versions"]
        for channel, version in versions.items():
            key = keys.value(place.thread, place.ns, channel, version)
            if key.encode() in result:
                continue
            ((raw,),) = yield [("MGET", key)]
            if raw is None:
                continue
            result.add(key.encode())
            block = decode_head(raw)[1]
            while block is not None:
                key = keys.block(place.thread, block)
                if key.encode() in result:
                    break
                result.add(key.encode())
                ((raw,),) = yield [("MGET", key)]
                block = decode_block(raw)[0] if raw is not None else None
    return result


def _remove(keys: Keys, serde: Serde, thread: str, doomed: set[Place]) -> Steps[None]:
    """Delete checkpoints of a thread, and the values that no other checkpoint of it stands on."""
    index, registry = keys.index(thread), keys.values(thread)
    yield Watch((index, registry))
    members, stored = yield [("ZRANGE", index, 0, -1), ("ZRANGE", registry, 0, -1)]
    present = [place_of(thread, one) for one in members]
    gone = [place for place in present if place in doomed]
    if not gone:
        return
    kept = [place for place in present if place not in doomed]
    if not kept:
        # As delete_thread, but a session that a run of this thread left behind is the thread's, not the run's.
        values = stored
    else:
        alive = yield from _reachable(keys, serde, kept)
        values = [key for key in stored if key not in alive]
    runs = yield [("HGET", keys.checkpoint(place), "run") for place in gone]
    commands: list[Words] = [("UNLINK", *(key for place in gone for key in keys.all_of(place)), *values)]
    commands.append(("ZREM", index, *(member(place.ns, place.id) for place in gone)))
    if values:
        commands.append(("ZREM", registry, *values))
    commands += _run_removals(list(zip(gone, runs, strict=True)), keys)
    if not kept:
        commands.append(("ZREM", keys.threads, thread))
    yield Commit(tuple(commands))


def run_threads(keys: Keys, run_ids: Sequence[str]) -> Steps[dict[str, set[Place]]]:
    """The checkpoints of some runs, by thread."""
    result: dict[str, set[Place]] = {}
    for run_id in run_ids:
        (found,) = yield [("ZRANGE", keys.run(run_id), 0, -1)]
        for one in found:
            thread, ns, checkpoint_id = one.decode().split("\0")
            result.setdefault(thread, set()).add(Place(thread, ns, checkpoint_id))
    return result


def _needed_ancestors(keys: Keys, serde: Serde, newest: Place, is_delta: frozenset[str]) -> Steps[set[Place]]:
    """The ancestors whose writes rebuild the newest checkpoint's delta channels, back to their last full value."""
    result: set[Place] = set()
    head = yield from _load(keys, serde, newest, None)
    missing = is_delta - set(head.checkpoint["channel_values"]) if head is not None else frozenset()
    while missing and head is not None and head.parent_config is not None:
        place = place_from(head.parent_config, head.parent_config["configurable"]["checkpoint_id"])
        result.add(place)
        head = yield from _load(keys, serde, place, None)
        missing = missing - set(head.checkpoint["channel_values"]) if head is not None else frozenset()
    return result


def prunable(keys: Keys, serde: Serde, thread: str) -> Steps[set[Place]]:
    """What `keep_latest` removes: all but the newest of each namespace and what its delta channels are rebuilt from."""
    (members,) = yield [("ZRANGE", keys.index(thread), 0, -1)]
    found = [place_of(thread, one) for one in members]
    newest: dict[str, Place] = {}
    for place in found:  # the index is sorted, so the last of a namespace wins
        newest[place.ns] = place
    kept = set(newest.values())
    for place in newest.values():
        ((kind, data),) = yield [("HMGET", keys.checkpoint(place), "meta_type", "metadata")]
        metadata = serde.loads_typed((kind.decode(), data))
        delta = frozenset(metadata.get("counters_since_delta_snapshot") or ())
        if delta:
            kept |= yield from _needed_ancestors(keys, serde, place, delta)
    return set(found) - kept


def remove(keys: Keys, serde: Serde, thread: str, doomed: set[Place]) -> Steps[None]:
    """Delete these checkpoints of a thread with their states."""
    yield from _remove(keys, serde, thread, doomed)


def copy_thread(keys: Keys, source: str, target: str) -> Steps[None]:
    """Copy a thread's checkpoints, writes, values and states. A state is copied by name: no page is written."""
    yield Watch((keys.index(source), keys.values(source)))
    members, stored = yield [("ZRANGE", keys.index(source), 0, -1), ("ZRANGE", keys.values(source), 0, -1)]
    if not members:
        return
    found = [place_of(source, one) for one in members]
    heads = yield [("HMGET", keys.checkpoint(place), "state", "run") for place in found]
    copies: list[Words] = []
    for place, (state, run) in zip(found, heads, strict=True):
        other = Place(target, place.ns, place.id)
        copies.append(("COPY", keys.checkpoint(place), keys.checkpoint(other), "REPLACE"))
        copies.append(("COPY", keys.writes(place), keys.writes(other), "REPLACE"))
        if state is not None:
            copies.append(("COPY", keys.state(place), keys.state(other), "REPLACE"))
        if run:
            copies.append(("ZADD", keys.run(run.decode()), 0, "\0".join((target, other.ns, other.id))))
    own = [keys.value(source, "", "", "")[: -len("::")], keys.block(source, "")]
    new = [keys.value(target, "", "", "")[: -len("::")], keys.block(target, "")]
    names: list[str] = []
    for key in stored:
        text = key.decode()
        old, fresh = next((o, n) for o, n in zip(own, new, strict=True) if text.startswith(o))
        names.append(fresh + text[len(old) :])
        copies.append(("COPY", text, names[-1], "REPLACE"))
    copies.append(("ZADD", keys.index(target), *(word for one in members for word in (0, one))))
    if names:
        copies.append(("ZADD", keys.values(target), *(word for name in names for word in (0, name))))
    copies.append(("ZADD", keys.threads, 0, target))
    yield Commit(tuple(copies))


# -- states -----------------------------------------------------------------------------------------------------------


def state_of(keys: Keys, place: Place) -> Steps[tuple[bool, str | None]]:
    """(whether the checkpoint is stored, who took its state or None)."""
    ((kind, state),) = yield [("HMGET", keys.checkpoint(place), "type", "state")]
    return kind is not None, state.decode() if state is not None else None


def nearest_state(keys: Keys, levels: Sequence[Place]) -> Steps[tuple[bool, str | None]]:
    """(whether the question can be answered yet, key of the state a step begins with or None).

    levels: the checkpoints the step runs from, the outermost graph's first. A subgraph that has no state of its own yet
    begins with that of the step of the graph around it.
    """
    found = yield [("HMGET", keys.checkpoint(place), "type", "state") for place in levels]
    for place, (kind, state) in reversed(list(zip(levels, found, strict=True))):
        if kind is None:
            return False, None
        if state is not None:
            return True, keys.state(place)
    return True, None


def parent_place(config: Mapping[str, Any], metadata: Mapping[str, Any]) -> Place | None:
    """The checkpoint a new one follows; the first one of a subgraph follows the step of its parent graph."""
    found = config["configurable"]
    thread, ns = str(found["thread_id"]), found.get("checkpoint_ns", "")
    if found.get("checkpoint_id"):
        return Place(thread, ns, found["checkpoint_id"])
    above = metadata.get("parents") or {}
    if not above:
        return None
    outer = max(above, key=len)
    return Place(thread, outer, above[outer])


def origin_of(
    keys: Keys, config: Mapping[str, Any], metadata: Mapping[str, Any], place: Place
) -> Steps[tuple[Origin | None, bool]]:
    """Where a new checkpoint's state comes from, and whether the config's session, if it exists, comes first.

    A state that a node took in the step before wins; else the parent's state if a node took it, or if this is a fork
    of the graph's past; else the session that the config names, as it stands now; else the parent's.
    """
    parent = parent_place(config, metadata)
    if parent is None:
        return None, True
    taken, (_, by) = yield [
        ("EXISTS", keys.next_state(parent)),
        ("HMGET", keys.checkpoint(parent), "type", "state"),
    ]
    if taken and parent.ns == place.ns:
        return Origin(keys.next_state(parent), True, "node"), False
    inherited = Origin(keys.state(parent), False, by.decode()) if by is not None else None
    return inherited, by != b"node" and metadata.get("source") != "fork"
