"""Threads that share the steps of a layer: each share is run once a step, whoever comes and whoever does not."""

import itertools

import pytest

from afpq import _core

STEPS = ("look", "make", "use")


def events_of(threads, most, failing=""):
    return [
        (step.removesuffix(" alone"), share, thread, step.endswith("alone"))
        for step, share, thread in _core.together_events(threads, most, failing)
    ]


@pytest.mark.parametrize("most", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_each_share_is_run_once_behind_all_of_the_step_before(threads, most):
    for _ in range(50):
        events = events_of(threads, most)
        # One share more than there are threads is tried at first; there are 8 at most.
        count = min(most, threads + 1, 8)
        for step in STEPS:
            assert sorted(s for e, s, *_ in events if e == step) == list(range(count))
        order = [e for e, *_ in events]
        for before, after in itertools.pairwise(STEPS):
            last = max(i for i, e in enumerate(order) if e == before)
            assert last < order.index(after)
        for thread in {t for *_, t, _ in events}:
            mine = {s for e, s, t, _ in events if e == "use" and t == thread}
            received = {s for e, s, t, _ in events if e == "receive" and t == thread}
            assert received == set(range(count)) - mine
            for step in STEPS:
                assert mine == {s for e, s, t, _ in events if e == step and t == thread}
            alone = {a for e, _, t, a in events if e == "make" and t == thread}
            assert alone == {len(mine) == count}


@pytest.mark.parametrize("failing", ["look", "make", "receive", "use"])
@pytest.mark.parametrize("threads", [2, 4])
def test_a_thread_without_memory_keeps_nobody_waiting(threads, failing):
    failed = 0
    for _ in range(50):
        try:
            events = events_of(threads, threads, failing)
        except MemoryError:
            failed += 1
        else:
            # One thread took all shares, and passed nothing on.
            assert failing in ("make", "receive")
            assert failing not in {e if not a else f"{e} alone" for e, *_, a in events}
    assert failed or failing in ("make", "receive")
