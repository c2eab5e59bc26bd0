"""Named state: tensors that belong to parts of parameters, such as a rank's share of the optimizer's state.

A part of a parameter is a `Piece`: the parameter's name, its whole shape, and boxes in it. A box is a start and a
length for each dimension. ZeRO-1 cuts a parameter into flat slices, tensor parallelism and FSDP cut it into rows or
columns; each of these is a piece, and a checkpoint that one of them wrote can be read by any other:

    flat slice of a 4 x 3 parameter          three boxes, one after the other     columns 1 and 2: one box
    elements [2, 10) of the flattened one    [0:1, 2:3] [1:3, 0:3] [3:4, 0:1]     [0:4, 1:3]

        .  .  2                                  .  .  a                              .  x  x
        3  4  5                                  b  b  b                              .  x  x
        6  7  8                                  b  b  b                              .  x  x
        9  .  .                                  c  .  .                              .  x  x

In a file (`optim-R.safetensors`) the key of a tensor says which part of which parameter it belongs to:

    NAME@OFFSET/STATE                      1-D: elements [OFFSET, OFFSET + its length) of the flattened parameter
    NAME@START:LENGTH,START:LENGTH/STATE   of this box: one START:LENGTH for each dimension, its shape is the lengths

A piece that is contiguous in the flattened parameter (a slice, whole rows, all of it) is written the first way.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.folder import OPTIMIZER_FILES

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """A start and a length for each dimension."""

    start: Shape
    length: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.length)

    def overlap(self, other: "Box") -> "Box | None":
        """The box of the elements that both hold; None if there are none."""
        start = tuple(map(max, self.start, other.start))
        length = tuple(
            min(a + n, b + m) - s for a, n, b, m, s in zip(self.start, self.length, other.start, other.length, start)
        )
        return Box(start, length) if all(n > 0 for n in length) else None

    def slices_in(self, outer: "Box") -> tuple[slice, ...]:
        """Slices of this box in a tensor of the box `outer`, which holds all of it."""
        return tuple(slice(a - b, a - b + n) for a, n, b in zip(self.start, self.length, outer.start))


@dataclass(frozen=True)
class Piece:
    """A part of a parameter."""

    name: str
    shape: Shape
    """Shape of the whole parameter."""
    boxes: tuple[Box, ...]
    """Boxes without common elements. A tensor of this piece holds their elements box after box, each in row-major
    order: it is 1-D, or contiguous, or has the shape of the only box and any strides."""

    @staticmethod
    def flat(name: str, shape: Sequence[int], offset: int, length: int) -> "Piece":
        """Elements [offset, offset + length) of the flattened parameter."""
        return Piece(name, tuple(shape), tuple(flat_boxes(tuple(shape), offset, offset + length)))

    @staticmethod
    def whole(name: str, shape: Sequence[int]) -> "Piece":
        """All of a parameter."""
        return Piece(name, tuple(shape), (Box((0,) * len(shape), tuple(shape)),))

    @property
    def numel(self) -> int:
        return sum(box.numel for box in self.boxes)

    def part(self, start: int, end: int) -> "Piece":
        """Elements [start, end) of a tensor of this piece, counted box after box."""
        boxes: list[Box] = []
        for box in self.boxes:
            inside = flat_boxes(box.length, max(start, 0), min(end, box.numel))
            boxes += (Box(tuple(map(sum, zip(box.start, its.start))), its.length) for its in inside)
            start, end = start - box.numel, end - box.numel
        return Piece(self.name, self.shape, tuple(boxes))

    def parts_of(self, tensor: Tensor) -> list[tuple[Box, Tensor]]:
        """Each box with the view of `tensor` that has its shape."""
        assert tensor.numel() == self.numel, f"{tuple(tensor.shape)} for {self}"
        if len(self.boxes) == 1 and tensor.shape == self.boxes[0].length:
            return [(self.boxes[0], tensor)]
        parts = tensor.view(-1).split([box.numel for box in self.boxes])
        return [(box, part.view(box.length)) for box, part in zip(self.boxes, parts)]


NamedState = Iterable[tuple[Piece, dict[str, Tensor]]]
"""Pieces, each with its tensors by the name of the state: "main", "exp_avg" ..."""


def flat_boxes(shape: Shape, start: int, end: int) -> Iterator[Box]:
    """Boxes of the elements [start, end) of a flattened tensor, in their order: at most 2d - 1 in d dimensions."""
    if not shape:
        yield from [Box((), ())] if start < end else []
        return
    inner = shape[1:]
    row_size = math.prod(inner)
    while start < end:
        row, within = divmod(start, row_size)
        rows = (end - start) // row_size
        if within == 0 and rows:
            yield Box((row, *(0 for _ in inner)), (rows, *inner))
            start += rows * row_size
        else:
            stop = min(end, (row + 1) * row_size)
            for box in flat_boxes(inner, within, stop - row * row_size):
                yield Box((row, *box.start), (1, *box.length))
            start = stop


def flat_offset(shape: Shape, boxes: Sequence[Box]) -> int | None:
    """Offset of the boxes in the flattened parameter if they make up one slice of it; None if they do not."""
    offset = _position(shape, boxes[0].start) if boxes else 0
    end = offset + sum(box.numel for box in boxes)
    return offset if tuple(boxes) == tuple(flat_boxes(shape, offset, end)) else None


def _position(shape: Shape, index: Sequence[int]) -> int:
    """Position of an element in the flattened tensor."""
    return sum(i * stride for i, stride in zip(index, _strides(shape)))


def _strides(shape: Shape) -> Shape:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def keyed(piece: Piece, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a piece under their keys in a file: one each if the piece is a flat slice, or one a box."""
    found: dict[str, Tensor] = {}
    offset = flat_offset(piece.shape, piece.boxes)
    for state, tensor in tensors.items() if piece.numel else ():
        if offset is not None:
            found[f"{piece.name}@{offset}/{state}"] = tensor.reshape(-1)
            continue
        for box, part in piece.parts_of(tensor):
            if box.numel:
                found |= _keyed_box(piece, box, state, part)
    return found


