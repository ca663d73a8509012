"""Steps that may fail, made reliable: retry from a step's snapshot, best of n branches, search over snapshots.

A step is any function that works in a session: it extends, generates, parses, runs tools. Going back costs a RESTORE,
never a prefill, so trying again costs what the trying itself costs. With a chance p that a step comes out right, N
steps in a row succeed with p^N; with k tries a step, with (1-(1-p)^k)^N.

    retry(session, step, verify, k)        one step, until it is right
    best_of(session, n, step, score)       n branches of one step, the best one goes on
    tree_search(session, ...)              several steps, the best few branches of each level go on

`aretry` and `abest_of` are the same for asyncio; there the branches of `abest_of` run at the same time.
Every snapshot that these functions take is their own and deleted at the end. After an exception of the step itself the
session is back where it was.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvdb.client import AsyncClient, AsyncSession, Client, Session

T = TypeVar("T")

# A step gets the session and the number of the try: use it as, or in, the seed, or all tries come out alike.
Step = Callable[[Session, int], T]
AsyncStep = Callable[[AsyncSession, int], Awaitable[T]]


class RetriesExhausted(RuntimeError):
    """No try was accepted. `results` are those of all tries; the session stands before the step again."""

    def __init__(self, results: Sequence[object]) -> None:
        super().__init__(f"none of {len(results)} tries was accepted")
        self.results = tuple(results)


@dataclass(frozen=True, slots=True)
class Attempt(Generic[T]):
    """A step that came out right: its result, and how many tries it took."""

    result: T
    tries: int


@dataclass(frozen=True, slots=True)
class Best(Generic[T]):
    """The best branch: its result and score, and the scores of all branches in order."""

    result: T
    score: float
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Path(Generic[T]):
    """A way through a search tree: the results of its steps, the score of its end, and how many steps were tried."""

    results: tuple[T, ...]
    score: float
    n_steps: int


def _key(kind: str) -> str:
    return f"agents:{kind}:{secrets.token_hex(8)}"


@contextmanager
def _temporary(client: Client, *keys: str) -> Iterator[None]:
    try:
        yield
    finally:
        client.delete(*keys)


def retry(session: Session, step: Step[T], verify: Callable[[T], bool], k: int = 3) -> Attempt[T]:
    """Run a step until `verify` accepts its result, at most `k` times, each try from the very same state.

    The session must hold a state. Raises RetriesExhausted; what step or verify raise passes through. In both cases the
    session stands before the step again.
    """
    before = _key("retry")
    session.snapshot(before)
    with _temporary(session.client, before):
        results: list[T] = []
        for number in range(k):
            try:
                result = step(session, number)
                if verify(result):
                    return Attempt(result, number + 1)
            except BaseException:
                session.restore(before)
                raise
            results.append(result)
            session.restore(before)
        raise RetriesExhausted(results)


def best_of(session: Session, n: int, step: Step[T], score: Callable[[T], float]) -> Best[T]:
    """Run a step in `n` branches of the session and go on with the best one.

    Branch i gets i as the number of its try. Of equal scores the first wins. The branches are dropped.
    """
    branches = session.branches(n)
    chosen = _key("best")
    with _temporary(session.client, chosen, *(str(branch.name) for branch in branches)):
        results = [step(branch, number) for number, branch in enumerate(branches)]
        scores = [score(result) for result in results]
        best = max(range(n), key=lambda number: (scores[number], -number))
        branches[best].snapshot(chosen)
        session.restore(chosen)
    return Best(results[best], scores[best], tuple(scores))


@dataclass(frozen=True, slots=True)
class _Node(Generic[T]):
    key: str
    results: tuple[T, ...]
    score: float


def tree_search(
    session: Session,
    step: Step[T],
    score: Callable[[Sequence[T]], float],
    *,
    depth: int,
    branching: int = 3,
    width: int = 2,
    is_goal: Callable[[Sequence[T]], bool] | None = None,
) -> Path[T]:
    """Search for a good sequence of steps: at each level every kept state is tried `branching` times.

    score: of a sequence of results; the `width` best states of a level are kept as snapshots. is_goal: ends the search
    at the first sequence that fulfils it. The session ends at the best sequence of the deepest level reached. Every
    branch gets another number.
    """
    client = session.client
    root = _key("tree")
    session.snapshot(root)
    taken = [root]
    level: list[_Node[T]] = [_Node(root, (), 0.0)]
    n_steps = 0
    try:
        for _ in range(depth):
            grown: list[_Node[T]] = []
            for node in level:
                for _ in range(branching):
                    with client.session() as branch:
                        branch.restore(node.key)
                        results = (*node.results, step(branch, n_steps))
                        n_steps += 1
                        key = _key("tree")
                        branch.snapshot(key)
                        taken.append(key)
                    found = _Node(key, results, score(results))
                    grown.append(found)
                    if is_goal is not None and is_goal(results):
                        session.restore(key)
                        return Path(results, found.score, n_steps)
            level = sorted(grown, key=lambda node: -node.score)[:width]
            kept = {node.key for node in level} | {root}
            doomed = [key for key in taken if key not in kept]
            if doomed:
                client.delete(*doomed)
            taken = [key for key in taken if key in kept]
        session.restore(level[0].key)
        return Path(level[0].results, level[0].score, n_steps)
    except BaseException:
        session.restore(root)
        raise
    finally:
        client.delete(*taken)


async def aretry(session: AsyncSession, step: AsyncStep[T], verify: Callable[[T], bool], k: int = 3) -> Attempt[T]:
    """As `retry`."""
    before = _key("retry")
    await session.snapshot(before)
    try:
        results: list[T] = []
        for number in range(k):
            try:
                result = await step(session, number)
                if verify(result):
                    return Attempt(result, number + 1)
            except BaseException:
                await asyncio.shield(session.restore(before))
                raise
            results.append(result)
            await session.restore(before)
        raise RetriesExhausted(results)
    finally:
        await _adelete(session.client, before)


async def abest_of(session: AsyncSession, n: int, step: AsyncStep[T], score: Callable[[T], float]) -> Best[T]:
    """As `best_of`, with all branches at the same time."""
    branches = await session.branches(n)
    chosen = _key("best")
    try:
        tasks = [asyncio.ensure_future(step(branch, number)) for number, branch in enumerate(branches)]
        try:
            results = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        scores = [score(result) for result in results]
        best = max(range(n), key=lambda number: (scores[number], -number))
        await branches[best].snapshot(chosen)
        await session.restore(chosen)
    finally:
        await _adelete(session.client, chosen, *(str(branch.name) for branch in branches))
    return Best(results[best], scores[best], tuple(scores))


async def _adelete(client: AsyncClient, *keys: str) -> None:
    await asyncio.shield(client.delete(*keys))
