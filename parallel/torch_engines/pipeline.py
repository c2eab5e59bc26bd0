"""Pipeline parallelism: each rank holds some stages of the model (parallel/stages.py), and micro-batches pass through
them one after the other (GPipe: Huang et al., 2019; 1F1B: Narayanan et al., 2019; interleaved: Narayanan et al., 2021).
Here 1f1b, with two stages and four micro-batches:

    stage 0   F0 F1 .. B0 F2 B1 F3 B2 .. B3 | step
    stage 1   .. F0 B0 F1 B1 F2 B2 F3 B3    | step
                                      [ buckets of stage 1 are summed while stage 0 goes on ]

torch.distributed.pipelining runs the schedule. Between stages one tensor travels: hidden states forward, their gradient
back. Every stage reads its rows itself, so all that a micro-batch needs besides is there, and a stage is only told the
number of the micro-batch. All micro-batches have one shape, so shorter rows are padded (`EngineParts.widen`).

Everything else is that of the bucketed engine: gradients of a stage lie in buckets, which are summed over the data
ranks of that stage once each of their parameters has got its gradient from every micro-batch. Outside of training, a
forward pass goes through the stages in a simple chain (chain.py).

The last stage computes the loss and returns it; the others return zeros. A step is never dropped in the middle: a stop
is seen between steps.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from parallel.data_parallel import BucketedEngine, new_ddp
from parallel.ddp import DistributedDataParallel
from parallel.engine import Batch, EngineParts, LayerLosses, StepPlan, Sums, Task
from parallel.regroup import regroup
from parallel.schedules import is_possible
from parallel.spans import span
from parallel.stages import Stages
from parallel.torch_engines.chain import Chain, Cuttable, units_of
from parallel.waiting import WaitMeter
from parallel.zero1 import Zero1


class StagedTask(Task, Protocol):
    """A task whose forward pass and loss are apart (tasks/task.py)."""

    def hidden(
        self, batch: Batch, losses: LayerLosses | None, units: range | None, entering: Tensor | None
    ) -> Tensor: ...

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]: ...


_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble, "zbv": ScheduleZBVZeroBubble,
}  # fmt: skip
"""Name, see ParallelConfig.pipeline_schedule -> torch's class."""
_OF_ONE_STAGE = ("gpipe", "1f1b")
"""Schedules whose class takes a stage, not a list of them."""
_SPLIT = ("zero_bubble", "zbv")
"""Schedules in which the gradients of a stage's weights come in passes of their own."""
_GIVES_UP_GRAPHS = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
"""Whether torch gives up a graph before that pass, although functions written in Python still need it."""


class _Idle:
    """Counts as waiting all time of a schedule in which no stage of this rank works: on a GPU, that of its stream."""

    def __init__(self, meter: WaitMeter):
        self._meter = meter
        self._wait: AbstractContextManager[None] | None = None

    @contextmanager
    def schedule(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._end()

    @contextmanager
    def working(self, name: str) -> Iterator[None]:
        """Context for a stage's own work, which shows as `name` in a profile."""
        self._end()
        try:
            with span(name):
                yield
        finally:
            self._begin()

    def _begin(self) -> None:
        self._wait = self._meter.waiting("wait for stages")
        self._wait.__enter__()

    def _end(self) -> None:
        if self._wait is not None:
            self._wait.__exit__(None, None, None)
            self._wait = None


class _Stage(PipelineStage):
    """A stage whose own work is told apart from waiting."""

    idle: _Idle
    on_weights: Callable[[int], None]
    """Called after each pass for weights alone, with the number of the stage."""
    graphs: dict[int, Any] | None = None
    """Ends of the graphs that wait for such a pass; None: torch keeps them itself, or there are no such passes."""

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.idle.working(f"forward {fwd_chunk_id}, stage {self.stage_index}"):
            output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        if self.graphs is not None:
            self.graphs[fwd_chunk_id] = output.grad_fn
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with self.idle.working(f"backward {bwd_chunk_id}, stage {self.stage_index}"):
            return super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        with self.idle.working(f"weights {bwd_chunk_id}, stage {self.stage_index}"):
            super().backward_weight_one_chunk(bwd_chunk_id, *args, **kwargs)
        if self.graphs is not None:
            del self.graphs[bwd_chunk_id]
        self.on_weights(self.stage_index)

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # torch 2.11 also greets a neighbour on the same rank, which gloo cannot.
        return [op for op in super()._get_init_p2p_neighbors_ops() if op.group_peer != self.group_rank]


class _Units(nn.Module):
    """What a stage runs.

    Args:
        run: gets the number of the micro-batch and what the stage before has returned.
        trained: the parameters that get gradients, for schedules that compute these apart.
    """

    def __init__(self, run: Callable[[int, Tensor | None], Tensor], is_first: bool, trained: list[nn.Parameter]):
        super().__init__()
        self._run, self._is_first, self._trained = run, is_first, trained

    def forward(self, entering: Tensor, number: Tensor) -> Tensor:
        # torch hands the first stage an argument, too: again the number.
        return self._run(int(number), None if self._is_first else entering)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self._trained)


