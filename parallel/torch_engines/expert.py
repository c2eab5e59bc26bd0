"""Expert parallelism: data ranks share the experts of each layer, and send each other tokens (GShard: Lepikhin et al.,
2020).

With 4 experts on 2 ranks, each of which has rows of its own:

    rank 0   router | counts | pairs ->  experts 0, 1 on the pairs of both ranks  -> results | sum by token
    rank 1   router | counts | pairs ->  experts 2, 3 on the pairs of both ranks  -> results | sum by token

A pair is a token with one of its K experts. Pairs travel sorted by expert, so their numbers say all about them. No pair
is dropped: an expert gets what is sent to it, even if all goes to one rank and another one has nothing to do. The
backward pass is the same the other way round: gradients of results travel to the experts, those of tokens back. So the
gradient of an expert covers the rows of all ranks that share it, and only its copies remain to be added up.

A token goes twice to a rank that holds two of its experts, so that no kernel needs to know of it. Bytes that a rank
sends in a layer, if the load is even, of N tokens of C elements of b bytes over R ranks:

    forward pass     (R - 1) / R x N K (2 C b + 4)      tokens with their float32 weights; results
    backward pass    (R - 1) / R x N K (2 C b + 4)      gradients of the results; those of tokens and weights
    activation checkpointing repeats the forward pass's
"""

from collections.abc import Callable, Iterable
from math import gcd
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.division import Division
from parallel.groups import Groups

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


def check(division: Division) -> None:
    """
    Raises:
        ValueError: the experts of a model cannot be shared in this way; on all ranks.
    """
    size, flag = division.mesh.expert_size, "--expert_model_parallel_size"
    if size == 1:
        return
    stacks = [outline.shape[0] for outline in division.outlines.values() if outline.is_stack]
    if not stacks:
        raise ValueError(f"{flag}={size}: the model has no experts: leave it out")
    if (num_experts := stacks[0]) % size:
        common = gcd(num_experts, division.mesh.data_size)
        divisors = [n for n in range(1, common + 1) if common % n == 0]
        nearest = min(divisors, key=lambda n: (abs(n - size), n))
        raise ValueError(
            f"{flag}={size}: {num_experts} experts cannot be shared evenly by {size} ranks: "
            + (f"{flag}={nearest} is the nearest possible" if nearest > 1 else "leave it out")
        )


def cut(model: nn.Module, division: Division, groups: Groups) -> None:
    """Let each layer of a model without values (model/moe.py: Experts) keep this rank's experts alone. Collective."""
    exchange = Exchange(cast(dist.ProcessGroup, groups.of("expert")))
    for name, module in model.named_modules():
        if not hasattr(module, "exchange"):
            continue
        experts: Any = module
        experts.exchange = exchange
        for own, parameter in list(module.named_parameters(recurse=False)):
            held = division.held(f"{name}.{own}")
            assert held is not None, name
            part = nn.Parameter(parameter.new_empty(held.shape), parameter.requires_grad)
            module.register_parameter(own, part)


class Exchange:
    """Brings pairs of token and expert to the ranks that hold the experts, and the results back. One serves all layers.

    On a GPU, the host waits once: for the numbers of pairs, as memory must be had for those that come.

    Shapes: S this rank's pairs, sorted by expert; A those that arrive here, sorted by rank and then by expert; E
    experts, of which R ranks hold L each; C hidden size.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.num_ranks = group, dist.get_world_size(group)

    @torch.compiler.disable
    def __call__(self, x_SC: Tensor, weights_S: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
        """See model/kernels/experts.py."""
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=self.group)
        sent, arriving = torch.stack((counts_E, arriving_E)).view(2, self.num_ranks, -1).sum(-1).tolist()
        x_AC, weights_A = _Exchange.apply(self.group, sent, arriving, x_SC, weights_S)
        arriving_RL = arriving_E.view(self.num_ranks, -1)
        local_RL = torch.arange(arriving_RL.shape[1], device=x_SC.device).expand_as(arriving_RL)
        experts_A = local_RL.flatten().repeat_interleave(arriving_E, output_size=sum(arriving))
        y_AC = compute(x_AC, experts_A[:, None], weights_A[:, None])
        (y_SC,) = _Exchange.apply(self.group, arriving, sent, y_AC)
        return y_SC


class _Exchange(torch.autograd.Function):
    """Rows to and from the ranks of a group. The backward pass sends gradients the way back."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, sent: list[int], arriving: list[int], *tensors: Tensor):
        ctx.group, ctx.sent, ctx.arriving = group, sent, arriving
        return tuple(_exchange(group, sent, arriving, tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        return None, None, None, *_exchange(ctx.group, ctx.arriving, ctx.sent, gradients)


def _exchange(
    group: dist.ProcessGroup, sent: list[int], arriving: list[int], tensors: Iterable[Tensor]
) -> list[Tensor]:
    """The rows that arrive, in the ranks' order.

    Args:
        sent, arriving: numbers of rows that go to each rank, and come from it.
        tensors: whose rows are sent, in the ranks' order.
    """
    parts = [tensor.contiguous() for tensor in tensors]
    results = [part.new_empty(sum(arriving), *part.shape[1:]) for part in parts]
    works = [
        dist.all_to_all_single(result, part, arriving, sent, group=group, async_op=True)
        for result, part in zip(results, parts)
    ]  # fmt: skip
    for work in works:
        work.wait()
    return results