def _keyed_box(piece: Piece, box: Box, state: str, tensor: Tensor) -> dict[str, Tensor]:
    offset = flat_offset(piece.shape, [box])
    if offset is not None:
        return {f"{piece.name}@{offset}/{state}": tensor.reshape(-1)}
    return {f"{piece.name}@{','.join(map('{}:{}'.format, box.start, box.length))}/{state}": tensor}


class LazyTensors(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for.

    Raises:
        ValueError: the file does not exist, or holds no tensors.
    """

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt")
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        self._keys = dict.fromkeys(self._file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def holds_named_state(directories: Sequence[Path], wanted: NamedState) -> bool:
    """Whether `load_named_state` would find all elements in these folders."""
    try:
        load_named_state(directories, wanted, look_only=True)
    except ValueError:
        return False
    return True


def load_named_state(directories: Sequence[Path], wanted: NamedState, look_only: bool = False) -> None:
    """Fill the tensors of pieces from all `optim-*.safetensors` of a checkpoint, whatever pieces those hold.

    Reads the wanted part of a box, and of a flat slice everything from the first wanted element to the last.

    Args:
        directories: folders with its files.
        look_only: fill nothing, only check that everything is there.
    Raises:
        ValueError: some elements are in no file, or a file cannot be read.
    """
    stored = _stored_tensors(directories)
    for piece, tensors in wanted:
        for state, tensor in tensors.items():
            filled = 0
            for box, target in piece.parts_of(tensor):
                for source in stored.get((piece.name, state), ()):
                    for common in source.overlaps(piece.shape, box):
                        if not look_only:
                            target[common.slices_in(box)] = source.read(piece.shape, common)
                        filled += common.numel
            if filled != piece.numel:
                raise ValueError(f"{directories[0]} holds {filled} of {piece.numel} elements of {piece.name} ({state})")


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file: a flat slice of a parameter, or a box of it."""

    key: str
    handle: safe_open
    where: int | Box
    """Offset of the slice, or the box."""
    numel: int

    def overlaps(self, shape: Shape, wanted: Box) -> Iterator[Box]:
        """Boxes of the wanted elements that are stored here.

        Args:
            shape: of the whole parameter.
        """
        if isinstance(self.where, Box):
            boxes: Iterable[Box] = [self.where] if len(self.where.start) == len(shape) else []
        else:
            boxes = flat_boxes(shape, self.where, min(self.where + self.numel, math.prod(shape)))
        yield from filter(None, map(wanted.overlap, boxes))

    def read(self, shape: Shape, box: Box) -> Tensor:
        """The elements of a box that lies in one of the boxes stored here."""
        file_slice = self.handle.get_slice(self.key)
        if isinstance(self.where, Box):
            return file_slice[box.slices_in(self.where)]
        first = _position(shape, box.start) - self.where
        last = first + _position(shape, [n - 1 for n in box.length])
        return torch.as_strided(file_slice[first : last + 1], box.length, _strides(shape))


def _stored_tensors(directories: Sequence[Path]) -> dict[tuple[str, str], list[_Stored]]:
    """Tensors in the files: (parameter, state) -> the tensors that are parts of it.

    Raises:
        ValueError: a file cannot be read.
    """
    found: dict[tuple[str, str], list[_Stored]] = {}
    try:
        for file in sorted(file for directory in directories for file in directory.glob(OPTIMIZER_FILES)):
            handle = safe_open(file, framework="pt")
            for key in handle.keys():
                name, _, rest = key.rpartition("@")
                where, _, state = rest.partition("/")
                shape = tuple(handle.get_slice(key).get_shape())
                stored = _Stored(key, handle, _parse_place(where, shape), math.prod(shape))
                pieces = found.setdefault((name, state), [])
                # Replicas may have written the same piece.
                if all((stored.where, stored.numel) != (other.where, other.numel) for other in pieces):
                    pieces.append(stored)
    except SafetensorError as error:
        raise ValueError(f"the optimizer state in {directories[0]} cannot be read: {error}") from None
    except ValueError:
        raise ValueError(f"the optimizer state in {directories[0]} cannot be read: it has the key {key}") from None
    return found


def _parse_place(text: str, shape: Shape) -> int | Box:
    """Offset, or box, in the key of a tensor of this shape.

    Raises:
        ValueError: it is neither.
    """
    if ":" not in text:
        return int(text)
    starts, lengths = zip(*(map(int, pair.split(":")) for pair in text.split(",")), strict=True)
    if lengths != shape:
        raise ValueError(f"a box of {lengths} holds {shape}")
    return Box(starts, lengths)
