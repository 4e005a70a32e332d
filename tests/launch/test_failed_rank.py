"""A rank that dies is not a preemption, though srun's TERM makes the other ranks save and say so."""

from megatron_eso.launch.attempt import Ending, decide

SAVED = Ending(
    status={"state": "stopped", "reason": "SIGTERM"}, has_progress=False, is_term=False, is_usr1=False,
    is_stop_asked=False, num_without_progress=2, has_failed_rank=False,
)  # fmt: skip


def test_a_preempted_attempt_does_not_count():
    assert decide(SAVED, 3)[:2] == ("requeue", 2)


def test_an_attempt_with_a_failed_rank_counts_and_is_held_in_the_end():
    failed = Ending(**{**SAVED.__dict__, "has_failed_rank": True})
    assert decide(failed, 3)[:2] == ("hold", 3)
    assert decide(failed, 4)[:2] == ("requeue", 3)
    assert "a rank failed" in decide(failed, 4)[2]
    working = Ending(**{**failed.__dict__, "has_progress": True})
    assert decide(working, 3)[:2] == ("requeue", 0)
