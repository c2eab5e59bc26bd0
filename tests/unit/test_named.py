"""Named state: whatever pieces wrote a checkpoint, any other pieces are filled from it as plain slicing would."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.named import Box, LazyTensors, Piece, flat_boxes, holds_named_state, keyed, load_named_state

Cut = Callable[[random.Random, str, tuple[int, ...]], list[Piece]]


def cuts_of(generator: random.Random, size: int, most: int = 4) -> list[int]:
    """[0, ..., size] with some borders in between, some of which may be equal."""
    return [0, *sorted(generator.randint(0, size) for _ in range(generator.randrange(most))), size]


def flat_slices(generator: random.Random, name: str, shape: tuple[int, ...]) -> list[Piece]:
    borders = cuts_of(generator, torch.Size(shape).numel())
    return [Piece.flat(name, shape, a, b - a) for a, b in zip(borders, borders[1:])]


def grid(generator: random.Random, name: str, shape: tuple[int, ...]) -> list[Piece]:
    """Boxes of a mesh; some of them are put together into one piece."""
    boxes = [Box((), ())]
    for size in shape:
        borders = cuts_of(generator, size)
        boxes = [
            Box((*box.start, a), (*box.length, b - a)) for box in boxes for a, b in zip(borders, borders[1:])
        ]
    generator.shuffle(boxes)
    pieces = []
    while boxes:
        taken = generator.randint(1, 3)
        pieces.append(Piece(name, shape, tuple(boxes[:taken])))
        boxes = boxes[taken:]
    return pieces


def expected(piece: Piece, whole: Tensor) -> Tensor:
    """1-D: the piece's elements by plain slicing."""
    parts = [whole[tuple(slice(a, a + n) for a, n in zip(box.start, box.length))] for box in piece.boxes]
    return torch.cat([part.reshape(-1) for part in parts]) if parts else whole.new_zeros(0)


def shaped(piece: Piece, tensor: Tensor, generator: random.Random) -> Tensor:
    """A flat tensor, or one in the shape of the only box: contiguous, or part of something larger."""
    if len(piece.boxes) != 1 or generator.random() < 0.4:
        return tensor
    shape = piece.boxes[0].length
    if not shape or generator.random() < 0.5:
        return tensor.view(shape)
    wide = tensor.new_full((*shape[:-1], shape[-1] + 3), -2.0)
    inside = wide[..., 1:-2]
    inside.copy_(tensor.view(shape))
    return inside


@pytest.mark.parametrize("seed", range(12))
def test_any_pieces_are_filled_from_any_others(tmp_path: Path, seed: int):
    generator = random.Random(seed)
    wholes, wanted, values = {}, [], []
    files: list[dict[str, Tensor]] = [{} for _ in range(3)]
    for number in range(12):
        name, shape = f"p.{number}", tuple(generator.randint(1, 6) for _ in range(generator.randrange(5)))
        whole = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) + 1000 * number
        wholes[name] = whole
        write, read = generator.choice([flat_slices, grid]), generator.choice([flat_slices, grid])
        for piece in write(generator, name, shape):
            tensor = shaped(piece, expected(piece, whole), generator)
            generator.choice(files).update(keyed(piece, {"main": tensor, "exp_avg": -tensor}))
        for piece in read(generator, name, shape):
            empty = torch.full((piece.numel,), -1.0)
            wanted.append((piece, {key: shaped(piece, empty.clone(), generator) for key in ("main", "exp_avg")}))
            values.append(expected(piece, whole))
    for rank, tensors in enumerate(files):
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / f"optim-{rank}.safetensors")
    assert holds_named_state([tmp_path], wanted)
    assert all((tensor == -1.0).all() for _, tensors in wanted for tensor in tensors.values())
    load_named_state([tmp_path], wanted)
    for (_, tensors), value in zip(wanted, values):
        assert torch.equal(tensors["main"].reshape(-1), value) and torch.equal(tensors["exp_avg"].reshape(-1), -value)


def test_boxes_of_a_flat_slice():
    for shape in ((), (5,), (4, 3), (2, 3, 4), (1, 3, 1, 2)):
        size = torch.Size(shape).numel()
        numbers = torch.arange(size).view(shape)
        for start in range(size + 1):
            for end in range(start, size + 1):
                boxes = list(flat_boxes(shape, start, end))
                assert len(boxes) <= max(2 * len(shape) - 1, 1)
                assert expected(Piece("w", shape, tuple(boxes)), numbers).tolist() == list(range(start, end))


