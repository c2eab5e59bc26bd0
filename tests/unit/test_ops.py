"""Choice of an op's implementation, and that the model is the same with each one that runs here."""

import dataclasses
import sys
import types
import typing
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._functorch.aot_autograd import aot_module_simplified
from torch.utils.checkpoint import CheckpointPolicy

from configurator import Config
from model import Decoder, ModelConfig
from model.attend import attention_mask, document_starts
from model.decoder import _keep_matmuls
from model.dropout import DropoutKey
from model.kernels import registry
from model.linear import merged_linear, merged_linear_reference
from model.ops import CHOICES, IMPLEMENTATIONS, REFERENCE, Ops, build_ops, choose_ops, needs_of
from model.roles import role_of
from optimizer.mixed_precision import choose_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = ModelConfig(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32,
).resolve()  # fmt: skip

SPARSE = dataclasses.replace(CONFIG, num_local_experts=4, num_shared_experts=1, dense_layers="0").resolve()


def test_a_cpu_uses_pytorch_with_the_loss_in_chunks_and_in_bfloat16_attention_in_blocks():
    plain = dict(REFERENCE.names)
    assert set(plain) == set(CHOICES)
    assert choose_ops("reference", {}, CPU, torch.bfloat16) == plain
    fastest = plain | {"cross_entropy": "chunked", "experts": "sorted"}
    assert choose_ops("auto", {}, CPU, torch.float32) == fastest
    assert choose_ops("auto", {}, CPU, torch.bfloat16) == fastest | {"attention": "blocked"}
    assert choose_ops("auto", {"attention": "sdpa"}, CPU, torch.bfloat16)["attention"] == "sdpa"
    assert choose_kernel("auto", "", CPU) == choose_kernel("reference", "", CPU) == "torch"


def test_flags_and_fields_are_those_that_are_declared():
    flags = typing.get_type_hints(type(Config().system))
    for op, choices in CHOICES.items():
        assert set(typing.get_args(flags[f"{op}_kernel"])) == {"", *choices}, f"--{op}_kernel offers others"
    fields = {field.name for field in dataclasses.fields(Ops)}
    for named in IMPLEMENTATIONS.values():
        assert sum(found.is_plain for found in named.values()) == 1
        for found in named.values():
            if found.why_not(CPU, torch.float32) is None:
                assert found.build().keys() <= fields


@pytest.mark.parametrize(("kernels", "overrides", "message"), [
    ("triton", {}, "--kernels=triton cannot be used: the Triton kernels need a CUDA device, not cpu"),
    ("auto", {"rope": "triton"}, "--rope_kernel=triton cannot be used"),
    ("auto", {"rms_norm": "apex"}, "--rms_norm_kernel=apex cannot be used: the package apex is not installed"),
    ("auto", {"attention": "varlen"}, "--attention_kernel=varlen cannot be used: it needs a CUDA device"),
    ("auto", {"experts": "grouped"}, "--experts_kernel=grouped cannot be used: torch's grouped multiplication"),
    ("auto", {"rope": "apex"}, "rope can be reference, triton, liger, not apex"),
])  # fmt: skip
def test_what_cannot_be_had_is_refused(kernels: str, overrides: dict, message: str):
    with pytest.raises(ValueError, match=message):
        choose_ops(kernels, overrides, CPU, torch.float32)


def test_a_loss_that_rounds_before_it_is_scaled_is_refused_in_float16():
    with pytest.raises(ValueError, match="before the loss scale reaches it; use triton"):
        choose_ops("auto", {"cross_entropy": "liger"}, CPU, torch.float16)


def test_the_optimizers_kernel_is_refused_without_a_gpu():
    for kernels, wanted in (("triton", ""), ("auto", "triton")):
        with pytest.raises(ValueError, match="cannot be used: Triton's optimizer step needs a CUDA device"):
            choose_kernel(kernels, wanted, CPU)


def test_a_gpu_uses_triton_and_varlen(monkeypatch):
    monkeypatch.setattr("model.kernels.support.unavailable_reason", lambda device: None)
    names = choose_ops("auto", {}, CUDA, torch.bfloat16)
    assert {names.pop("attention"), names.pop("experts")} == {"varlen", "grouped"} and {*names.values()} == {"triton"}
    # FlashAttention has no float32, and neither have grouped multiplications.
    names = choose_ops("auto", {}, CUDA, torch.float32)
    assert names["attention"] == "sdpa" and names["experts"] == "sorted"
    with pytest.raises(ValueError, match="--attention_kernel=blocked cannot be used: it is for CPUs"):
        choose_ops("auto", {"attention": "blocked"}, CUDA, torch.bfloat16)
    with pytest.raises(ValueError, match="varlen takes bfloat16 and float16, not float32"):
        choose_ops("auto", {"attention": "varlen"}, CUDA, torch.float32)
    assert set(choose_ops("reference", {}, CUDA, torch.bfloat16).values()) == {"reference", "sdpa"}


