"""The layout of the flat buffers: properties that hold for any model, bucket size and world size."""

import random

import pytest
import torch

from parallel.buffer import Bucket, FlatBuffers
from parallel.division import Division, Outline
from parallel.layout import ALIGNMENT, ParameterSpec, plan_layout
from parallel.mesh import Mesh


def random_parameters(rng: random.Random) -> list[ParameterSpec]:
    shapes = [(rng.randint(1, 300),) if rng.random() < 0.4 else (rng.randint(1, 40), rng.randint(1, 40))
              for _ in range(rng.randint(1, 30))]  # fmt: skip
    return [ParameterSpec(f"p{i}", shape) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("seed", range(200))
def test_properties(seed: int):
    rng = random.Random(seed)
    parameters = random_parameters(rng)
    bucket_size, world_size = rng.choice([0, 1, 100, 1000, 10**9]), rng.randint(1, 9)
    alignment = rng.choice([ALIGNMENT, 256])
    layout = plan_layout(parameters, bucket_size, world_size, alignment)

    # Every parameter once, in reverse order of first use.
    assert [slot.parameter for slot in layout.slots] == parameters[::-1]
    end = 0
    for index, bucket in enumerate(layout.buckets):
        assert (bucket.index, bucket.start) == (index, end)
        assert bucket.slots
        assert (bucket.end - bucket.start) % (world_size * alignment) == 0
        cursor = bucket.start
        for slot in bucket.slots:
            assert slot.bucket == index and slot.start >= cursor and slot.end - slot.start == slot.parameter.numel
            assert (slot.start - bucket.start) % alignment == 0 and slot.start - cursor < alignment
            cursor = slot.end
            # Shards cut a parameter between blocks of this size, counted from its start.
            size = (bucket.end - bucket.start) // world_size
            cuts = [bucket.start + rank * size - slot.start for rank in range(world_size)]
            assert all(cut % alignment == 0 for cut in cuts if 0 < cut < slot.parameter.numel)
        assert cursor <= bucket.end < cursor + world_size * alignment
        filled = bucket.slots[-1].end - bucket.start
        before_last = bucket.slots[-2].end - bucket.start if len(bucket.slots) > 1 else 0
        if bucket_size:
            # A bucket closed as soon as it was full, and not before.
            assert before_last < bucket_size
            assert filled >= bucket_size or index == len(layout.buckets) - 1
        end = bucket.end
    assert layout.numel == end
    assert bucket_size or len(layout.buckets) == 1


def test_what_tensor_ranks_compute_alike_has_the_same_place():
    # Collectives add in an order that depends on the place: copies would differ in their last bits.
    outlines = {
        "up": Outline((8, 4), "column"), "norm": Outline((4,)), "q_norm": Outline((4,), is_partial=True),
        "down": Outline((4, 8), "row"), "bias": Outline((4,), "first"), "router": Outline((8, 4)),
    }  # fmt: skip
    places = []
    for rank in range(2):
        division = Division(outlines, Mesh(rank, data_size=3, tensor_size=2))
        specs = [
            ParameterSpec(
                name, held.shape, held.piece, division.summed_over(name), division.is_copied(name),
                division.counts(name),
            )
            for name in outlines if (held := division.held(name)) is not None
        ]  # fmt: skip
        buckets = plan_layout(specs, 0, 6).buckets
        places.append({s.parameter.name: (s.start - b.start, b.end - b.start) for b in buckets for s in b.slots})
        copied = [(s.parameter.name, b.counts) for b in buckets for s in b.slots if s.parameter.is_copied]
        assert copied == [("router", rank == 0), ("norm", rank == 0)]
    assert places[0].keys() - places[1].keys() == {"bias"}
    assert all(places[0][name] == places[1][name] for name in ("norm", "router", "q_norm"))


def test_layout_does_not_depend_on_anything_else():
    parameters = random_parameters(random.Random(7))
    assert plan_layout(parameters, 500, 2) == plan_layout(list(parameters), 500, 2)
    with pytest.raises(ValueError, match="bucket_size"):
        plan_layout(parameters, -1, 2)


def test_buffers_are_views():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    buffers = FlatBuffers(list(model.named_parameters()), 20, 2, torch.float32)
    x = torch.randn(4, 5, dtype=torch.bfloat16)
    model(x).float().sum().backward()
    first = {name: p.grad.clone() for name, p in model.named_parameters()}
    model(x).float().sum().backward()
    for slot in buffers.layout.slots:
        parameter = buffers.parameters[slot.parameter.name]
        assert torch.equal(parameter, before[slot.parameter.name])
        # bf16 gradients have accumulated in float32, in the buffer.
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(buffers.grad_data[slot.start : slot.end], 2 * first[slot.parameter.name].flatten())
        buffers.param_data[slot.start : slot.end] = 3.0
        assert (parameter == 3.0).all()
    names = [name for layout in buffers.layout.buckets for name, _ in Bucket.of(layout, buffers).views()]
    assert names == ["1.bias", "1.weight", "0.bias", "0.weight"]
    model[0].weight.grad = None
    buffers.restore_grad_views()
    assert torch.equal(model[0].weight.grad.flatten(), 2 * first["0.weight"].flatten())
