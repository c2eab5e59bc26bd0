"""The interface between the training loop and parallelism.

An engine holds the model as the ranks share it, its gradients and its optimizer. A step of the loop:

    engine.forward_backward(micro_batches, task, plan)     sums of losses and metrics; None: the step was dropped
    engine.step(plan)                                      reduce, norm, take, release (contract.py)

`data_parallel.py` has the engines for a model that is whole on every rank, `torch_engines/` those for one that is cut
over the ranks. `engines.py` opens an engine by name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from checkpoint.named import NamedState, Piece
from parallel.config import ParallelConfig, PowerSGDConfig
from parallel.context import DistContext
from parallel.contract import GradientSource, Named, Optimizer, StepResult
from parallel.division import Division
from parallel.groups import Groups
from parallel.layout import ALIGNMENT
from parallel.mesh import Mesh
from parallel.stages import Stages

Batch = dict[str, Tensor]


class LayerLosses(Protocol):
    """Lets the layers of a model add losses of their own; model/layer_losses.py has the details."""

    sums: Tensor | None


class Task(Protocol):
    """Computes a batch's loss under the model; tasks/language_model.py has the details."""

    uses_prepass: bool
    grad_scale: float

    @property
    def metric_names(self) -> Sequence[str]: ...

    def layer_losses(self, batch: Batch, scale: float) -> LayerLosses | None:
        """What the layers need to add their own losses to a batch's, if they have any."""

    def __call__(
        self, batch: Batch, losses: LayerLosses | None = None
    ) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """Returns (sum of the losses, their count, sums of the metrics)."""

    def prepass(self, batch: Batch) -> Tensor: ...

    def take_prepass(self, sums: Tensor) -> None: ...


@dataclass(frozen=True)
class StepPlan:
    """The facts of one step, known before it begins."""

    number: int
    """Number of the step, from 1."""
    lr: float
    count: int
    """Terms of the loss in the whole global batch, by which gradients are divided."""
    before_update: Callable[[], None]
    """Must be called before anything that a checkpoint holds changes. More than one call is harmless."""
    shall_drop: Callable[[int, int], bool] | None = None
    """Whether to drop the step: called between micro-batches, with their number so far and in all. Collective; None:
    never drop it."""


class Sums(NamedTuple):
    """This rank's sums over a step's micro-batches, on the device. All ranks' sums are added: where several ranks work
    on the same rows, only one of them returns the rows' part, and the others zeros."""

    loss: Tensor
    """float64 scalar."""
    metrics: dict[str, Tensor]
    layers: Tensor | None = None
    """What the layers with experts have counted, float64 (layers, sums); see model/layer_losses.py."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that each rank and each machine sends in a step, and the network's speed."""

    bytes_per_s: float
    """Speed each way of the slowest rank, as measured."""
    sent: Mapping[str, float]
    """Purpose -> bytes; gradients first."""
    sent_by_machine: Mapping[str, float] = field(default_factory=dict)
    """Purpose -> bytes that each machine sends to the others; empty if there is one machine, or one rank on each."""
    remark: str = ""
    """A few words on why the ranks' machines make no difference, if they could."""