def test_what_a_model_needs():
    needs = {
        "window": {"sliding_window": 4}, "alibi": {"position_embedding": "alibi"},
        "interleaved": {"rope_interleaved": True}, "partial": {"partial_rotary_factor": 0.5},
    }  # fmt: skip
    assert needs.keys() == registry.NEEDS.keys() and needs_of(CONFIG) == frozenset()
    for need, fields in needs.items():
        assert needs_of(dataclasses.replace(CONFIG, **fields)) == {need}
    for named in IMPLEMENTATIONS.values():
        assert all(found.lacks <= needs.keys() and not (found.is_plain and found.lacks) for found in named.values())


def test_an_implementation_that_lacks_what_the_model_needs_is_not_used(monkeypatch):
    monkeypatch.setattr("model.kernels.support.unavailable_reason", lambda device: None)
    monkeypatch.setattr("model.kernels.registry.importlib.util.find_spec", lambda package: True)

    def attention(*needs: str, named: str = "") -> str:
        return choose_ops("auto", {"attention": named}, CUDA, torch.bfloat16, frozenset(needs))["attention"]

    assert attention("window") == "varlen" and attention("alibi", "window") == "sdpa"
    assert attention("alibi", "window", named="flash_attn") == "flash_attn"
    with pytest.raises(ValueError, match="--attention_kernel=varlen cannot be used: it lacks ALiBi, which this model"):
        attention("alibi", named="varlen")
    with pytest.raises(ValueError, match="rope_kernel=liger cannot be used: it lacks interleaved rotary channels"):
        choose_ops("auto", {"rope": "liger"}, CUDA, torch.bfloat16, frozenset({"interleaved"}))
    with pytest.raises(ValueError, match="kernel=xformers cannot be used: it lacks sliding windows and ALiBi"):
        attention("alibi", "window", named="xformers")
    assert choose_ops("auto", {}, CPU, torch.bfloat16, frozenset({"alibi", "window"}))["attention"] == "blocked"


def trained(ops, dropout: float = 0.0, documents: torch.Tensor | None = None, config: ModelConfig = CONFIG, **options):
    """(model in training, its loss as a function)."""
    config = dataclasses.replace(config, hidden_dropout=dropout)
    model = Decoder(config, ops=ops, **options)
    # Without the check that a family holds such a model.
    model.roles = lambda: {name: role_of(name) for name, _ in model.named_parameters()}
    model.initialize(3)
    model.train()
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(97, (2, 24), generator=generator) for _ in range(2))
    key = DropoutKey(7, torch.tensor([5, 6])) if dropout or config.attention_dropout else None
    starts = document_starts(documents) if documents is not None and model.wants_document_starts else None
    return model, lambda: model.loss_sum(
        model(ids, None, documents, dropout_key=key, document_starts=starts), labels
    )


def run(
    ops, dropout: float = 0.0, documents: torch.Tensor | None = None, backend: Callable | None = None,
    dtype: torch.dtype = torch.float32, **options,
):  # fmt: skip
    """(loss, gradients) of a model in training, whose blocks are compiled if there is a backend for that."""
    model, step = trained(ops, dropout, documents, **options)
    model.to(dtype)
    if backend is not None:
        model.compile_blocks(backend=backend)
    loss = step()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_alike(first, second, rtol: float) -> None:
    assert torch.allclose(first[0], second[0], rtol=rtol)
    for name, grad in first[1].items():
        assert (grad - second[1][name]).norm() <= rtol * grad.norm(), name


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("keeps", ["nothing", "matmuls"])
@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
def test_recomputation_gives_the_same_bits(attention: str, dropout: float, keeps: str):
    ops = build_ops(dict(REFERENCE.names) | {"attention": attention})
    expected = run(ops, dropout)
    found = run(ops, dropout, gradient_checkpointing=True, checkpoint_keeps=keeps)
    assert expected[0] == found[0]
    assert all(torch.equal(grad, found[1][name]) for name, grad in expected[1].items())


