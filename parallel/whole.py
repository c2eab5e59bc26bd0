"""Whole parameters of a model that is cut over the ranks, each on the ranks that ask for it.

A gather would give every rank everything: for a checkpoint, where each of N ranks writes its part of the parameters, N
times what it needs. So each rank sends its piece of a parameter to those alone that want it, a block at a time:

    rank 0 wants a        [a rows 0-1] [b columns 0-1]                 [a rows 0-3]
    rank 1 wants b        [a rows 2-3] [b columns 2-3]      ->         [b columns 0-3]

All ranks know what each holds (division.py), so they agree on the transfers without a word. Of several ranks that hold
the same piece, the nearest to the one that wants it sends: itself, then one of its machine, then one of its data rank;
among equals the one that has less to send.
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from checkpoint.named import Piece
from parallel.division import Division, Outline
from parallel.groups import Groups
from parallel.mesh import Mesh

_BLOCK = re.compile(r"layers\.\d+\.")


def outlines_of(division: Division, dtype: torch.dtype) -> dict[str, Tensor]:
    """Name of each parameter of the whole model -> a tensor like the whole of it, without values.

    Args:
        dtype: dtype to compute in.
    """
    return {
        name: torch.empty(its.shape, dtype=_dtype_of(its, dtype), device="meta")
        for name, its in division.outlines.items()
    }


def _dtype_of(outline: Outline, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if outline.is_float32 else dtype


class Transfer(NamedTuple):
    """A piece of a parameter that one rank wants and another one, or itself, has."""

    piece: Piece
    source: int
    target: int


def plan_transfers(names: Sequence[str], wanted: Sequence[Set[str]], division: Division) -> list[Transfer]:
    """The transfers that make parameters whole, by target and then by name.

    Args:
        wanted: for each rank, names of the parameters that it wants.
    """
    mesh, to_send = division.mesh, [0] * len(wanted)
    pieces = {name: division.pieces(name) for name in names if any(name in theirs for theirs in wanted)}
    transfers = []
    for target, theirs in enumerate(wanted):
        for piece, holders in (each for name in names if name in theirs for each in pieces[name].items()):
            source = min(holders, key=partial(_distance, mesh, to_send, target))
            to_send[source] += piece.numel if source != target else 0
            transfers.append(Transfer(piece, source, target))
    return transfers


def _distance(mesh: Mesh, to_send: Sequence[int], target: int, source: int) -> tuple[bool, bool, bool, int, int]:
    """Orders the ranks that could send something to another one.

    Args:
        to_send: elements that each rank has to send already.
    """
    is_far = source // mesh.machine_size != target // mesh.machine_size
    is_other_data = mesh.at(source).data_rank != mesh.at(target).data_rank
    return source != target, is_far, is_other_data, to_send[source], source


@torch.no_grad()
def whole_weights(
    parameters: Mapping[str, Tensor], names: Set[str], division: Division, groups: Groups, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Parameters of these names, whole, in order of the model; one after the other, as `Engine.whole_weights` says.
    Collective: each rank may name others.

    Args:
        parameters: name -> what this rank holds of a parameter, in the order of its piece's elements; under FSDP its
            rows alone. Their dtype may be another one.
        dtype: dtype to compute in.
    """
    context = groups.context
    wanted = [set(theirs) for theirs in context.gather(sorted(names))]
    group = groups.among("whole weights", [tuple(range(context.world_size))])

    def unit_of(name: str) -> tuple[str, torch.dtype]:
        return (_BLOCK.match(name) or [""])[0], _dtype_of(division.outlines[name], dtype)

    for (_, its_dtype), unit in groupby(division.outlines, key=unit_of):
        in_order = list(unit)
        transfers = plan_transfers(in_order, wanted, division)
        own = {
            t.piece.name: parameters[t.piece.name].detach().to(context.device, its_dtype).reshape(-1)
            for t in transfers if t.source == context.rank
        }  # fmt: skip
        nothing = torch.empty(0, dtype=its_dtype, device=context.device)
        received = _exchange(own, transfers, context.rank, group, nothing)
        for name in in_order:
            if name in names:
                yield name, _joined(received.pop(name))


def _exchange(
    own: Mapping[str, Tensor], transfers: Sequence[Transfer], rank: int, group: dist.ProcessGroup | None,
    nothing: Tensor,
) -> dict[str, list[tuple[Piece, Tensor]]]:  # fmt: skip
    """The pieces that this rank wants, by name.

    Args:
        own: this rank's pieces, 1-D.
        nothing: an empty tensor of their device and dtype.
    """
    found: dict[str, list[tuple[Piece, Tensor]]] = {}
    for piece, source, target in transfers:
        if source == target == rank:
            found.setdefault(piece.name, []).append((piece, own[piece.name]))
    sent = [its for its in transfers if its.source != its.target]
    if not sent:
        return found
    assert group is not None
    ranks = range(dist.get_world_size(group))
    # To each rank its pieces one after the other, and so from each.
    outgoing = [[own[t.piece.name] for t in sent if t.source == rank and t.target == other] for other in ranks]
    incoming = [[t.piece for t in sent if t.source == other and t.target == rank] for other in ranks]
    sizes = [sum(piece.numel for piece in pieces) for pieces in incoming]
    received = nothing.new_empty(sum(sizes))
    dist.all_to_all_single(
        received, torch.cat([nothing, *(part for parts in outgoing for part in parts)]), sizes,
        [sum(part.numel() for part in parts) for parts in outgoing], group,
    )  # fmt: skip
    pieces = [piece for each in incoming for piece in each]
    for piece, part in zip(pieces, received.split([piece.numel for piece in pieces])):
        found.setdefault(piece.name, []).append((piece, part))
    return found


def _joined(pieces: Sequence[tuple[Piece, Tensor]]) -> Tensor:
    """A whole parameter."""
    first, flat = pieces[0]
    whole = Piece.whole(first.name, first.shape)
    assert sum(piece.numel for piece, _ in pieces) == whole.numel, f"{first.name} is not held by the ranks as a whole"
    if first == whole:
        return flat.view(first.shape)
    joined = flat.new_empty(first.shape)
    for piece, part in pieces:
        for box, values in piece.parts_of(part):
            joined[tuple(slice(start, start + n) for start, n in zip(box.start, box.length))] = values
    return joined