class Engine(Protocol):
    mesh: Mesh
    state_holders: tuple[int, ...]
    """The ranks that hold the same pieces of the optimizer's state as this one, which is among them."""
    is_cut: bool
    """Whether the model is cut over the ranks, so that each holds its part alone."""
    forward_is_collective: bool
    """Whether ranks send each other weights or activations while the model computes. All ranks must then compute the
    same number of forward passes, in training and in validation, and for samples of text."""

    def forward_backward(self, micro_batches: Sequence[Batch], task: Task, plan: StepPlan) -> Sums | None:
        """Run this rank's micro-batches of a step. None: the step was dropped; only the gradients have changed."""

    def step(self, plan: StepPlan) -> StepResult:
        """Reduce the gradients and step. Afterwards the gradients are zero, also if the step was skipped."""

    def evaluate(self, batch: Batch, task: Task) -> tuple[Tensor, Tensor | int, dict[str, Tensor]]:
        """Result of `task` for a validation batch; like `Sums`, on one of the ranks that work on it. After the last
        batch comes `end_forward`."""

    def end_forward(self) -> None:
        """Give up what forward passes without a backward pass have left in memory, such as gathered weights."""

    def settle(self) -> None:
        """Wait until the model's weights are whole. Call it before reading them; it does not count as training time."""

    def outlines(self) -> dict[str, Tensor]:
        """Name of each of the model's parameters -> a tensor like the whole of it, without values, in the compute
        dtype (a router's bias in float32)."""

    def whole_weights(self, names: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """Parameters of these names, whole, in the dtypes of `outlines`, one after the other: for a checkpoint.
        Collective if the model is cut: each rank may name others, has to take all that come, and must copy each before
        the next."""

    def check_replicas(self, step: int) -> None:
        """Check that ranks agree on the state that they share. Collective.

        Raises:
            ReplicaDrift: they differ; on all ranks.
        """

    def communication_s(self) -> float:
        """Seconds that training has waited for communication since the last call."""

    def nonfinite_parameters(self) -> list[str]:
        """This rank's parameters whose gradients were not finite in the last step; empty if that was not checked."""

    def records(self) -> Mapping[str, dict]:
        """Additional records of the last step for the results' file: name -> fields."""

    def named_state(self) -> NamedState:
        """This rank's pieces of the optimizer's state, as views: to save, or to fill before `take_state`."""

    def holders_of(self, piece: Piece) -> Sequence[int]:
        """The ranks that hold the same of a piece in `named_state`, this one among them: at least `state_holders`."""

    def scalar_state(self) -> dict:
        """The rest of the optimizer's state, for JSON."""

    def local_state(self) -> dict[str, Tensor] | None:
        """State of this rank's communication; None if it has none."""

    def take_state(self, scalars: dict) -> None:
        """Set the model's weights from the tensors of `named_state`, once those are filled. Collective."""

    def take_local_states(
        self, states: Iterable[tuple[Mapping[str, Tensor], bool]], step: int, name: str
    ) -> list[str]:
        """Take up the `local_state` that ranks have saved.

        Args:
            states: each saved rank's state, and whether this rank is to take up its part. The first state is for all
                ranks.
            step: completed steps.
            name: the checkpoint's, for the sentences.
        Returns:
            sentences on state that has no place here.
        """

    def describe(self) -> str:
        """A line on how the ranks share the work, for people."""

    def traffic(self) -> Traffic | None:
        """Traffic of a step; None if there is none or it is unknown. Collective: it measures the network's speed."""

    def advice(self, traffic: Traffic, compute_s: float) -> str | None:
        """A sentence on flags that would save time; None if there is nothing to advise.

        Args:
            compute_s: a step's compute time at half the peak.
        """

    def close(self) -> None:
        """Finish all submitted work and end threads."""


@dataclass(frozen=True)
class EngineParts:
    """The parts that every engine is opened with."""

    config: ParallelConfig
    powersgd: PowerSGDConfig
    context: DistContext
    mesh: Mesh
    model: nn.Module
    """The model, in its training dtype and on its device."""
    to_device: Callable[[Batch], Batch]
    new_optimizer: Callable[[GradientSource], Optimizer]
    square: Callable[[Tensor], Tensor]
    """The optimizer's kernel for the sum of the squares of a 1-D tensor: float64 scalar."""
    loss_scale: Callable[[], float]
    """float16's current loss scale; 1 for other dtypes."""
    is_fp16: bool
    seed: int
    compute_dtype: torch.dtype = torch.float32
    """dtype of the weights that matmuls see."""
    alignment: int = ALIGNMENT
    """Multiple of elements, counted from a parameter's start, at which the optimizer's slices may begin."""
    alignment_of: Callable[[Named], int] = lambda parameter: 1
    """The same for a parameter, as far as the optimizer cannot do without."""
    micro_batches: int = 1
    """Micro-batches of a step on each rank."""
    rebalance: Callable[[Tensor], None] | None = None
    """Called after each step that was not skipped, with the `layers` of the global batch (`Sums`), on the CPU: moves
    the biases of the routers, alike on all ranks. None: they do not move."""
    division: Division | None = None
    """What each rank holds of a model that is cut; None: all of it."""
    groups: Groups | None = None
    """Process groups of the mesh; None: every rank works through the whole model, with rows of its own."""
    stages: Stages | None = None
    """Parts of the model in a pipeline."""
    widen: Callable[[Batch], Batch] = lambda batch: batch
    """Pads the rows of a batch to the length of the longest that there can be."""
