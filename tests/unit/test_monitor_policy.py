"""Classification of endings, and the decision what to do next."""

import itertools

import pytest

from monitor.policy import Decision, LaunchEnd, Policy, Rules, classify
from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT

RULES = Rules(max_restarts=10, max_without_progress=3, give_up_after=0.0, backoff=1.0, max_backoff=5.0, max_go_back=2)
CRASHED = LaunchEnd(CRASH, "rank 0: OSError: gone")


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
        assert ending == LaunchEnd(WRONG_INPUT, f"wrong {codes.index(WRONG_INPUT)}")
    elif codes == (STOPPED, STOPPED):
        assert ending == LaunchEnd(STOPPED, "stopped on request")
    elif codes == (OK, OK):
        assert ending == LaunchEnd(OK, "finished")
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
def test_the_launchers_own_code_is_not_a_success(returncode: int | None):
    """A launcher that ends well without a record of any rank did not train."""
    ending = classify([], None, [returncode], None)
    assert ending.code == CRASH


def test_an_ending_of_which_nothing_is_known_makes_a_sentence():
    """An adopted launch is gone: nobody has its exit code."""
    reason = classify([], None, [None], None).reason
    assert not reason.endswith(("code ", "code")), reason


def test_a_command_that_was_refused_before_any_rank_spoke():
    """argparse, and torchrun with it, exits with two for a wrong flag."""
    assert classify([], None, [2], None).code == WRONG_INPUT
    assert classify([], None, [None, 2], None).code == WRONG_INPUT
    # With ranks that began, two means nothing.
    assert classify([], 2, [2], None).code == CRASH
    assert classify([record(0, CRASH)], None, [2], None).code == CRASH


@pytest.mark.parametrize("code", [OK, STOPPED, WRONG_INPUT])
def test_what_the_ranks_say_beats_the_monitors_cause(code: int):
    """The job ended by itself while the monitor was about to end it."""
    assert classify([record(0, code), record(1, code)], 2, [0], "a hang").code == code


def test_what_the_monitor_ended_is_told_by_its_cause():
    assert classify([record(0, CRASH)], 2, [-9], "rank 1 hangs") == LaunchEnd(CRASH, "rank 1 hangs")
    assert classify([], None, [None], "rank 1 hangs") == LaunchEnd(CRASH, "rank 1 hangs")


def test_the_rank_that_failed_first_is_quoted():
    exits = [record(0, CRASH, time=9.0, traceback="later"), record(1, CRASH, time=8.0, traceback="first")]
    ending = classify(exits, 2, [1], None)
    assert (ending.reason, ending.traceback) == ("rank 1: OSError: of 1", "first")


def test_other_ranks_words_about_a_killed_rank_are_not_a_traceback():
    exits = [record(0, CRASH, traceback="Connection closed by peer"), record(2, CRASH, traceback="the same")]
    ending = classify(exits, 3, [1], None)
    assert ending.traceback == ""
    assert ending.reason.startswith("rank 1 ended without a word (killed, or out of memory)")


def test_a_loss_that_is_not_finite_says_where_to_go_on():
    exits = [record(0, CRASH, non_finite_until=64), record(1, CRASH, non_finite_until=64)]
    assert classify(exits, 2, [1], None).non_finite_until == 64
    assert classify([record(0, CRASH)], 1, [1], None).non_finite_until is None
    # Even if another rank failed before, of something else.
    exits = [record(0, CRASH, time=1.0), record(1, CRASH, time=2.0, non_finite_until=64)]
    assert classify(exits, 2, [1], None).non_finite_until == 64


@pytest.mark.parametrize("code", [OK, WRONG_INPUT, STOPPED])
@pytest.mark.parametrize("stop_requested", [False, True])
def test_only_a_crash_is_started_again(code: int, stop_requested: bool):
    """The original restarted after success."""
    assert Policy(RULES).decide(LaunchEnd(code, "why"), 5, stop_requested, 0.0) == Decision(code, "why")


def test_back_off_doubles_without_progress_and_has_a_limit():
    policy = Policy(Rules(max_without_progress=6, backoff=1.0, max_backoff=5.0))
    delays = [policy.decide(CRASHED, 3, False, 0.0).delay for _ in range(5)]
    assert delays == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert policy.decide(CRASHED, 4, False, 0.0).delay == 1.0


def test_launches_without_progress_are_given_up():
    policy = Policy(RULES)
    decisions = [policy.decide(CRASHED, 3, False, 0.0) for _ in range(4)]
    # The first one made new steps.
    assert [decision.exit_code for decision in decisions] == [None, None, None, CRASH]
    assert decisions[-1].reason == "gave up after 3 launches in a row without a new step: rank 0: OSError: gone"