class _Step:
    """The work on one step's micro-batches, and its sums."""

    def __init__(self, task: StagedTask, batches: Sequence[Batch], factor: float, stages: Stages, device: torch.device):
        self.batches = batches
        self._task, self._factor, self._stages = task, factor, stages
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.metrics = {name: torch.zeros_like(self.loss) for name in task.metric_names}
        self.layers: Tensor | None = None

    def run(self, stage: int, number: int, entering: Tensor | None) -> Tensor:
        """A stage's result for a micro-batch; that of the last one is the loss, as its backward pass needs it."""
        batch = self.batches[number]
        losses = self._task.layer_losses(batch, self._factor)
        hidden = self._task.hidden(batch, losses, self._stages.units(stage), entering)
        if losses is not None and losses.sums is not None:
            self.layers = losses.sums if self.layers is None else self.layers + losses.sums
        if stage < self._stages.num_stages - 1:
            # A stage that trains nothing passes on what needs no gradient, but torch sends one.
            return hidden if hidden.requires_grad else hidden.requires_grad_()
        loss, _, sums = self._task.loss(hidden, batch)
        self.loss += loss.detach()
        for name, value in sums.items():
            self.metrics[name] += value
        # torch joins the micro-batches' results along their first dimension.
        return loss.reshape(1) * self._factor


def open_pipeline(parts: EngineParts) -> "PipelineEngine":
    config, stages = parts.config, parts.stages
    assert stages is not None
    assert is_possible(config.pipeline_schedule, stages.pipe_size, parts.micro_batches), parts.micro_batches
    ddp = new_ddp(parts)
    zero1 = Zero1(ddp, config.overlap_param_gather) if config.use_distributed_optimizer else None
    return PipelineEngine(parts, ddp, zero1, stages)


