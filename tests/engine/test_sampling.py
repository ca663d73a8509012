"""Sampling is a pure function, and draws what the probabilities say."""

from __future__ import annotations

import numpy as np
import pytest

from kvdb_engine.sampling import (
    GREEDY,
    Sampling,
    best_ids,
    log_probabilities,
    log_probabilities_of,
    logprob,
    sample,
    top,
    uniform,
)

LOGITS = np.random.default_rng(5).standard_normal(2000).astype(np.float32) * 3


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    logits = np.zeros(10, np.float32)
    logits[[3, 7]] = 5
    assert sample(logits, 0, GREEDY) == 3
    assert sample(logits, 99, Sampling(temperature=-1, seed=4)) == 3


def test_same_seed_and_position_same_token() -> None:
    draws = [[sample(LOGITS, p, Sampling(seed=s)) for p in range(60)] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 5


def test_known_numbers() -> None:
    """Stored seeds must mean the same for ever."""
    found = [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(-1, 5), uniform(2**64 - 1, 5)]
    assert found == pytest.approx(KNOWN, abs=0)
    assert found[3] == found[4]


KNOWN = [0.6533797398409644, 0.5960444399944612, 0.6495648988940785, 0.3073582786441559, 0.3073582786441559]


def test_uniform_is_uniform() -> None:
    values = np.array([uniform(seed, position) for seed in range(40) for position in range(250)])
    assert (values >= 0).all() and (values < 1).all()
    counts = np.histogram(values, bins=20, range=(0, 1))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 45  # chi-square, 19 degrees of freedom, p about 0.001


def test_frequencies_follow_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    drawn = np.bincount([sample(logits, p, Sampling(min_p=0, seed=9)) for p in range(8000)], minlength=4) / 8000
    assert np.abs(drawn - [0.5, 0.3, 0.15, 0.05]).max() < 0.02


def test_cuts() -> None:
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.09, 0.01], np.float32))

    def seen(sampling: Sampling) -> set[int]:
        return {sample(logits, p, sampling) for p in range(400)}

    assert seen(Sampling(min_p=0)) == {0, 1, 2, 3, 4}
    assert seen(Sampling(min_p=0.05)) == {0, 1, 2, 3}
    assert seen(Sampling(min_p=0.6)) == {0, 1}
    assert seen(Sampling(min_p=0, top_k=2)) == {0, 1}
    assert seen(Sampling(min_p=0, top_p=0.65)) == {0, 1}
    assert seen(Sampling(min_p=0, top_p=1e-9)) == {0}
    assert seen(Sampling(min_p=1)) == {0}
    assert seen(Sampling(min_p=0, temperature=0.01)) == {0}


def test_logprobs() -> None:
    logs = log_probabilities(LOGITS)
    assert np.exp(logs).sum() == pytest.approx(1)
    best = top(LOGITS, 3)
    assert [i for i, _, _ in best] == np.argsort(-LOGITS, kind="stable")[:3].tolist()
    assert best[0][2] == logprob(LOGITS, best[0][0]) == logs.max()
    assert np.array_equal(log_probabilities_of(LOGITS, [3, 1]), logs[[3, 1]])
    assert top(LOGITS, 0) == []


@pytest.mark.parametrize(
    "bad",
    [{"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 2.0}],
)
def test_meaningless_values_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 5, 299, 300, 1000])
def test_best_ids_are_a_full_sorts_first(count: int) -> None:
    # Few distinct values: ties at the cut must fall to the lower ids.
    logits = np.random.default_rng(3).integers(0, 12, 300).astype(np.float32)
    assert best_ids(logits, count).tolist() == np.argsort(-logits, kind="stable")[:count].tolist()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("fields", [{"min_p": 0.05}, {"min_p": 1.0}, {"min_p": 1e-6}, {"min_p": 0.0}, {"top_k": 7}])
def test_sorting_less_draws_the_same(temperature: float, fields: dict[str, float]) -> None:
    sampling = Sampling(temperature=temperature, seed=5, **fields)
    random = np.random.default_rng(4)
    for position in range(50):
        logits = np.round(3 * random.standard_normal(2000), 1).astype(np.float32)
        order = np.argsort(-logits, kind="stable")[: int(fields.get("top_k", 0)) or None]
        scaled = logits[order].astype(np.float64) / temperature
        weights = np.exp(scaled - scaled[0])
        cumulative = np.cumsum(weights[weights >= sampling.min_p])
        drawn = uniform(5, position) * cumulative[-1]
        chosen = min(int(np.searchsorted(cumulative, drawn, side="right")), len(cumulative) - 1)
        assert sample(logits, position, sampling) == int(order[chosen])