def test_keys():
    """Flat slices keep the form of earlier versions, and those in one piece stay one."""
    whole = torch.arange(12.0).view(4, 3)

    def keys(*boxes: Box) -> list[str]:
        piece = Piece("a.w", (4, 3), boxes)
        return list(keyed(piece, {"main": expected(piece, whole)}))

    assert list(keyed(Piece.flat("a.w", (4, 3), 2, 8), {"main": torch.zeros(8)})) == ["a.w@2/main"]
    assert keys(Box((1, 0), (2, 3))) == ["a.w@3/main"]
    assert keys(Box((2, 1), (1, 2))) == ["a.w@7/main"]
    assert keys(Box((0, 1), (4, 2))) == ["a.w@0:4,1:2/main"]
    assert keys(Box((0, 0), (1, 3)), Box((3, 0), (1, 3))) == ["a.w@0/main", "a.w@9/main"]
    assert keys(Box((4, 0), (0, 3))) == []


@pytest.mark.parametrize("is_flat", [True, False])
def test_missing_and_doubled_elements_are_counted(tmp_path: Path, is_flat: bool):
    boxes = [Box((0, 0), (4, 2)), Box((0, 1), (4, 2))]
    save_file(keyed(Piece("w", (4, 3), (boxes[0],)), {"main": torch.zeros(4, 2)}), tmp_path / "optim-0.safetensors")
    whole = Piece.flat("w", (4, 3), 0, 12) if is_flat else Piece("w", (4, 3), (Box((0, 0), (4, 3)),))
    with pytest.raises(ValueError, match=r"holds 8 of 12 elements of w \(main\)"):
        load_named_state([tmp_path], [(whole, {"main": torch.zeros(12)})])
    save_file(keyed(Piece("w", (4, 3), (boxes[1],)), {"main": torch.zeros(4, 2)}), tmp_path / "optim-1.safetensors")
    with pytest.raises(ValueError, match=r"holds 16 of 12 elements of w \(main\)"):
        load_named_state([tmp_path], [(whole, {"main": torch.zeros(12)})])
    # Nothing is taken from a parameter with another number of dimensions.
    assert not holds_named_state([tmp_path], [(Piece.flat("w", (12,), 0, 1), {"main": torch.zeros(1)})])


@pytest.mark.parametrize("key", ["w/main", "w@x/main", "w@0:2,5/main", "w@0:1:2/main", "w@0:3,0:2/main"])
def test_a_key_that_says_nothing_is_refused(tmp_path: Path, key: str):
    save_file({key: torch.zeros(2, 2)}, tmp_path / "optim-0.safetensors")
    with pytest.raises(ValueError, match=f"cannot be read: it has the key {key}"):
        load_named_state([tmp_path], [])


def test_of_a_flat_slice_only_the_range_around_the_wanted_elements_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read: list[int] = []
    as_strided, whole = torch.as_strided, torch.arange(60.0).view(6, 10)

    def watched(tensor: Tensor, *arguments: object) -> Tensor:
        read.append(tensor.numel())
        return as_strided(tensor, *arguments)

    monkeypatch.setattr(torch, "as_strided", watched)
    save_file({"w@0/main": whole.reshape(-1)}, tmp_path / "optim-0.safetensors")
    target = torch.zeros(2, 3)
    load_named_state([tmp_path], [(Piece("w", (6, 10), (Box((2, 4), (2, 3)),)), {"main": target})])
    assert torch.equal(target, whole[2:4, 4:7]) and read == [13]


def test_a_piece_that_two_replicas_wrote_counts_once(tmp_path: Path):
    whole = torch.arange(12.0)
    for rank in range(2):
        first, rest = whole.view(4, 3)[:, :1].clone(), whole.view(4, 3)[:, 1:].clone()
        parts = {"w@0:4,0:1/main": first, "w@0:4,1:2/main": rest}
        save_file(parts, tmp_path / f"optim-{rank}.safetensors")
    target = torch.zeros(12)
    load_named_state([tmp_path], [(Piece.flat("w", (4, 3), 0, 12), {"main": target})])
    assert torch.equal(target, whole)


def test_tensors_that_are_not_in_a_file_are_missing_keys(tmp_path: Path):
    save_file({"w/q": torch.ones(2)}, tmp_path / "comm_hook-0.safetensors")
    tensors = LazyTensors(tmp_path / "comm_hook-0.safetensors")
    assert list(tensors) == ["w/q"] and "w/q" in tensors and "v/q" not in tensors
    assert tensors.get("v/q") is None and torch.equal(tensors["w/q"], torch.ones(2))
    with pytest.raises(KeyError):
        tensors["v/q"]
