"""Orders and predicted times of pipelines: against torch's own schedules, and the formulas of their papers."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as theirs

from parallel import schedules
from parallel.schedules import Action, StageTimes, check_micro_batches, choose_micro_batches, orders, predict
from parallel.stages import Stages

_THEIRS = {
    "interleaved": theirs.ScheduleInterleaved1F1B, "zero_bubble": theirs.ScheduleInterleavedZeroBubble,
    "zbv": theirs.ScheduleZBVZeroBubble,
}  # fmt: skip
_LETTERS = {"FORWARD": "F", "FULL_BACKWARD": "B", "BACKWARD_INPUT": "I", "BACKWARD_WEIGHT": "W"}


def _stages(schedule: str, ranks: int, a_rank: int = 1) -> Stages:
    return Stages((1,) * (ranks * a_rank), ranks, "v" if schedule == "zbv" else "loop")


def _cases():
    for ranks in (2, 3, 4):
        for count in (1, 2, 3, 4, 6, 8, 12):
            for schedule, a_rank in [
                ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1),
                ("zero_bubble", 2), ("zbv", 2),
            ]:  # fmt: skip
                if schedules.is_possible(schedule, ranks, count):
                    yield schedule, _stages(schedule, ranks, a_rank), count


def _their_order(schedule: str, stages: Stages, count: int) -> list[list[Action]]:
    """torch's, which wants stages and asks them for little more than their numbers."""
    fakes = [
        SimpleNamespace(
            group_size=stages.pipe_size, num_stages=stages.num_stages, group_rank=0, stage_index=stage, submod=None,
            has_backward=True,
        )
        for stage in stages.stages_of(0)
    ]  # fmt: skip
    actions = _THEIRS[schedule](fakes, count).pipeline_order
    return [
        [Action(_LETTERS[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions[rank] if a]
        for rank in range(stages.pipe_size)
    ]  # fmt: skip


def test_orders_are_torchs():
    cases = [case for case in _cases() if case[0] in _THEIRS]
    assert len(cases) > 40
    for case in cases:
        assert orders(*case) == _their_order(*case), case


def test_every_order_does_everything_once_and_never_waits_for_ever():
    for schedule, stages, count in _cases():
        done = Counter(action for actions in orders(schedule, stages, count) for action in actions)
        kinds = "FIW" if schedule in ("zero_bubble", "zbv") else "FB"
        wanted = {Action(kind, s, m) for kind in kinds for s in range(stages.num_stages) for m in range(count)}
        assert done == Counter(wanted)
        predict(schedule, stages, count, [StageTimes(1, 1, 1)] * stages.num_stages)


@pytest.mark.parametrize("ranks, count", [(2, 4), (4, 8), (4, 16)])
def test_bubbles_follow_the_formulas(ranks, count):
    # The paper's, or what follows from counting the passes.
    shares = {
        ("gpipe", 1): (ranks - 1) / (count + ranks - 1),
        ("1f1b", 1): (ranks - 1) / (count + ranks - 1),
        ("interleaved", 2): (ranks - 1) / (2 * count + ranks - 1),
        ("interleaved", 4): (ranks - 1) / (4 * count + ranks - 1),
        ("zero_bubble", 1): (ranks - 1) / (3 * count + ranks - 1),
        ("zbv", 2): (ranks - 1) / (6 * count + ranks - 1),
    }
    for (schedule, a_rank), share in shares.items():
        stages = _stages(schedule, ranks, a_rank)
        predicted = predict(schedule, stages, count, [StageTimes(1, 1, 1)] * stages.num_stages)
        assert predicted.bubbles == pytest.approx([share] * ranks), schedule
        assert schedules.formula(schedule, ranks, a_rank, count) == share


def test_the_timelines_of_the_documentation():
    text = (Path(schedules.__file__).parent / "README.md").read_text()
    for schedule, a_rank in [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zbv", 2)]:
        for line in schedules.timeline(schedule, _stages(schedule, 2, a_rank), 4):
            assert line in text, f"{schedule}: {line}"


def test_a_slow_stage_and_transfers_lengthen_the_step():
    stages, even = _stages("1f1b", 2), [StageTimes.split(3.0)] * 2
    assert predict("1f1b", stages, 4, even).step == 15
    assert predict("1f1b", stages, 4, [StageTimes.split(3.0), StageTimes.split(6.0)]).step == 1 + 4 * 6 + 2
    # Of the four micro-batches only the first activation and the last gradient travel while nobody works.
    assert predict("gpipe", stages, 4, even, transfer=0.5).step == 16


def test_auto_weighs_the_bubble_against_what_each_micro_batch_costs():
    stages = _stages("1f1b", 2)

    def times(fixed: float):
        return lambda rows: [StageTimes.split(fixed + rows)] * 2

    assert choose_micro_batches("1f1b", stages, 32, 32, times(0.0))[0] == 32
    few, step = choose_micro_batches("1f1b", stages, 32, 32, times(2.0))
    assert few == min((n for n in (2, 4, 8, 16, 32)), key=lambda n: (n + 1) * (2.0 + 32 / n))
    assert step.step == pytest.approx((few + 1) * (2.0 + 32 / few))
    assert choose_micro_batches("1f1b", stages, 32, 32, times(1e9))[0] == 2
    assert choose_micro_batches("1f1b", stages, 32, 4, times(1e9))[0] == 8
    with pytest.raises(ValueError, match="--gradient_accumulation_steps=4 or more"):
        choose_micro_batches("1f1b", _stages("1f1b", 4), 2, 2, times(1.0))


@pytest.mark.parametrize(
    "schedule, ranks, count, rows, told",
    [
        ("1f1b", 4, 2, 8, "cannot have 2 .*--pipeline_micro_batches=4 is the nearest"),
        ("gpipe", 2, 3, 8, "8 rows .* cannot be cut into 3 equal .*--pipeline_micro_batches=2 is"),
        ("interleaved", 2, 5, 15, "--pipeline_micro_batches=3 is"),
        ("1f1b", 4, 2, 2, "give --gradient_accumulation_steps=4 or more"),
    ],
)
def test_impossible_numbers_are_told_with_a_possible_one(schedule, ranks, count, rows, told):
    with pytest.raises(ValueError, match=told):
        check_micro_batches(schedule, ranks, count, rows)
