"""What the interpreter adds to a long compilation, and that it is as it was afterwards."""

import gc
import resource
import sys

import pytest

from fxopt.undisturbed import undisturbed


def leaf():
    return 0


def at_depth(depth: int, calls: int):
    """Make `calls` calls, `depth` frames up."""
    if depth:
        return at_depth(depth - 1, calls)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(calls):
        leaf()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def worst():
    return max(at_depth(depth, 1000) for depth in range(200))


@pytest.mark.skipif(not (3, 11) <= sys.version_info < (3, 14), reason="needs frames in chunks that aren't kept")
def test_no_depth_is_at_the_end_of_a_chunk_of_frames():
    assert worst() > 500  # some loop maps memory at each call
    assert undisturbed(worst)() < 500


def test_objects_are_set_aside_and_given_back():
    assert gc.get_freeze_count() == 0
    assert undisturbed(gc.get_freeze_count)() > 0
    assert gc.get_freeze_count() == 0


def test_they_are_given_back_where_it_raises():
    with pytest.raises(ZeroDivisionError):
        undisturbed(lambda: 1 / 0)()
    assert gc.get_freeze_count() == 0


def test_what_others_froze_stays_frozen():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        undisturbed(lambda: None)()
        assert gc.get_freeze_count() == frozen
    finally:
        gc.unfreeze()


def test_calls_inside_leave_thawing_to_the_outer_one():
    def outer():
        undisturbed(leaf)()
        return gc.get_freeze_count()

    assert undisturbed(outer)() > 0


def test_its_own_garbage_is_collected():
    class Thing:
        alive = 0

        def __init__(self):
            self.me = self
            Thing.alive += 1

        def __del__(self):
            Thing.alive -= 1

    def litter():
        Thing()
        gc.collect()
        return Thing.alive

    assert undisturbed(litter)() == 0


def test_arguments_results_and_name_are_those_of_the_function():
    @undisturbed
    def divide(a, *, by):
        """Divide."""
        return a / by

    assert divide(6, by=3) == 2
    assert (divide.__name__, divide.__doc__) == ("divide", "Divide.")
