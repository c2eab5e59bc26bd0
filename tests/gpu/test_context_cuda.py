"""Context parallelism on GPUs: kernels that attend from chunks of rows, on one; ring and gather, on two.

`pytest -m gpu tests/gpu/test_context_cuda.py`; benchmarks/gpu_mesh.py runs these tests, too.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import ModelConfig
from model.attend import RowShare, attend_to, document_tails
from model.attention import Attention
from model.ops import IMPLEMENTATIONS, REFERENCE
from parallel import ParallelConfig, destroy_context, init_context
from parallel.groups import Groups
from parallel.mesh import plan_mesh
from tests.dist.group import run_ranks
from tests.gpu.test_fsdp_cuda import CLOSE, train, train_on, two_gpus
from tests.runs import losses, records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WIDTH, ROWS = 512, 3
CONFIG = ModelConfig(
    vocab_size=10, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=WIDTH,
).resolve()  # fmt: skip
CONTEXT = ["--context_parallel_size=2"]


@pytest.mark.parametrize("with_documents", [True, False])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("kernel", ["varlen", "flash_attn"])
def test_kernels_attend_from_chunks_as_a_mask_says(kernel: str, window: int, with_documents: bool):
    """Outputs and gradients of all chunks in bfloat16, against float64 under a mask."""
    chosen, cuda = IMPLEMENTATIONS["attention"][kernel], torch.device("cuda")
    if reason := chosen.reason_against(cuda, torch.bfloat16, frozenset({"window"} if window else ())):
        pytest.skip(reason)
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(ROWS, heads, WIDTH, 64, generator=draw).to(cuda) for heads in (4, 2, 2))
    up = torch.randn(q.shape, generator=draw).to(cuda)
    begins = torch.rand(ROWS, WIDTH, generator=draw) < 0.01
    begins[0] = False
    ids = begins.cumsum(1)
    positions = torch.arange(WIDTH, device=cuda).expand(ROWS, -1)
    config = replace(CONFIG, sliding_window=window)
    ways = {
        torch.float64: Attention(config, REFERENCE, 0),
        torch.bfloat16: Attention(config, replace(REFERENCE, **chosen.build()), 0),
    }
    for number in range(2):
        share, found = RowShare(number, 2, lambda own: own, lambda own: own), {}
        for dtype, layer in ways.items():
            by_tails = layer.ops.tails is not None
            starts = document_tails(ids, share.chunks, 4).to(cuda) if by_tails and with_documents else None
            attend = attend_to(
                config, [window], WIDTH, cuda, positions, ids.to(cuda) if with_documents else None, starts,
                by_mask=layer.ops.by_mask, share=share, by_tails=by_tails, dtype=dtype,
            )[window]  # fmt: skip
            inputs = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in (q, k, v)]
            outputs: list[Tensor] = []
            for queries, chunk in zip(share.part(inputs[0], 2).chunk(2, 2), attend.chunks):
                keys, values = (x[:, :, chunk.first_key : chunk.end] for x in inputs[1:])
                outputs.append(layer._attended(queries, keys, values, chunk, None))
            out = torch.cat(outputs, 2)
            gradients = torch.autograd.grad(out, inputs, share.part(up, 2).to(dtype))
            found[dtype] = [out, *gradients]
        for ours, expected in zip(found[torch.bfloat16], found[torch.float64]):
            assert (ours.double() - expected).norm() < 1e-2 * expected.norm()


def ring_difference() -> list[float]:
    """Relative errors of ring attention's output and gradients, against float64 on the whole rows."""
    from parallel.torch_engines.ring import Ring

    context = init_context("cuda")
    mesh = plan_mesh(ParallelConfig(context_parallel_size=context.world_size), context)
    group = Groups(context, mesh, 60.0).of("context")
    assert group is not None
    draw = torch.Generator().manual_seed(0)
    q, k, v, up = (torch.randn(ROWS, heads, WIDTH, 64, generator=draw).to(context.device) for heads in (4, 2, 2, 4))
    share = RowShare(mesh.context_rank, mesh.context_size, lambda own: own, lambda own: own)
    own = [share.part(x, 2).bfloat16().requires_grad_() for x in (q, k, v)]
    out = Ring(group).attend(*own)
    found = [out, *torch.autograd.grad(out, own, share.part(up, 2).bfloat16())]
    whole = [x.bfloat16().double().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
    gradients = torch.autograd.grad(expected, whole, up.bfloat16().double())
    wanted = [share.part(x, 2) for x in (expected, *gradients)]
    errors = [((ours.double() - its).norm() / its.norm()).item() for ours, its in zip(found, wanted)]
    destroy_context(context)
    return errors


@two_gpus
def test_a_ring_attends_as_one_process_does():
    for errors in run_ranks(2, ring_difference):
        assert max(errors) < 1e-2, errors


@two_gpus
def test_runs_of_parts_of_rows_are_those_of_one_process(tiny_run: list[str], tmp_path: Path):
    """In bfloat16 the kernels with starts, or a ring; in float32 masks."""
    flags = [*tiny_run, "--device=cuda", "--deterministic"]
    for dtype, more, mode in (
        ("float32", [], CONTEXT), ("bfloat16", [], CONTEXT),
        ("bfloat16", ["--no-document_mask"], [*CONTEXT, "--context_parallel_method=ring"]),
    ):  # fmt: skip
        its, home = [*flags, f"--dtype={dtype}", *more], tmp_path / f"{dtype}{len(more)}"
        expected = train(its, home / "one")
        (case,) = train_on(2, its, {"two": mode}, home).values()
        assert losses(case) == pytest.approx(losses(expected), rel=CLOSE[dtype]), (dtype, mode)
        assert [r["digest"] for r in records(case, "train")] == [r["digest"] for r in records(expected, "train")]
