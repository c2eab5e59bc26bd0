"""What an ending means, and what is done next."""

import itertools

import pytest

from monitor.policy import Decision, Ending, Policy, Rules, classify
from utils.exits import CRASH, OK, STOPPED, WRONG_INPUT

RULES = Rules(max_restarts=10, max_without_progress=3, backoff=1.0, max_backoff=5.0, max_go_back=2)
CRASHED = Ending(CRASH, "rank 0: OSError: gone")


def record(rank: int, code: int, **more: object) -> dict:
    reasons = {OK: "finished", STOPPED: "stopped on request", WRONG_INPUT: f"wrong {rank}"}
    reason = reasons.get(code, f"OSError: of {rank}")
    return {"rank": rank, "code": code, "reason": reason, "step": 3, "time": 100.0 + rank} | more


@pytest.mark.parametrize("codes", list(itertools.product((OK, WRONG_INPUT, STOPPED, CRASH, None), repeat=2)))
def test_every_pair_of_records(codes: tuple[int | None, int | None]):
    """None: the rank left no record."""
    exits = [record(rank, code) for rank, code in enumerate(codes) if code is not None]
    ending = classify(exits, 2, [1], None)
    if WRONG_INPUT in codes:
        assert ending == Ending(WRONG_INPUT, f"wrong {codes.index(WRONG_INPUT)}")
    elif codes == (STOPPED, STOPPED):
        assert ending == Ending(STOPPED, "stopped on request")
    elif codes == (OK, OK):
        assert ending == Ending(OK, "finished")
    else:
        assert ending.code == CRASH
        silent = [rank for rank, code in enumerate(codes) if code is None]
        for rank, code in enumerate(codes):
            is_first_to_fail = code == CRASH and codes.index(CRASH) == rank
            assert (f"rank {rank}: OSError: of {rank}" in ending.reason) == is_first_to_fail
        assert ("ended without a word" in ending.reason) == bool(silent)
        assert ("ranks 0, 1 ended" in ending.reason) == (len(silent) == 2)


def test_the_first_of_a_run_that_had_one_rank():
    assert classify([record(0, OK)], 1, [0], None).code == OK
    assert classify([record(0, STOPPED)], None, [75], None).code == STOPPED


@pytest.mark.parametrize("returncode", [0, 1, 75, None])
def test_the_launchers_own_code_is_no_success(returncode: int | None):
    """A launcher that ends well without any rank's word did not train."""
    ending = classify([], None, [returncode], None)
    assert ending.code == CRASH


def test_an_ending_of_which_nothing_is_known_makes_a_sentence():
    """An adopted launch that is gone: nobody has its exit code."""
    reason = classify([], None, [None], None).reason
    assert not reason.endswith(("code ", "code")), reason


def test_a_command_that_was_refused_before_any_rank_spoke():
    """Two is what argparse, and torchrun with it, answer to a wrong flag."""
    assert classify([], None, [2], None).code == WRONG_INPUT
    assert classify([], None, [None, 2], None).code == WRONG_INPUT
    # With ranks that began, it says nothing.
    assert classify([], 2, [2], None).code == CRASH
    assert classify([record(0, CRASH)], None, [2], None).code == CRASH


@pytest.mark.parametrize("code", [OK, STOPPED, WRONG_INPUT])
def test_what_the_ranks_say_beats_the_monitors_cause(code: int):
    """The job ended by itself while the monitor was about to end it."""
    assert classify([record(0, code), record(1, code)], 2, [0], "a hang").code == code


def test_what_the_monitor_ended_is_told_by_its_cause():
    assert classify([record(0, CRASH)], 2, [-9], "rank 1 hangs") == Ending(CRASH, "rank 1 hangs")
    assert classify([], None, [None], "rank 1 hangs") == Ending(CRASH, "rank 1 hangs")


def test_the_rank_that_failed_first_is_quoted():
    exits = [record(0, CRASH, time=9.0, traceback="later"), record(1, CRASH, time=8.0, traceback="first")]
    ending = classify(exits, 2, [1], None)
    assert (ending.reason, ending.traceback) == ("rank 1: OSError: of 1", "first")


def test_what_others_say_of_a_rank_that_was_killed_is_no_traceback():
    exits = [record(0, CRASH, traceback="Connection closed by peer"), record(2, CRASH, traceback="the same")]
    ending = classify(exits, 3, [1], None)
    assert ending.traceback == ""
    assert ending.reason.startswith("rank 1 ended without a word (killed, or out of memory)")


def test_a_loss_that_is_not_finite_says_where_to_go_on():
    exits = [record(0, CRASH, non_finite_until=64), record(1, CRASH, non_finite_until=64)]
    assert classify(exits, 2, [1], None).non_finite_until == 64
    assert classify([record(0, CRASH)], 1, [1], None).non_finite_until is None
    # Even where another rank failed before, of something else.
    exits = [record(0, CRASH, time=1.0), record(1, CRASH, time=2.0, non_finite_until=64)]
    assert classify(exits, 2, [1], None).non_finite_until == 64


