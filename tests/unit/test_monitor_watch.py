"""Overdue heartbeats: limits by phase, the run's own median, and the rank that is named."""

import pytest

from monitor.watch import Limits, Silence, Watch

LIMITS = Limits(step_floor=5.0, step_factor=4.0, first_step=100.0, start=20.0, compile=300.0, save=50.0, end=30.0,
                validate=100.0)  # fmt: skip


def beat(rank: int = 0, phase: str = "step", step: int = 3, age: float = 0.0, at: float = 0.0, **more: object) -> dict:
    place = {"rank": rank, "phase": phase, "step": step, "age": age, "monotonic": at}
    return place | {"alive": True, "stopped": False} | more


def watch_with_median(seconds: float) -> Watch:
    watch = Watch(LIMITS, 0.0)
    for step in range(5):
        watch.take([beat(step=step, at=step * seconds)])
    assert watch.median_step == pytest.approx(seconds)
    return watch


@pytest.mark.parametrize(
    "phase, limit",
    [("start", 20), ("compile", 300), ("save", 50), ("end", 30), ("step", 100), ("validate", 100), ("reference", 100)],
)
def test_each_phase_has_its_limit(phase: str, limit: float):
    """Before a median is known."""
    watch = Watch(LIMITS, 0.0)
    assert watch.overdue([beat(phase=phase, age=limit - 0.1)], 1000.0) is None
    assert f"for {limit + 0.1:.1f} s in phase {phase}" in watch.overdue([beat(phase=phase, age=limit + 0.1)], 1000.0)


def test_every_phase_that_a_rank_beats_has_a_limit():
    from runs.heartbeat import PHASES

    watch = Watch(LIMITS, 0.0)
    assert all(watch.limit(phase) > 0 for phase in PHASES)


@pytest.mark.parametrize(
    "phase, seconds, limit",
    [("step", 0.01, 5.0), ("step", 10.0, 40.0), ("validate", 0.01, 100.0), ("validate", 50.0, 200.0),
     ("reference", 0.01, 100.0)],
)  # fmt: skip
def test_the_runs_own_median_counts_but_never_less_than_the_floor(phase: str, seconds: float, limit: float):
    watch = watch_with_median(seconds)
    assert watch.limit(phase) == pytest.approx(limit)
    assert watch.overdue([beat(phase=phase, age=limit * 0.99)], 0.0) is None
    assert watch.overdue([beat(phase=phase, age=limit * 1.01)], 0.0) is not None


def test_saves_and_compilation_are_not_measured_by_steps():
    watch = watch_with_median(0.01)
    assert (watch.limit("save"), watch.limit("compile"), watch.limit("start")) == (50.0, 300.0, 20.0)


def test_the_median_needs_a_few_steps():
    watch = Watch(LIMITS, 0.0)
    for step in range(3):
        watch.take([beat(step=step, at=2.0 * step)])
        assert watch.median_step is None
    # Seeing the same beat again adds nothing.
    watch.take([beat(step=2, at=4.0)])
    assert watch.median_step is None
    watch.take([beat(step=3, at=6.0)])
    assert watch.median_step == 2.0


def test_steps_between_two_looks_share_the_time():
    watch = Watch(LIMITS, 0.0)
    for step in (0, 10, 20, 30):
        watch.take([beat(step=step, at=step * 0.5)])
    assert watch.median_step == 0.5


def test_phases_other_than_steps_do_not_count():
    """A validation of 50 s after each step of 1 s."""
    watch = watch_with_median(1.0)
    for step in range(5, 25):
        watch.take([beat(step=step, at=51.0 * step)])
        watch.take([beat(step=step + 1, at=51.0 * step + 1.0, phase="validate")])
    assert watch.median_step == pytest.approx(1.0)


def test_one_slow_step_does_not_move_the_median():
    watch = watch_with_median(1.0)
    watch.take([beat(step=5, at=1000.0)])
    assert watch.median_step == 1.0


def test_the_median_forgets_what_is_long_ago():
    watch, at = watch_with_median(1.0), 4.0
    for step in range(5, 500):
        at += 3.0
        watch.take([beat(step=step, at=at)])
    assert watch.median_step == 3.0