def test_launches_that_never_reach_a_step_are_given_up():
    policy = Policy(RULES)
    assert [policy.decide(CRASHED, None, False, 0.0).exit_code for _ in range(3)] == [None, None, CRASH]


def test_a_new_step_begins_the_count_again():
    policy = Policy(RULES)
    for step in (3, 3, 3, 4, 4, 4, 5):
        assert policy.decide(CRASHED, step, False, 0.0).exit_code is None
    # Fewer steps than before are not progress.
    assert policy.decide(CRASHED, 2, False, 0.0).exit_code is None
    assert policy.decide(CRASHED, None, False, 0.0).exit_code is None
    assert policy.decide(CRASHED, 5, False, 0.0).exit_code == CRASH


def test_step_0_is_progress():
    assert Policy(Rules(max_without_progress=1)).decide(CRASHED, 0, False, 0.0).exit_code is None


def test_restarts_are_limited_in_all():
    policy = Policy(RULES)
    decisions = [policy.decide(CRASHED, step, False, 0.0) for step in range(11)]
    assert [decision.exit_code for decision in decisions] == [None] * 10 + [CRASH]
    assert decisions[-1].reason == "gave up after 10 restarts: rank 0: OSError: gone"
    assert policy.restarts == 10


def test_no_restarts_at_all():
    assert Policy(Rules(max_restarts=0)).decide(CRASHED, 5, False, 0.0).exit_code == CRASH


def non_finite(until: int) -> LaunchEnd:
    return LaunchEnd(CRASH, "rank 0: FloatingPointError: nan", non_finite_until=until)


def test_going_back_leaves_out_the_samples():
    assert Policy(RULES).decide(non_finite(64), 5, False, 0.0).flags == ["--resume_at_sample=64"]


def test_what_is_left_out_stays_out_until_there_is_progress():
    """After a crash of another kind before the first new step, the checkpoint may still be the one before the
    samples."""
    policy = Policy(Rules(max_without_progress=9))
    policy.decide(non_finite(64), 5, False, 0.0)
    for step in (None, 4, 5):
        assert policy.decide(CRASHED, step, False, 0.0).flags == ["--resume_at_sample=64"]
    assert policy.decide(CRASHED, 6, False, 0.0).flags == []
    assert policy.decide(CRASHED, 6, False, 0.0).flags == []


def test_going_back_again_takes_the_new_position():
    policy = Policy(RULES)
    policy.decide(non_finite(64), 5, False, 0.0)
    assert policy.decide(non_finite(96), 7, False, 0.0).flags == ["--resume_at_sample=96"]


def test_going_back_is_limited():
    policy = Policy(RULES)
    assert [policy.decide(non_finite(until), until, False, 0.0).exit_code for until in (8, 16)] == [None, None]
    last = policy.decide(non_finite(24), 24, False, 0.0)
    assert (last.exit_code, last.reason) == (
        CRASH, "gave up after going back 2 times: rank 0: FloatingPointError: nan",
    )  # fmt: skip


def test_going_back_without_progress_is_given_up_like_any_other():
    policy = Policy(Rules(max_without_progress=2, give_up_after=0.0, max_go_back=9))
    assert [policy.decide(non_finite(8), 3, False, 0.0).exit_code for _ in range(3)] == [None, None, CRASH]


def test_a_non_finite_loss_can_be_the_end():
    decision = Policy(Rules(on_nonfinite="stop")).decide(non_finite(64), 5, False, 0.0)
    assert (decision.exit_code, decision.reason) == (CRASH, "rank 0: FloatingPointError: nan")
    # Other crashes are restarted all the same.
    assert Policy(Rules(on_nonfinite="stop")).decide(CRASHED, 5, False, 0.0).exit_code is None


def test_asked_to_stop_nothing_is_started_again():
    decision = Policy(RULES).decide(CRASHED, None, True, 0.0)
    assert decision == Decision(STOPPED, "stopped on request before the first step")
    decision = Policy(RULES).decide(CRASHED, 5, True, 0.0)
    assert (decision.exit_code, decision.reason) == (
        CRASH, "did not end cleanly when asked to stop: rank 0: OSError: gone",
    )  # fmt: skip
    assert Policy(RULES).decide(non_finite(64), 5, True, 0.0).exit_code == CRASH


