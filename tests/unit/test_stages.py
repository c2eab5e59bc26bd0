"""Stages of a pipeline against brute force."""

import random
from itertools import combinations

import pytest

from parallel.config import ParallelConfig
from parallel.stages import Stages, plan_stages
from utils.balance import balance


def _all_parts(units: int, count: int):
    for cuts in combinations(range(1, units), count - 1):
        yield tuple(end - start for start, end in zip((0, *cuts), (*cuts, units)))


def _stage_costs(costs: list[float], parts: tuple[int, ...]) -> list[float]:
    return [sum(costs[sum(parts[:i]) : sum(parts[: i + 1])]) for i in range(len(parts))]


@pytest.mark.parametrize("seed", range(40))
def test_balance_is_the_best_of_all_cuts(seed):
    rng = random.Random(seed)
    units, integer = rng.randint(3, 9), rng.random() < 0.5
    costs = [float(rng.randint(0, 4)) if integer else rng.random() for _ in range(units)]
    for count in range(1, units + 1):
        parts = balance(costs, count)
        assert len(parts) == count and sum(parts) == units and min(parts) >= 1
        cuts = list(_all_parts(units, count))
        most = min(max(_stage_costs(costs, cut)) for cut in cuts)
        assert max(_stage_costs(costs, parts)) == pytest.approx(most)
        of_these = [cut for cut in cuts if max(_stage_costs(costs, cut)) <= most + 1e-9]
        squares = min(sum(c * c for c in _stage_costs(costs, cut)) for cut in of_these)
        assert sum(c * c for c in _stage_costs(costs, parts)) == pytest.approx(squares)


@pytest.mark.parametrize("order", ["loop", "v"])
@pytest.mark.parametrize("pipe_size", [1, 2, 4])
def test_each_unit_is_on_one_rank(order, pipe_size):
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    stages = Stages((1, 2, 3, 1) * pipe_size, pipe_size, order)
    assert stages.num_units == 7 * pipe_size and stages.per_rank == 4
    theirs = generate_stage_to_rank_mapping(pipe_size, stages.num_stages, order)
    assert [stages.rank_of(stage) for stage in range(stages.num_stages)] == list(theirs.values())
    assert sorted(stage for rank in range(pipe_size) for stage in stages.stages_of(rank)) == sorted(theirs)
    for unit in range(stages.num_units):
        assert unit in stages.units(stages.stage_of(unit))
        assert stages.stage_of(unit) in stages.stages_of(stages.rank_of_unit(unit))


def _config(ranks: int, schedule: str = "1f1b", parts: str = "", blocks: int = 0) -> ParallelConfig:
    return ParallelConfig(
        pipeline_model_parallel_size=ranks, pipeline_schedule=schedule, pipeline_parts=parts,
        num_layers_per_virtual_pipeline_stage=blocks,
    )  # fmt: skip


def test_flags_say_which_stages_there_are():
    costs = [0.0, *[1.0] * 8, 1.0]
    assert plan_stages(_config(2), costs) == Stages((5, 5), 2)
    assert plan_stages(_config(2, "zbv"), costs) == Stages((3, 2, 2, 3), 2, "v")
    assert plan_stages(_config(2, "interleaved"), costs).per_rank == 2
    assert plan_stages(_config(2, "interleaved", blocks=1), costs).per_rank == 4
    assert plan_stages(_config(2, "zero_bubble"), costs).per_rank == 1
    assert plan_stages(_config(2, "zero_bubble", "1,4,4,1"), costs) == Stages((1, 4, 4, 1), 2)
    assert plan_stages(_config(4, parts="1,4,4,1"), costs).units(1) == range(1, 5)
    head_is_dear = [0.0, *[1.0] * 8, 4.0]
    assert plan_stages(_config(3, parts="measured"), head_is_dear) == Stages((5, 4, 1), 3)


@pytest.mark.parametrize(
    "config, told",
    [
        (_config(4, parts="3,2,3,3"), "must be 4 positive numbers .* sum to 10 .* give --pipeline_parts=3,2,2,3$"),
        (_config(4, parts="5,5"), "must be 4 positive numbers"),
        (_config(2, parts="4,2,2,2"), "must be 2 positive numbers"),
        (_config(2, "zbv", "5,5"), "must be 4 positive numbers"),
        (_config(2, parts="10,0"), "must be 2 positive numbers"),
        (_config(2, parts="5,x"), "whole numbers separated by commas"),
        (_config(2, parts="5,5", blocks=4), "leave one of them out"),
        (_config(2, "interleaved", blocks=3), "give a divisor of 4"),
        (_config(3, "interleaved", blocks=3), "give --pipeline_parts instead"),
        (_config(2, "interleaved", blocks=4), "has 2 or more"),
        (_config(2, "1f1b", blocks=2), "--pipeline_schedule=interleaved"),
        (_config(16), "too few for 16 stages"),
    ],
)
def test_a_wrong_flag_is_told_with_a_right_one(config, told):
    with pytest.raises(ValueError, match=told):
        plan_stages(config, [0.0, *[1.0] * 8, 1.0])
