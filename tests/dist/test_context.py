"""Context parallelism on groups of gloo processes, against one process that has whole rows.

A group is spawned once and works through all cases. Each rank also computes the whole rows by itself, in the same
dtype, and compares.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dataset.sft import padded
from model import Decoder, ModelConfig
from model.attend import RowShare, attend_to
from model.attention import Attention
from model.loss import IGNORE_INDEX
from model.ops import REFERENCE
from model.rope import rotary_tables
from parallel.config import ParallelConfig
from parallel.context import DistContext, destroy_context, init_context
from parallel.groups import Groups
from parallel.mesh import plan_mesh
from parallel.torch_engines import context_parallel
from tasks.config import DPOConfig
from tasks.dpo import DPOTask
from tasks.language_model import LanguageModelTask
from tasks.task import Batch, Task
from tests.dist.group import run_ranks
from training.build_model import to_device

ROWS, LENGTH, VOCAB = 4, 32, 30
CONFIG = ModelConfig(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=LENGTH,
).resolve()  # fmt: skip
EXPERTS = ModelConfig(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    num_local_experts=5, moe_intermediate_size=8, router_aux_loss_coef=0.5, router_z_loss_coef=0.1,
    max_position_embeddings=LENGTH,
).resolve()  # fmt: skip


def pretraining(with_documents: bool = True, width: int = LENGTH) -> Batch:
    """Rows of documents of all lengths, some longer than a chunk, some a single token."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (ROWS, width + 1), generator=draw)
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:].clone(), "row_ids": torch.arange(ROWS)}
    columns = torch.arange(width).expand(ROWS, -1)
    if not with_documents:
        return batch | {"positions": columns.clone()}
    begins = torch.rand((ROWS, width), generator=draw) < 0.15
    begins[:, 0], begins[0, 1:] = False, False
    starts = torch.where(begins, columns, 0).cummax(1).values
    batch["labels"][:, :-1][begins[:, 1:]] = IGNORE_INDEX
    return batch | {"positions": columns - starts, "document_ids": begins.cumsum(1)}


