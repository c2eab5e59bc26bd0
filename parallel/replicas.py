"""Detection of replicas that have drifted apart.

Data-parallel ranks take the same step from the same sums, so their weights have the same bits. If they ever differ (a
bit flipped in memory, a different library on one host, a bug of ours), nothing shows it: each rank goes on with its own
model, the summed gradients belong to none of them, and the loss gets a little worse.

    every N steps, and before each save:   a checksum of the weights on each rank, 8 bytes -> gather -> the same?

The checksum is one pass over the weights' memory.
Megatron-LM has a similar comparison (--check-weight-hash-across-dp-replicas-interval).
"""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from parallel.context import DistContext
from parallel.division import Division

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaDrift(RuntimeError):
    """The ranks hold different weights."""


def checksum(tensors: Iterable[Tensor]) -> int:
    """Sum of the tensors' bits, read as integers, modulo 2**64. A change of any one element changes it. Tensors are
    weighted by position, so exchanging two of them changes it, too.

    Args:
        tensors: contiguous, of any shape, with dtypes of 1, 2, 4 or 8 bytes, on one device.
    """
    words = [word for tensor in tensors for word in _as_words(tensor.detach().view(-1))]
    if not words:
        return 0
    sums = torch.stack([word.sum(dtype=torch.int64) for word in words])
    # Odd weights: an even one would drop the highest bit.
    return int((sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum())


def _as_words(flat: Tensor) -> tuple[Tensor, ...]:
    """Its memory as 8-byte integers, which a CPU adds twenty times faster than narrower ones, and the remainder."""
    ratio = 8 // flat.itemsize
    if flat.storage_offset() % ratio:
        return (flat.view(_INTEGERS[flat.itemsize]),)
    whole = len(flat) // ratio * ratio
    return flat[:whole].view(torch.int64), flat[whole:].view(_INTEGERS[flat.itemsize])


def require_same_weights(context: DistContext, weights: Iterable[Tensor], step: int) -> None:
    """Compare the weights of all ranks. Collective; main thread only.

    Raises:
        ReplicaDrift: they differ; on all ranks.
    """
    if context.world_size > 1:
        _require_same([[*enumerate(context.gather(checksum(weights)))]], step)


def require_same_pieces(
    context: DistContext, division: Division, parameters: Iterable[tuple[str, Tensor]], buffers: Iterable[Tensor],
    step: int,
) -> None:  # fmt: skip
    """Compare what several ranks of a mesh hold alike. Collective; main thread only.

    Args:
        parameters: name -> what this rank holds of each.
        buffers: they are the same on ranks with the same stages, parts of matrices and experts.
    Raises:
        ReplicaDrift: they differ; on all ranks.
    """
    mesh = division.mesh
    # Parameters of one kind are held alike by the same ranks, of which the first one names the set.
    kinds: dict[str, list[Tensor]] = {f"buffers {mesh.pipe_rank} {mesh.tensor_rank} {mesh.expert_rank}": [*buffers]}
    for name, parameter in parameters:
        kind = division.kind(name)
        shard = mesh.shard_rank if kind.is_sharded else 0
        kinds.setdefault(f"{tuple(kind)} {division.held_alike(name)[0]} {shard}", []).append(parameter)
    own = {kind: checksum(tensors) for kind, tensors in kinds.items()}
    found: dict[str, list[tuple[int, int]]] = {}
    for rank, sums in enumerate(context.gather(own)):
        for kind, value in sums.items():
            found.setdefault(kind, []).append((rank, value))
    _require_same(found.values(), step)


def _require_same(sets: Iterable[list[tuple[int, int]]], step: int) -> None:
    """
    Args:
        sets: (rank, checksum) of ranks that must agree, each.
    Raises:
        ReplicaDrift: those of a set differ.
    """
    for sums in sets:
        (common, count), *others = Counter(value for _, value in sums).most_common()
        if not others:
            continue
        odd = ", ".join(str(rank) for rank, value in sums if value != common)
        who = f"the weights of rank {odd} are" if 2 * count > len(sums) else "the ranks' weights are"
        raise ReplicaDrift(
            f"{who} not the same as the others' after step {step}: go on from the last checkpoint with --resume; if it "
            f"happens again, one machine computes wrongly or differs from the others in software or processor "
            f"(--replica_check_interval=0 turns this check off)"
        )