def test_selective_recomputation_keeps_matmuls():
    """Counted: with everything recomputed, six of a block's seven forward matmuls run twice (nothing needs the output
    of the last)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.matmuls = 0

        def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
            self.matmuls += function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            return function(*args, **(kwargs or {}))

    counts = {}
    for keeps in ("all", "nothing", "matmuls"):
        options = {} if keeps == "all" else {"gradient_checkpointing": True, "checkpoint_keeps": keeps}
        with Count() as count:
            run(REFERENCE, **options)
        counts[keeps] = count.matmuls
    assert counts["matmuls"] == counts["all"] and counts["nothing"] == counts["all"] + 6 * 3


class WritesIntoOwnMemory:
    """A backend like inductor, without its half minute in a C++ compiler: its partition of the passes, and matmuls that
    write into the graph's memory."""

    def __init__(self):
        self.matmuls = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        return aot_module_simplified(
            module, inputs, fw_compiler=self.compile, partition_fn=min_cut_rematerialization_partition
        )

    def compile(self, graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        backend = self

        class Run(torch.fx.Interpreter):
            def call_function(self, target, args, kwargs):
                if target is torch.ops.aten.mm.default:
                    backend.matmuls += 1
                    return torch.mm(*args, out=args[0].new_empty(len(args[0]), args[1].shape[1]))
                return super().call_function(target, args, kwargs)

        return make_boxed_func(Run(graph).run)


def test_selective_recomputation_keeps_matmuls_of_compiled_blocks():
    """Counted by the backend: a block has seven matmuls forward and fourteen backward, and no others run."""
    torch._dynamo.reset()
    backend = WritesIntoOwnMemory()
    found = run(REFERENCE, backend=backend, gradient_checkpointing=True, checkpoint_keeps="matmuls")
    assert_alike(run(REFERENCE), found, 1e-5)
    assert backend.matmuls == 3 * (7 + 14)


def test_what_to_keep_is_refused_where_all_is_kept():
    with pytest.raises(ValueError, match="--checkpoint_keeps=matmuls says what --gradient_checkpointing keeps"):
        Decoder(CONFIG, checkpoint_keeps="matmuls")


@pytest.mark.soak
@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
def test_selective_recomputation_keeps_what_inductor_multiplies(attention: str):
    ops, counts = build_ops(dict(REFERENCE.names) | {"attention": attention}), {}
    for keeps in ("nothing", "matmuls"):
        torch._dynamo.reset()
        # The first step compiles.
        model, step = trained(ops, gradient_checkpointing=True, checkpoint_keeps=keeps)
        model.compile_blocks()
        step().backward()
        loss = step()
        with torch.autograd.profiler.profile() as profile:
            loss.backward()
        counts[keeps] = sum(event.count for event in profile.key_averages() if event.key == "aten::mm")
    assert counts == {"nothing": 3 * (7 + 14) + 2, "matmuls": 3 * 14 + 2}


@pytest.mark.parametrize(
    ("operator", "kept"),
    [
        (torch.ops.aten.mm.default, True), (torch.ops.aten.mm.dtype, True), (torch.ops.aten.addmm.default, True),
        (torch.ops.aten.bmm.default, True), (torch.ops.aten._scaled_mm.default, True),
        (torch.ops.aten._scaled_dot_product_flash_attention.default, True),
        # Their kept output would be memory that others write to.
        (torch.ops.aten.mm.out, False), (torch.ops.aten.mm.dtype_out, False), (torch.ops.aten.mul.Tensor, False),
        (torch.ops.higher_order.wrap, False),
    ],
)  # fmt: skip
def test_what_selective_recomputation_keeps(operator, kept: bool):
    assert (_keep_matmuls(None, operator) == CheckpointPolicy.MUST_SAVE) == kept


HERE = [
    (op, name)
    for op, named in IMPLEMENTATIONS.items()
    for name, found in named.items()
    if name != REFERENCE.names[op] and found.why_not(CPU, torch.float32) is None
]


@pytest.mark.parametrize(("op", "name"), HERE)
def test_each_implementation_that_runs_here_trains_the_same_model(op: str, name: str):
    config = SPARSE if op == "experts" else CONFIG
    ops = build_ops(dict(REFERENCE.names) | {op: name})
    assert_alike(run(REFERENCE, config=config), run(ops, config=config), 1e-5)


@pytest.mark.parametrize("keeps", ["", "nothing", "matmuls"])
@pytest.mark.parametrize("name", ["reference", "sorted"])
def test_blocks_with_experts_compile(name: str, keeps: str):
    """The loop over experts takes its numbers of tokens from a tensor, which interrupts the graph."""
    torch._dynamo.reset()
    ops = build_ops(dict(REFERENCE.names) | {"experts": name})
    options = {"gradient_checkpointing": True, "checkpoint_keeps": keeps} if keeps else {}
    assert_alike(run(ops, config=SPARSE), run(ops, config=SPARSE, backend="aot_eager", **options), 1e-5)


@pytest.mark.parametrize("name", ["plain", "blocked"])
def test_our_attention_equals_torchs(name: str):
    documents = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 20 + [2]])
    ours = build_ops(dict(REFERENCE.names) | {"attention": name})
    for cut in (None, documents):
        assert_alike(run(REFERENCE, documents=cut), run(ours, documents=cut), 1e-5)