def crash_loop(rules: Rules, ending: LaunchEnd = CRASHED, launch_seconds: float = 10.0) -> tuple[Decision, float, int]:
    """Launches that do nothing new, with the waits that are decided: the last decision, its time, and the number of
    launches."""
    policy, now, launches = Policy(rules), 0.0, 0
    while True:
        launches += 1
        now += launch_seconds
        decision = policy.decide(ending, 3, False, now)
        if decision.exit_code is not None:
            return decision, now, launches
        now += decision.delay


def test_time_counts_as_well_as_tries():
    """Three launches took seven seconds of waiting: no trouble of the real world is over by then."""
    decision, now, launches = crash_loop(Rules())
    assert decision.exit_code == CRASH and "launches in a row without a new step, in 24." in decision.reason
    # About one launch every five minutes, the longest wait.
    assert 24 * 3600 <= now < 25 * 3600 and 24 * 3600 / 400 < launches < 24 * 3600 / 300
    slow, now, launches = crash_loop(Rules(give_up_after=5.0), launch_seconds=100.0)
    assert (slow.exit_code, launches) == (CRASH, 4), "tries count as well as time"


def test_the_wait_stays_a_number():
    """Whatever the options, arithmetic does not kill the monitor."""
    policy = Policy(Rules(max_restarts=10_000, backoff=1e-3, max_backoff=0.5))
    delays = [policy.decide(CRASHED, 3, False, 0.0).delay for _ in range(1500)]
    assert delays[-1] == max(delays) == 0.5


def traceback_of(error: str, line: int = 7) -> str:
    return f'Traceback (most recent call last):\n  File "/a/b.py", line {line}, in f\n    g()\n    ^^^\n{error}\n'


@pytest.mark.parametrize(
    "error, launches",
    [("ModuleNotFoundError: No module named 'x'", 4), ("TypeError: f() takes 1 argument", 4),
     # External causes: a disk, a network, a device, memory that another program took.
     ("OSError: [Errno 28] No space left on device", None), ("RuntimeError: CUDA error: unspecified", None),
     ("MemoryError", None), ("torch.OutOfMemoryError: CUDA out of memory", None),
     ("RuntimeError: first line\nTypeError in the middle of a message", None)],
)  # fmt: skip
def test_what_the_code_itself_raises_each_time_is_given_up_soon(error: str, launches: int | None):
    ending = LaunchEnd(CRASH, f"rank 0: {error}", traceback_of(error))
    decision, now, count = crash_loop(Rules(give_up_after=3600.0), ending)
    assert count == launches if launches is not None else now >= 3600
    assert ("each ended by the same line of code" in decision.reason) == (launches is not None)


def test_the_same_line_each_time_means_each_time():
    """The count restarts after another line, or a new step in between."""
    policy = Policy(Rules())
    endings = [LaunchEnd(CRASH, "", traceback_of("KeyError: 'x'", line)) for line in (7, 7, 9, 7, 7)]
    assert [policy.decide(ending, 3, False, 0.0).exit_code for ending in endings] == [None] * 5
    assert policy.decide(endings[-1], 4, False, 0.0).exit_code is None
    assert [policy.decide(endings[-1], 4, False, 0.0).exit_code for _ in range(3)] == [None, None, CRASH]


@pytest.mark.parametrize("code, said", [(OK, "finished"), (STOPPED, "stopped on request")])
def test_ranks_that_had_saved_all_and_were_cut_short(code: int, said: str):
    """A logger takes its time, a launcher kills the others meanwhile, leaving the group fails: nothing is lost."""
    both = {0: code, 1: code}
    assert classify([record(1, code)], 2, [-9], None, leaving=both) == LaunchEnd(code, said)
    assert classify([], 2, [-9], "rank 0 hangs", leaving=both).code == code
    failed = classify([record(0, CRASH), record(1, code)], 2, [1], None, leaving=both)
    assert failed == LaunchEnd(code, f"{said}; all was saved before rank 0: OSError: of 0")
    # A rank that left its record counts, too, without a heartbeat that says so.
    assert classify([record(1, code)], 2, [-9], None, leaving={0: code}).code == code


@pytest.mark.parametrize("leaving", [{}, {0: OK}, {0: OK, 1: STOPPED}])
def test_ranks_that_had_not(leaving: dict[int, int]):
    assert classify([], 2, [-9], None, leaving=leaving).code == CRASH


def test_a_full_disk_is_not_a_wrong_command():
    """Whatever code the training gives it."""
    full = record(0, WRONG_INPUT) | {"reason": "--out_dir r cannot be written: No space left on device"}
    assert classify([full], 1, [2], None) == LaunchEnd(CRASH, full["reason"])