def answers(lengths: list[list[int]], packed: bool) -> Batch:
    """Padded rows of sequences of these lengths, whose second half is supervised."""
    draw = np.random.default_rng(2)
    rows = [[(draw.integers(0, VOCAB, n), np.arange(n) >= n // 2) for n in row] for row in lengths]
    batch = padded(rows, LENGTH, pad_id=0) | {"row_ids": torch.arange(len(rows))}
    if not packed:
        del batch["document_ids"]
    return batch


def pairs() -> Batch:
    batch = answers([[n] for n in (9, 20, 5, 3, 12, 21)], packed=False)
    return batch | {
        "sample_ids": torch.arange(3), "row_ids": torch.arange(3),
        "reference": torch.linspace(-40.0, -5.0, 6).view(3, 2),
    }  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: ModelConfig = CONFIG
    batch: Callable[[], Batch] = pretraining
    dpo: DPOConfig | None = None
    method: str = "gather"
    keeps: str = "all"
    is_valid: bool = False


PADDED = [[9], [21], [3], [4]]
CASES = {
    "packed": Case(),
    "one document": Case(batch=lambda: pretraining(with_documents=False)),
    "of odd width": Case(batch=lambda: pretraining(width=27)),
    "none supervised": Case(batch=lambda: answers([[6], [4]], packed=False)),
    "window": Case(replace(CONFIG, sliding_window=5), lambda: pretraining(with_documents=False)),
    "window and documents": Case(replace(CONFIG, sliding_window=5)),
    "norms of heads": Case(replace(CONFIG, qk_norm=True, attention_bias=True)),
    "alibi": Case(replace(CONFIG, position_embedding="alibi")),
    "dynamic rope": Case(replace(CONFIG, rope_scaling="dynamic", max_position_embeddings=8)),
    "ring": Case(batch=lambda: pretraining(with_documents=False), method="ring"),
    "ring, recomputed and padded": Case(batch=pairs, dpo=DPOConfig(), method="ring", keeps="nothing"),
    "recomputed": Case(keeps="nothing"),
    "matmuls kept": Case(keeps="matmuls"),
    "validation": Case(is_valid=True),
    "padded": Case(batch=lambda: answers(PADDED, packed=False)),
    "packed answers": Case(batch=lambda: answers([[9, 4, 7], [21, 3], [3], [14, 2]], packed=True)),
    "sigmoid": Case(batch=pairs, dpo=DPOConfig()),
    "ipo": Case(batch=pairs, dpo=DPOConfig(dpo_loss_type="ipo")),
    "kto": Case(batch=pairs, dpo=DPOConfig(dpo_loss_type="kto_pair")),
    "experts": Case(EXPERTS),
    "experts and padding": Case(EXPERTS, lambda: answers(PADDED, packed=False), keeps="nothing"),
    "experts balanced by batch": Case(replace(EXPERTS, router_aux_loss="batch")),
}  # fmt: skip


ON_FOUR = (
    "packed", "of odd width", "none supervised", "window and documents", "ring", "padded", "kto", "experts and padding"
)  # fmt: skip
"""Cases that four ranks compute. Two compute all."""


@dataclass
class Results:
    loss: float
    count: float
    metrics: dict[str, float]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    layers: Tensor | None = None


def new_model(case: Case) -> Decoder:
    model = Decoder(case.model, case.keeps != "all", case.keeps if case.keeps != "all" else "nothing")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1, generator=draw)
    return model.train(not case.is_valid)


def new_task(case: Case, model: Decoder) -> Task:
    if case.dpo is not None:
        return DPOTask(model, 0, case.dpo)
    return LanguageModelTask(model, 0, torch.arange(VOCAB))


def compute(case: Case, model: Decoder) -> Results:
    task = new_task(case, model)
    batch = to_device(case.batch(), model, torch.device("cpu"))
    if task.uses_prepass:
        task.take_prepass(task.prepass(batch))
    losses = task.layer_losses(batch, 0.1) if not case.is_valid else None
    loss, count, metrics = task(batch, losses)
    results = Results(loss.item(), float(count), {name: value.item() for name, value in metrics.items()})
    if not case.is_valid:
        (0.1 * loss).backward()
        results.gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    results.layers = losses.sums if losses is not None else None
    return results


def share_rows(model: Decoder, context: DistContext, method: str) -> None:
    config = ParallelConfig(context_parallel_size=context.world_size, context_parallel_method=method)
    mesh = plan_mesh(config, context)
    context_parallel.cut(model, config, context, mesh, Groups(context, mesh, 60.0), torch.float32)


def difference(case: Case, context: DistContext) -> dict[str, float]:
    """Relative differences between the ranks' results and those of whole rows."""
    expected, model = compute(case, new_model(case)), new_model(case)
    share_rows(model, context, case.method)
    found = compute(case, model)
    for gradient in found.gradients.values():
        dist.all_reduce(gradient)
    differences = {
        "loss": abs(found.loss / expected.loss - 1), "count": abs(found.count - expected.count),
        "metrics": max([abs(found.metrics[name] - value) for name, value in expected.metrics.items()], default=0.0),
    }  # fmt: skip
    if expected.gradients:
        one, other = (torch.cat([g.flatten() for g in its.gradients.values()]) for its in (found, expected))
        differences["gradients"] = ((one - other).norm() / other.norm()).item()
    if expected.layers is not None:
        differences["layers"] = ((found.layers - expected.layers).norm() / expected.layers.norm()).item()
    return differences


def attention_difference(context: DistContext, window: int) -> dict[str, float]:
    """Largest differences of one attention layer's outputs and input gradients from those in float64 step by step."""
    config = replace(CONFIG, sliding_window=window)
    batch, layer = pretraining(), Attention(config, REFERENCE, 0)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0.0, 0.3, generator=draw)
    x_BTC, up_BTC = (torch.randn((ROWS, LENGTH, config.hidden_size), generator=draw) for _ in range(2))

    mesh = plan_mesh(ParallelConfig(context_parallel_size=context.world_size), context)
    group = Groups(context, mesh, 60.0).of("context")
    assert group is not None
    sums = context_parallel.RowSums(group, "cpu")
    share = RowShare(mesh.context_rank, mesh.context_size, sums.gather, sums.add)
    own = share.part(x_BTC, 1).requires_grad_()
    arguments = config, [window], LENGTH, x_BTC.device, batch["positions"], batch["document_ids"]
    out = layer(own, attend_to(*arguments, share=share)[window])
    out.backward(share.part(up_BTC, 1))

    wide = x_BTC.double().requires_grad_()
    q, k, v = (F.linear(wide, its.weight.double()) for its in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k, v = (x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for x in (q, k, v))
    cos, sin = (table.double() for table in rotary_tables(config, batch["positions"], batch["document_ids"]))
    q, k = (torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (x.chunk(2, -1) for x in (q, k)))
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    distances = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    ids = batch["document_ids"]
    seen = (distances >= 0) & (distances < (window or LENGTH)) & (ids[:, :, None] == ids[:, None])
    scores = (q @ k.transpose(-1, -2) / config.head_dim**0.5).masked_fill(~seen[:, None], -torch.inf)
    expected = F.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), layer.o_proj.weight.double())
    expected.backward(up_BTC.double())
    assert wide.grad is not None and own.grad is not None
    return {
        "output": (share.part(expected, 1) - out).norm().item() / expected.norm().item(),
        "gradient": (share.part(wide.grad, 1) - own.grad).norm().item() / wide.grad.norm().item(),
    }


def on_ranks(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    context = init_context("cpu")
    try:
        attention = {f"attention {window}": attention_difference(context, window) for window in (0, 6)}
        return {name: difference(CASES[name], context) for name in names} | attention
    finally:
        destroy_context(context)


@pytest.mark.parametrize(("world_size", "names"), [(2, tuple(CASES)), (4, ON_FOUR)], ids=["two ranks", "four ranks"])
def test_a_step_is_that_of_one_process(world_size: int, names: tuple[str, ...]):
    for found in run_ranks(world_size, on_ranks, names):
        for name, differences in found.items():
            for what, value in differences.items():
                assert value <= (1e-4 if what == "metrics" else 1e-6), (name, what, value)