def naive_attention(q, k, v, starts, window: int, slopes):
    """One query at a time, with the keys of its document in its window."""
    batch, heads, width, dim = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    begins = starts.tolist() if starts is not None else range(0, batch * width, width)
    rows = []
    for row in range(batch):
        for query in range(width):
            first = max(begin for begin in begins if begin <= row * width + query) - row * width
            keys = slice(max(first, query - window + 1 if window else 0), query + 1)
            scores = (k[row, :, keys] @ q[row, :, query, :, None])[..., 0] / dim**0.5
            if slopes is not None:
                scores = scores - slopes.double()[:, None] * (query - torch.arange(keys.start, keys.stop))
            rows.append((scores.softmax(-1)[:, None] @ v[row, :, keys])[:, 0])
    return torch.stack(rows).view(batch, width, heads, dim).transpose(1, 2)


NAIVE = Ops(
    causal=lambda q, k, v, window, slopes: naive_attention(q, k, v, None, window, slopes), packed=naive_attention,
    by_mask=False,
)  # fmt: skip
DOCUMENTS = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 20 + [2]])
REACH = {
    "window": {"sliding_window": 5},
    "window of two": {"sliding_window": 2},
    "window of a document": {"sliding_window": 10},
    "window of a row": {"sliding_window": 23},
    "window by layer": {"sliding_window": 3, "full_attention_layers": "0,2"},
    "alibi": {"position_embedding": "alibi"},
    "alibi of three heads": {"position_embedding": "alibi", "num_attention_heads": 3, "num_key_value_heads": 1},
    "alibi in a window": {"position_embedding": "alibi", "sliding_window": 5},
}  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reach", REACH)
def test_windows_and_alibi_in_each_implementation(reach: str, packed: bool):
    """Loss and gradients with attention in float64 (norms, and plain's softmax, are float32) against a loop over
    queries. The documents are attended to one by one, under a mask, and by their starts."""
    config = dataclasses.replace(CONFIG, **REACH[reach])
    options = {"documents": DOCUMENTS if packed else None, "config": config, "dtype": torch.float64}
    expected = run(NAIVE, **options)
    for name in ("sdpa", "plain", "blocked"):
        ops = build_ops(dict(REFERENCE.names) | {"attention": name})
        assert_alike(expected, run(ops, **options), 1e-6)
    if packed:
        for lengths in ([[10, 14], [3, 20, 1]], None):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("model.attend.document_lengths", lambda ids, lengths=lengths: lengths)
                assert_alike(expected, run(REFERENCE, **options), 1e-6)
    # With dropout, attention is the plain one.
    dropped = dataclasses.replace(config, attention_dropout=1e-9)
    assert_alike(expected, run(NAIVE, **options | {"config": dropped}), 1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
@pytest.mark.parametrize("reach", ["window by layer", "alibi in a window"])
def test_recomputation_with_windows_and_alibi_gives_the_same_bits(reach: str, attention: str):
    options = {"documents": DOCUMENTS, "config": dataclasses.replace(CONFIG, **REACH[reach])}
    ops = build_ops(dict(REFERENCE.names) | {"attention": attention})
    expected, found = run(ops, **options), run(ops, gradient_checkpointing=True, **options)
    assert expected[0] == found[0]
    assert all(torch.equal(grad, found[1][name]) for name, grad in expected[1].items())


@pytest.mark.parametrize(("attention", "graphs"), [("sdpa", 2), ("blocked", 3)])
def test_compiled_blocks_with_windows_are_few_whole_graphs(attention: str, graphs: int):
    """The first block has nothing to add. All others have the same graph, or one for each window if it is a number and
    not part of a mask."""
    config = dataclasses.replace(CONFIG, **REACH["window by layer"], num_hidden_layers=6)
    ops = build_ops(dict(REFERENCE.names) | {"attention": attention})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = run(ops, documents=DOCUMENTS, config=config, backend="aot_eager")
    assert_alike(run(ops, documents=DOCUMENTS, config=config), found, 1e-5)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_merged_projections_equal_separate_ones():
    generator = torch.Generator().manual_seed(1)
    x, *weights = (torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
                   for shape in ((2, 5, 8), (6, 8), (3, 8)))  # fmt: skip
    ours, expected = merged_linear(x, *weights), merged_linear_reference(x, *weights)
    assert torch.allclose(ours, expected)
    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, (x, *weights), upstream) for y in (ours, expected))):
        assert torch.allclose(a, b)
    frozen = [weight.detach() for weight in weights]
    ours, expected = merged_linear(x, *frozen), merged_linear_reference(x, *frozen)
    assert torch.allclose(*(torch.autograd.grad(y, x, upstream)[0] for y in (ours, expected)))