@pytest.mark.parametrize("code", [OK, WRONG_INPUT, STOPPED])
@pytest.mark.parametrize("stop_requested", [False, True])
def test_only_a_crash_is_started_again(code: int, stop_requested: bool):
    """The original restarted after success."""
    assert Policy(RULES).decide(Ending(code, "why"), 5, stop_requested) == Decision(code, "why")


def test_back_off_doubles_without_progress_and_has_a_limit():
    policy = Policy(Rules(max_without_progress=6, backoff=1.0, max_backoff=5.0))
    delays = [policy.decide(CRASHED, 3, False).delay for _ in range(5)]
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert policy.decide(CRASHED, 4, False).delay == 1.0


def test_launches_without_progress_are_given_up():
    policy = Policy(RULES)
    decisions = [policy.decide(CRASHED, 3, False) for _ in range(4)]
    # The first one did steps that were not done before.
    assert [decision.exit_code for decision in decisions] == [None, None, None, CRASH]
    assert decisions[-1].reason == "gave up after 3 launches in a row without a new step: rank 0: OSError: gone"


def test_launches_that_never_reach_a_step_are_given_up():
    policy = Policy(RULES)
    assert [policy.decide(CRASHED, None, False).exit_code for _ in range(3)] == [None, None, CRASH]


def test_a_new_step_begins_the_count_again():
    policy = Policy(RULES)
    for step in (3, 3, 3, 4, 4, 4, 5):
        assert policy.decide(CRASHED, step, False).exit_code is None
    # Fewer steps than before are none.
    assert policy.decide(CRASHED, 2, False).exit_code is None
    assert policy.decide(CRASHED, None, False).exit_code is None
    assert policy.decide(CRASHED, 5, False).exit_code == CRASH


def test_step_0_is_progress():
    assert Policy(Rules(max_without_progress=1)).decide(CRASHED, 0, False).exit_code is None


def test_restarts_are_limited_in_all():
    policy = Policy(RULES)
    decisions = [policy.decide(CRASHED, step, False) for step in range(11)]
    assert [decision.exit_code for decision in decisions] == [None] * 10 + [CRASH]
    assert decisions[-1].reason == "gave up after 10 restarts: rank 0: OSError: gone"
    assert policy.restarts == 10


def test_no_restarts_at_all():
    assert Policy(Rules(max_restarts=0)).decide(CRASHED, 5, False).exit_code == CRASH


def non_finite(until: int) -> Ending:
    return Ending(CRASH, "rank 0: FloatingPointError: nan", non_finite_until=until)


def test_going_back_leaves_out_the_samples():
    assert Policy(RULES).decide(non_finite(64), 5, False).flags == ["--resume_at_sample=64"]


def test_what_is_left_out_stays_out_until_there_is_progress():
    """A crash of another kind before the first new step: the checkpoint may still be the one before the samples."""
    policy = Policy(Rules(max_without_progress=9))
    policy.decide(non_finite(64), 5, False)
    for step in (None, 4, 5):
        assert policy.decide(CRASHED, step, False).flags == ["--resume_at_sample=64"]
    assert policy.decide(CRASHED, 6, False).flags == []
    assert policy.decide(CRASHED, 6, False).flags == []


def test_going_back_again_takes_the_new_position():
    policy = Policy(RULES)
    policy.decide(non_finite(64), 5, False)
    assert policy.decide(non_finite(96), 7, False).flags == ["--resume_at_sample=96"]


def test_going_back_is_limited():
    policy = Policy(RULES)
    assert [policy.decide(non_finite(until), until, False).exit_code for until in (8, 16)] == [None, None]
    last = policy.decide(non_finite(24), 24, False)
    assert (last.exit_code, last.reason) == (
        CRASH, "gave up after going back 2 times: rank 0: FloatingPointError: nan",
    )  # fmt: skip


def test_going_back_without_progress_is_given_up_like_any_other():
    policy = Policy(Rules(max_without_progress=2, max_go_back=9))
    assert [policy.decide(non_finite(8), 3, False).exit_code for _ in range(3)] == [None, None, CRASH]


def test_a_non_finite_loss_can_be_the_end():
    decision = Policy(Rules(on_nonfinite="stop")).decide(non_finite(64), 5, False)
    assert (decision.exit_code, decision.reason) == (CRASH, "rank 0: FloatingPointError: nan")
    # Other crashes are started again all the same.
    assert Policy(Rules(on_nonfinite="stop")).decide(CRASHED, 5, False).exit_code is None


def test_asked_to_stop_nothing_is_started_again():
    assert Policy(RULES).decide(CRASHED, None, True) == Decision(STOPPED, "stopped on request before the first step")
    decision = Policy(RULES).decide(CRASHED, 5, True)
    assert (decision.exit_code, decision.reason) == (
        CRASH, "did not end cleanly when asked to stop: rank 0: OSError: gone",
    )  # fmt: skip
    assert Policy(RULES).decide(non_finite(64), 5, True).exit_code == CRASH