class PipelineEngine(BucketedEngine):
    """Trains a model of which each rank holds some stages (`cut`)."""

    def __init__(self, parts: EngineParts, ddp: DistributedDataParallel, zero1: Zero1 | None, stages: Stages):
        super().__init__(parts, ddp, zero1)
        self._stages, self._idle = stages, _Idle(ddp.observer.waits)
        self._chain = cast(Chain, cast(Cuttable, parts.model).relay)
        self._own = stages.stages_of(self.mesh.pipe_rank)
        ddp.observer.expects_order = False
        self._has_last = stages.num_stages - 1 in self._own
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._is_split = parts.config.pipeline_schedule in _SPLIT
        self._weights_left: dict[int, int] = {}
        self._users = self._stages_that_use()
        self._step_now: _Step | None = None

    def forward_backward(self, micro_batches: Sequence[Batch], task: Task, plan: StepPlan) -> Sums | None:
        parts, device = self._parts, self._parts.context.device
        self._begin_step(plan)
        with self._chain.one_way():
            regrouped = regroup([parts.widen(batch) for batch in micro_batches], parts.micro_batches)
            self._run_prepass(regrouped, task)
            batches = [parts.to_device(batch) for batch in regrouped]
            step = _Step(cast(StagedTask, task), batches, self._factor(task, plan), self._stages, device)
            self._before_last(plan)
            self._expect(len(batches))
            self._run(step)
        self._layers = self._counted_layers(step.layers) if step.layers is not None else None
        return Sums(
            self._counted(step.loss), {name: self._counted(value) for name, value in step.metrics.items()}, self._layers
        )

    def _expect(self, count: int) -> None:
        """Tell when gradients of so many micro-batches are complete. Passes for weights alone are not reported by
        autograd; there, a bucket is due when the last one has ended of each stage that has parameters in it."""
        if self._is_split:
            self.ddp.expect(0)
            self._weights_left = dict.fromkeys(self._own, count)
        else:
            several = {name: len(users) * count for name, users in self._users.items() if len(users) > 1}
            self.ddp.expect(count, several)

    def _on_weights(self, stage: int) -> None:
        self._weights_left[stage] -= 1
        if not self._weights_left[stage]:
            ended = {own for own, left in self._weights_left.items() if not left}
            self.ddp.complete(p for name, p in self._parts.model.named_parameters() if self._users[name] <= ended)

    def _run(self, step: _Step) -> None:
        """Run the schedule on a step's micro-batches."""
        self._step_now = step
        numbers = torch.arange(len(step.batches))
        first = (numbers,) if 0 in self._own else ()
        target = {"target": numbers} if self._has_last else {}
        with self._idle.schedule():
            self._schedule_for(step.batches).step(*first, number=numbers, **target)
        self._step_now = None

    def _schedule_for(self, batches: Sequence[Batch]) -> Any:
        """torch's schedule for micro-batches of this number and shape."""
        shapes = {tuple(batch["input_ids"].shape) for batch in batches}
        assert len(shapes) == 1, f"micro-batches of a pipeline have one shape, not {shapes}"
        key = len(batches), *shapes.pop()
        if key not in self._schedules:
            self._schedules = {key: self._new_schedule(*key)}
        return self._schedules[key]

    def _new_schedule(self, count: int, rows: int, length: int) -> Any:
        own = [self._new_stage(stage, (rows, length)) for stage in self._own]
        name = self._parts.config.pipeline_schedule
        taken = own[0] if name in _OF_ONE_STAGE else own
        return _SCHEDULES[name](taken, count, loss_fn=lambda loss, _number: loss, scale_grads=False)

    def _new_stage(self, index: int, shape: tuple[int, int]) -> _Stage:
        config, last = cast(Cuttable, self._parts.model).config, self._stages.num_stages - 1
        dtype = torch.float32 if config.residual_in_fp32 else self._parts.compute_dtype
        rows, length = shape
        if self._parts.config.sequence_parallel:
            # Rows that do not split evenly are padded.
            length = -(-length // self.mesh.tensor_size)
        hidden = torch.empty(rows, length, config.hidden_size, dtype=dtype, device="meta", requires_grad=True)
        number = torch.zeros(1, dtype=torch.int64, device="meta")
        loss = torch.empty(1, dtype=torch.float32, device="meta", requires_grad=True)

        def run(number: int, entering: Tensor | None) -> Tensor:
            assert self._step_now is not None
            return self._step_now.run(index, number, entering)

        trained = [
            p for name, p in self._parts.model.named_parameters() if p.requires_grad and index in self._users[name]
        ]
        assert self._parts.groups is not None
        stage = _Stage(
            _Units(run, index == 0, trained), index, last + 1, self._parts.context.device,
            input_args=hidden if index else number, output_args=hidden if index < last else loss,
            group=self._parts.groups.of("pipe"),
        )  # fmt: skip
        stage.idle, stage.on_weights = self._idle, self._on_weights
        stage.graphs = {} if self._is_split and _GIVES_UP_GRAPHS else None
        return stage

    def _stages_that_use(self) -> dict[str, set[int]]:
        """Name of each parameter -> this rank's stages that use it: more than one if embedding and head share it."""
        stages = self._stages
        return {
            name: {stages.stage_of(unit) for unit in units} & set(self._own)
            for name, units in units_of(self._parts.model, stages.num_units).items()
        }

    def _counted(self, sums: Tensor) -> Tensor:
        """Only the last stage has sums."""
        return sums if self._has_last and self._counts_rows else torch.zeros_like(sums)

    def _counted_layers(self, layers: Tensor) -> Tensor:
        """Every stage has those of its own layers."""
        return layers if self._counts_rows else torch.zeros_like(layers)

    @property
    def _counts_rows(self) -> bool:
        """Whether this rank counts, of those that compute the same stages of the same rows."""
        return self.mesh.tensor_rank == self.mesh.context_rank == 0

    def evaluate(self, batch: Batch, task: Task) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        with self._chain.one_way():
            loss, count, metrics = task(self._parts.to_device(batch))
        own = {name: self._counted(value) for name, value in metrics.items()}
        return self._counted(loss), count if self._has_last and self._counts_rows else 0, own

    def describe(self) -> str:
        stages, schedule = self._stages, self._parts.config.pipeline_schedule
        return f"pipeline of {stages.num_stages} stages ({schedule}, units {stages}); {super().describe()}"
