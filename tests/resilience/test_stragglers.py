"""Which rank is slow: what the log and the board say of each rank's own times."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_eso.train.stragglers import describe


@pytest.mark.slow
def test_every_ranks_percentiles_are_on_the_board_and_the_spread_in_the_log(faulty):
    faulty.run("stragglers", "train.steps=7", "resilience.straggler_every_steps=3")
    log = faulty.log("stragglers")
    assert log.count("stragglers, passes: median of ranks") == 2
    assert log.count("stragglers, processor: median of ranks") == 2
    board = EventAccumulator(str(faulty.folder / "x" / "stragglers" / "tensorboard"))
    board.Reload()
    for rank in (0, 1):
        for kind in ("passes", "processor"):
            found = {}
            for name in ("p50", "p90", "max"):
                points = board.Scalars(f"stragglers/{kind}_{name}_seconds/rank_{rank}")
                assert [point.step for point in points] == [3, 6]
                found[name] = [point.value for point in points]
            assert all(
                0 < middle <= high <= most
                for middle, high, most in zip(*found.values(), strict=True)
            )


def test_a_slow_rank_is_named():
    def rank(seconds):
        return {"p50": seconds, "p90": seconds, "max": seconds}

    quick, slow = rank(0.1), rank(0.2)
    everywhere = [{"passes": quick, "processor": quick} for _ in range(3)]
    everywhere.append({"passes": slow, "processor": quick})
    passes, processor = describe(everywhere)
    assert "slowest rank 3" in passes and "SLOW: rank 3" in passes
    assert "SLOW" not in processor
