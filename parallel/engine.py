"""What the training loop sees of parallelism.

An engine holds the model as its ranks share it, its gradients and its optimizer. A step of the loop:

    engine.forward_backward(micro_batches, task, plan)     sums of losses and metrics; None: the step was dropped
    engine.step(plan)                                      reduce, norm, take, release (contract.py)

`data_parallel.py` holds the engines of a model that is whole on every rank. `engines.py` opens one by name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from parallel.config import ParallelConfig, PowerSGDConfig
from parallel.context import DistContext
from parallel.contract import GradientSource, NamedState, Optimizer, StepResult
from parallel.mesh import Mesh

Batch = dict[str, Tensor]


class Task(Protocol):
    """A batch's loss under the model; tasks/language_model.py says more."""

    metric_names: Sequence[str]
    uses_prepass: bool
    grad_scale: float

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """(sum of the losses, their count, sums of the metrics)."""

    def prepass(self, batch: Batch) -> Tensor: ...

    def take_prepass(self, sums: Tensor) -> None: ...


@dataclass(frozen=True)
class StepPlan:
    """A step that begins."""

    number: int
    """Number of the step, from 1."""
    lr: float
    count: int
    """Terms of the loss in the whole global batch: what gradients are divided by."""
    loss_scale: float
    """What the loss is multiplied by (float16)."""
    before_update: Callable[[], None]
    """To be called before anything changes that a checkpoint holds. More than one call does no harm."""
    shall_drop: Callable[[int, int], bool] | None = None
    """Asked between micro-batches, with their number so far and in all: whether to drop the step. Collective; None:
    there is nobody to ask."""


class Sums(NamedTuple):
    """This rank's sums over a step's micro-batches, on the device."""

    loss: Tensor
    """float64 scalar."""
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Traffic:
    """What each rank sends in a step."""

    bytes_per_s: float
    """Each way, by the slowest rank, measured now."""
    sent: Mapping[str, float]
    """Name of what is sent -> bytes; gradients first."""


class Engine(Protocol):
    mesh: Mesh
    is_sharded: bool
    """Whether ranks hold different pieces of the optimizer's state; otherwise all hold the same."""

    def forward_backward(self, micro_batches: Sequence[Batch], task: Task, plan: StepPlan) -> Sums | None:
        """This rank's micro-batches of a step. None: the step was dropped, and all but the gradients is as before."""

    def step(self, plan: StepPlan) -> StepResult:
        """Reduce the gradients and step with them. Afterwards they are zero, also if the step was skipped."""

    def evaluate(self, batch: Batch, task: Task) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """What `task` returns for a validation batch."""

    def settle(self) -> None:
        """Wait until the model's weights are whole, outside training time: before they are read."""

    def check_replicas(self, step: int) -> None:
        """Compare what ranks must hold alike. Collective.

        Raises:
            ReplicaDrift: they do not; on all ranks.
        """

    def communication_s(self) -> float:
        """Seconds that training has waited for communication since the last call."""

    def nonfinite_parameters(self) -> list[str]:
        """This rank's parameters whose gradients were not finite in the last step, as far as that was looked for."""

    def records(self) -> Mapping[str, dict]:
        """Results' records of the last step beside the usual one: name -> fields."""

    def named_state(self) -> NamedState:
        """This rank's pieces of the optimizer's state: views, to be saved, or filled and then `take_state`n."""

    def scalar_state(self) -> dict:
        """The rest of the optimizer's state, for JSON."""

    def local_state(self) -> dict[str, Tensor] | None:
        """What this rank's communication remembers beside that; None: nothing."""

    def take_state(self, scalars: dict) -> None:
        """The tensors of `named_state` were filled: set the model's weights from them. Collective."""

    def take_local_states(
        self, states: Iterable[tuple[Mapping[str, Tensor], bool]], step: int, name: str
    ) -> list[str]:
        """Take up `local_state` of the ranks that saved.

        Args:
            states: of each of them, and whether this rank is to take up its part. Only the first is for all ranks.
            step: completed steps.
            name: of the checkpoint, for the sentences.
        Returns:
            sentences on what has no place here.
        """

    def describe(self) -> str:
        """How the ranks share the work, for people."""

    def traffic(self) -> Traffic | None:
        """What a step sends; None: nothing, or nobody knows. Collective, as the network's speed is measured."""

    def advice(self, traffic: Traffic, compute_s: float) -> str | None:
        """A sentence for who could save time by other flags.

        Args:
            compute_s: what a step computes for, at half the peak.
        """

    def close(self) -> None:
        """End threads; work that was not waited for is finished first."""


@dataclass(frozen=True)
class EngineParts:
    """What every engine is opened with."""

    config: ParallelConfig
    powersgd: PowerSGDConfig
    context: DistContext
    mesh: Mesh
    model: nn.Module
    """In its training dtype, on its device."""
    to_device: Callable[[Batch], Batch]
    new_optimizer: Callable[[GradientSource], Optimizer]
    square: Callable[[Tensor], Tensor]
    """Sum of the squares of a 1-D tensor, float64 scalar: the optimizer's kernel for it."""
    loss_scale: Callable[[], float]
    """float16's loss scale at present; 1 without."""
    is_fp16: bool
    seed: int
