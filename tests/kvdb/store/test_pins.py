"""Pins: what is freed is given out once nothing holds it, found fast among many."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvdb.store.pins import Pins
from kvdb.store.work import Extent

extents = st.builds(Extent, st.integers(1, 2), st.integers(0, 60), st.integers(1, 20))


@given(held=st.lists(extents, max_size=8), freed=st.lists(extents, max_size=8), n_released=st.integers(0, 8))
def test_what_overlaps_a_pin_waits(held: list[Extent], freed: list[Extent], n_released: int) -> None:
    pins = Pins()
    kept = [pins.hold(extent) for extent in held]
    for pin in kept[:n_released]:
        pin.release()
    still = held[n_released:]
    waits = [extent for extent in freed if any(extent.overlaps(one) for one in still)]
    pins.free(freed, [])
    assert pins.are_late == (len(waits) < len(freed))
    given_out, _ = pins.sort([], [])
    assert sorted([*given_out, *waits]) == sorted(freed)
    assert not any(extent.overlaps(one) for extent in given_out for one in still)
    for pin in kept:
        pin.release()
    assert pins.sort([], []) == (waits, [])


def test_many_pins_and_many_freed_ranges() -> None:
    """Each with each would be 400 million comparisons."""
    pins = Pins()
    kept = [pins.hold(Extent(1, 4096 * number, 4096)) for number in range(20_000)]
    freed = [Extent(1, 4096 * number + 64, 128) for number in range(20_000)]
    assert pins.sort(freed, []) == ([], [])
    assert not pins.are_late
    kept[7].release()
    assert pins.are_late
    assert pins.sort([], []) == ([freed[7]], [])