def test_clocks_of_different_machines_are_not_compared():
    """Seconds since a machine's start: each rank's beats are measured against its own machine."""
    watch = Watch(LIMITS, 0.0)
    for step in range(4):
        watch.take([beat(0, step=step, at=1000.0 + step), beat(1, step=step, at=5.0 + step)])
    assert watch.median_step == 1.0


def test_no_rank_ever_beat():
    watch = Watch(LIMITS, 1000.0)
    assert watch.overdue([], 1019.0) is None
    assert watch.overdue([], 1021.0) == "no rank gave a sign of life within 20 s of the launch"


def test_a_rank_that_is_gone_is_not_a_hang():
    """The rank crashed or ended, which is found by other means."""
    watch = Watch(LIMITS, 0.0)
    assert watch.overdue([beat(age=1e6, alive=False), beat(1, age=1.0)], 1e6) is None


def test_the_guilty_rank_is_named():
    """A stopped rank keeps the others waiting: both are late, and the stopped one is named."""
    sentence = watch_with_median(0.1).overdue(
        [beat(0, step=7, age=7.0), beat(1, step=7, age=6.9, stopped=True), beat(2, step=7, age=1.0)], 0.0
    )
    assert sentence == (
        "no sign of life from ranks 0, 1 for 7.0 s in phase step at step 7; 5.0 s are the limit; "
        "stopped by a signal: rank 1"
    )


def test_a_rank_of_an_adopted_launch_is_judged_by_its_own_age():
    """A monitor that has just taken the run over knows no median, but knows the age of the beats."""
    watch = Watch(LIMITS, 1000.0)
    assert watch.overdue([beat(age=99.0)], 1000.1) is None
    assert "rank 0 for 500.0 s" in watch.overdue([beat(age=500.0)], 1000.1)


def test_late_is_only_who_is_beyond_the_limit_of_the_own_phase():
    """The first rank writes a checkpoint, and the others wait in the next step."""
    watch = watch_with_median(0.1)
    assert watch.overdue([beat(0, "save", age=40.0), beat(1, "save", age=39.0)], 0.0) is None
    assert "rank 1 for 6.0 s in phase step" in watch.overdue([beat(0, "save", age=40.0), beat(1, age=6.0)], 0.0)


def silent(rank: int, age: float, at: float) -> dict:
    return beat(rank, age=age, at=at)


def test_silence_is_counted_while_somebody_watches():
    """Looks of 1 s; then the monitor is stopped for an hour, and the machine's clock goes on with all ranks' ages."""
    silence, ages = Silence(is_adopted=False), []
    for age, watched in ((0.4, 1.0), (1.4, 1.0), (2.4, 1.0), (3602.4, 4.0), (3603.4, 1.0)):
        ages += [b["age"] for b in silence.judge([silent(0, age, at=5.0)], watched)]
    assert ages == pytest.approx([0.4, 1.4, 2.4, 6.4, 7.4])
    # A new heartbeat from the pause is no older than a look.
    assert [b["age"] for b in silence.judge([silent(0, 1800.0, at=9.0)], 4.0)] == [4.0]


def test_silence_counts_a_rank_that_hangs_however_seldom_its_node_answers():
    """A connection that breaks all the time does not hide a hang."""
    silence = Silence(is_adopted=False)
    ages = [silence.judge([silent(0, 60.0 * n, at=1.0)], 4.0)[0]["age"] for n in range(1, 30)]
    assert ages == pytest.approx([4.0 * n for n in range(1, 30)])


def test_silence_before_the_watch_began():
    """A launch that was taken over: silence before that is known. Ranks count separately."""
    adopted, own = Silence(is_adopted=True), Silence(is_adopted=False)
    beats = [silent(0, 500.0, at=1.0), silent(1, 0.5, at=9.0)]
    assert [b["age"] for b in adopted.judge(beats, 1.0)] == [500.0, 0.5]
    assert [b["age"] for b in own.judge(beats, 1.0)] == [1.0, 0.5]
    assert beats[0]["age"] == 500.0, "what the node said stays what it said"


def test_leaving_takes_as_long_as_loggers_may_take():
    from runs.sinks import LONGEST_CLOSE_S

    assert Limits().end > LONGEST_CLOSE_S
