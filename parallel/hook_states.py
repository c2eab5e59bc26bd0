"""Memory of comm hooks that one mesh has saved and another one takes up.

Each rank saves what its hook remembers of the parameters that it holds (`CommHook.saved_state`): "PARAMETER/KIND". Only
the sum of a parameter's residuals over the ranks that add its gradients counts, so each saved rank's is given to one of
those that do so now: in the same mesh to itself. What cuts matrices must be as it was, or memories have other shapes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache, partial

from torch import Tensor

from parallel.comm_hooks import SavedStates
from parallel.division import Division
from parallel.mesh import Mesh


class _Chosen(Mapping[str, Tensor]):
    """Some of the tensors of several files.

    Args:
        places: key -> the file that it is taken from.
    """

    def __init__(self, places: Mapping[str, Mapping[str, Tensor]]):
        self._places = places

    def __getitem__(self, key: str) -> Tensor:
        return self._places[key][key]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def mesh_of(state: Mapping, world_size: int) -> Mesh:
    """The mesh that wrote a trainer_state.json, as its first rank sees it.

    Args:
        world_size: number of its ranks, all of which were data ranks if it says nothing else.
    """
    sizes = state.get("mesh", {"data": world_size})
    names = ("pipe", "data", "context", "tensor", "shard", "expert")
    return Mesh(0, **{f"{name}_size": sizes[name] for name in names if name in sizes})


def fits(saved: Mesh, now: Mesh) -> bool:
    """Whether memory can be taken up: matrices are cut as they were."""
    return (saved.tensor_size, saved.expert_size) == (now.tensor_size, now.expert_size)


def is_by_rank(saved: Mesh, now: Mesh) -> bool:
    """Whether each rank simply goes on with the memory of the rank with its number, or of those that it replaces."""
    return saved.is_data_alone and now.is_data_alone


def by_parameter(
    files: Mapping[int, Mapping[str, Tensor]], saved: Mesh, now: Mesh, division: Division | None
) -> SavedStates:
    """What this rank takes up: at first, of each parameter that it holds, what all ranks shared; then each saved rank's
    own memory, as far as it is for this rank. `fits` must be true.

    Args:
        files: saved rank -> its memory.
        saved, now: the meshes. The first one's rank does not matter.
        division: what each rank holds now; None: everything.
    """
    shared: dict[str, Mapping[str, Tensor]] = {}
    own: dict[int, dict[str, Mapping[str, Tensor]]] = {rank: {} for rank in files}
    takers_of = cache(partial(_takers, now=now, division=division))
    for rank, file in files.items():
        place = replace(saved, rank=rank)
        for key in file:
            takers = takers_of(key.rpartition("/")[0], place.tensor_rank, place.expert_rank)
            if now.rank in takers:
                shared.setdefault(key, file)
                if rank in takers and saved.world_size == now.world_size:
                    taker = rank
                else:
                    taker = takers[rank // saved.tensor_size % len(takers)]
                own[rank] |= {key: file} if taker == now.rank else {}
    yield _Chosen(shared), False
    yield from ((_Chosen(places), True) for places in own.values() if places)


def _takers(
    name: str, tensor_rank: int, expert_rank: int, now: Mesh, division: Division | None
) -> tuple[int, ...]:
    """The ranks that could take up the memory of a parameter.

    Args:
        tensor_rank, expert_rank: of the rank that has saved it.
    """
    if division is None or name not in division.outlines:
        # What no rank has any more, a sentence is said of.
        return tuple(range(now.world_size))
    outline = division.outlines[name]
    for rank in range(now.world_size):
        its = now.at(rank)
        is_like = its.tensor_rank == tensor_rank or outline.is_partial
        is_like = is_like and (its.expert_rank == expert_rank or not outline.is_stack)
        if is_like and division.held(name, rank) is not None:
            return division.summed_over(name, rank)
    return ()