def test_where_documents_start():
    ids = torch.tensor([[0, 0, 1, 1, 1], [2, 2, 2, 2, 2], [0, 1, 2, 3, 3]])
    starts = document_starts(ids)
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 2, 5, 10, 11, 12, 13, 15]


def attend_by_tokens(q_NHD, k_NKD, v_NKD, starts, _same, _width, _same_width, **options):
    """Replaces FlashAttention's packed function with plain PyTorch, document by document. Queries see `window_size`
    keys before themselves, -1 for all, and none after."""
    assert options.keys() <= {"causal", "window_size", "alibi_slopes", "enable_gqa"}
    before, after = options.get("window_size", (-1, -1))
    assert options.get("causal") or after == 0
    rows = []
    for first, last in zip(starts.tolist(), starts.tolist()[1:]):
        q, k, v = (x[first:last].transpose(0, 1)[None] for x in (q_NHD, k_NKD, v_NKD))
        slopes = options.get("alibi_slopes")
        rows.append(naive_attention(q, k, v, None, before + 1, slopes)[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("name", ["varlen", "flash_attn"])
def test_packed_attention_is_told_where_documents_begin(name: str, monkeypatch):
    """Layouts that the libraries need, against plain attention with a mask."""
    fake = types.SimpleNamespace(
        flash_attn_varlen_func=attend_by_tokens, varlen_attn=attend_by_tokens,
        flash_attn_func=lambda q, k, v, **options: attend_by_tokens(
            *(x.flatten(0, 1) for x in (q, k, v)), torch.arange(q.shape[0] + 1) * q.shape[1], None, 0, 0, **options
        ).view(q.shape),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, {"varlen": "torch.nn.attention.varlen"}.get(name, name), fake)
    ops = build_ops(dict(REFERENCE.names) | {"attention": name})
    causal, packed = ops.causal, ops.packed
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    for window, slopes in ((0, None), (4, None), (4, torch.rand(4, generator=generator))):
        if slopes is not None and name == "varlen":
            continue
        reach = (window, slopes)
        for out, cut in ((packed(q, k, v, document_starts(ids), *reach), ids), (causal(q, k, v, *reach), None)):
            mask = attention_mask(12, 12, cut, CPU, window=window)
            if slopes is not None:
                mask = attention_mask(12, 12, cut, CPU, window=window, slopes_H=slopes).double()
            expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert_alike(run(ops, documents=torch.tensor([[0] * 24, [0] * 9 + [1] * 15])),
                 run(REFERENCE, documents=torch.tensor([[0] * 24, [0] * 9 + [1] * 15])), 1e-5)  # fmt: skip


def test_documents_do_not_see_each_other():
    """Packed equals unpacked, and the gradient of one document's loss with respect to another's input is exactly 0."""
    model = Decoder(CONFIG)
    model.initialize(1)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(97, (1, 24), generator=generator)
    documents, positions = torch.tensor([[0] * 9 + [1] * 15]), torch.tensor([[*range(9), *range(15)]])
    packed = model(ids, positions, documents)
    alone = torch.cat([model(ids[:, :9]), model(ids[:, 9:])], dim=1)
    labels = torch.randint(97, (1, 24), generator=generator)
    losses = [model.loss_sum(hidden, labels).item() for hidden in (packed, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    embedded = []
    hook = model.embed_tokens.register_forward_hook(lambda _m, _i, out: embedded.append(out) or out.retain_grad())
    hidden = model(ids, positions, documents)
    hook.remove()
    model.loss_sum(hidden[:, 9:], labels[:, 9:]).backward()
    assert embedded[0].grad[:, 9:].abs().max() > 0 and (embedded[0].grad[:, :9] == 0).all()
