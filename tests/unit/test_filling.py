"""Models of which a process holds a part: filled part by part, they equal the whole model. No process group is needed:
what a rank holds are views of a parameter that is otherwise left without values."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.named import Box
from model import Decoder, ModelConfig, hf
from model.adapters import folder
from model.adapters.lora import LoraSpec
from model.families import FAMILIES
from parallel.config import ParallelConfig
from parallel.division import Division
from parallel.mesh import Mesh
from parallel.stages import Stages
from parallel.torch_engines import chain
from parallel.torch_engines.cutting import whole_outlines
from tests.adapter_cases import CASES, SHAPE, our_model
from tests.unit.test_families import CONFIG, PackedFamily, model_of, packed
from tests.unit.test_families import save as save_one
from tests.unit.test_hf_saved import save as save_files
from tests.unit.test_upcycle import DENSE, shape_of
from tests.unit.test_upcycle import save as save_dense
from training.adapter import Adapter
from training.build_model import build_model
from training.config import SystemConfig

__all__ = ["packed"]
CPU, RANKS = torch.device("cpu"), 3


def rows_of(rank: int, rows: int) -> slice:
    """As FSDP cuts them: the last ranks may have fewer rows, or none."""
    share = -(-rows // RANKS)
    return slice(min(rank * share, rows), min((rank + 1) * share, rows))


class Cutter:
    """Keeps all memory, but lets only this rank's rows be filled."""

    uses_fsdp = True

    def __init__(self, rank: int):
        self.rank = rank

    def cut(self, model: Decoder) -> None:
        pass

    def regions(self, model: Decoder):
        def held(parameter: Tensor):
            rows = rows_of(self.rank, len(parameter))
            others = tuple(slice(0, size) for size in parameter.shape[1:])
            return tuple(parameter.shape), [(parameter.detach()[rows], (rows, *others))]

        return held

    def device_of(self, parameter: Tensor) -> torch.device:
        return CPU

    def together(self, work):
        return work()


class MeshCutter(Cutter):
    """Lets what a rank of a mesh holds be filled: rows, columns, experts, or nothing. Of a pipeline, it drops the
    units of other stages: the first of two has the embedding and a block."""

    uses_fsdp = False

    def __init__(self, mesh: Mesh, uses_fsdp: bool = False):
        super().__init__(mesh.rank)
        self.mesh, self.config = mesh, ParallelConfig(data_parallel="fsdp" if uses_fsdp else "auto")

    def cut(self, model: Decoder) -> None:
        if self.mesh.pipe_size == 1:
            self.division = Division(whole_outlines(model, self.config), self.mesh)
            return
        stages = Stages((2, model.config.num_hidden_layers), 2)
        self.division = Division(whole_outlines(model, self.config), self.mesh, chain.stages_of(model, stages))
        model.keep(list(stages.units(self.mesh.pipe_rank)))

    def regions(self, model: Decoder):
        names = {id(parameter): name for name, parameter in model.named_parameters()}

        def held(parameter: Tensor):
            piece = self.division.piece(names[id(parameter)])
            places = [box.slices_in(whole_box(parameter)) for box in piece.boxes] if piece is not None else []
            return tuple(parameter.shape), [(parameter.detach()[place], place) for place in places]

        return held


def whole_box(parameter: Tensor) -> Box:
    return Box((0,) * parameter.dim(), tuple(parameter.shape))


def build(
    shape: ModelConfig, weights: Path | None, dtype=torch.bfloat16, *, rank: int | None = None,
    cutter: Cutter | None = None, **options,
):  # fmt: skip
    part = cutter if rank is None else Cutter(rank)
    return build_model(shape, SystemConfig(), 7, CPU, dtype, weights, cutter=part, **options)


def check(shape: ModelConfig, weights: Path | None, dtype: torch.dtype = torch.bfloat16, **options) -> Decoder:
    """Each rank's rows of each parameter are the whole model's, to the bit. Returns the whole model."""
    whole = build(shape, weights, dtype, **options)
    expected = dict(whole.named_parameters())
    for rank in range(RANKS):
        part = build(shape, weights, dtype, rank=rank, **options)
        assert part.config == whole.config and [n for n, _ in part.named_parameters()] == list(expected)
        for name, parameter in part.named_parameters():
            rows, own = rows_of(rank, len(parameter)), expected[name]
            assert parameter.requires_grad == own.requires_grad
            assert parameter.dtype == (torch.float32 if own.requires_grad else own.dtype), name
            assert torch.equal(parameter[rows], own[rows].to(parameter)), (name, rank)
        assert all(map(torch.equal, part.buffers(), whole.buffers()))
    return whole


MESHES = [
    ({"tensor_size": 2}, False),
    ({"data_size": 2, "tensor_size": 2, "expert_size": 2}, False),
    ({"data_size": 3, "tensor_size": 2, "shard_size": 3}, True),
    ({"pipe_size": 2, "tensor_size": 2}, False),
]
"""Sizes, and whether FSDP cuts what they leave."""


def check_meshes(shape: ModelConfig, weights: Path | None, **options) -> None:
    """What each rank of some meshes holds of each parameter is the whole model's, to the bit, and all of them together
    hold all of it."""
    expected = dict(build(shape, weights, **options).named_parameters())
    for sizes, uses_fsdp in MESHES:
        missing = {name: torch.ones(own.shape) for name, own in expected.items()}
        for rank in range(Mesh(0, **sizes).world_size):
            part = build(shape, weights, cutter=MeshCutter(Mesh(rank, **sizes), uses_fsdp), **options)
            for name, parameter in part.named_parameters():
                for own, place in part.filling.held(parameter).parts:
                    assert torch.equal(own, expected[name][place]), (name, rank, sizes)
                    missing[name][place] = 0
        assert not any(each.any() for each in missing.values()), sizes


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "ernie4_5_moe", "bloom"])
def test_rows_columns_experts_and_stages_of_a_mesh(model_type: str, tmp_path: Path):
    """From new weights, from a folder's tensors as they are, fused ones, and a tensor for each expert."""
    model = Decoder(model_of(model_type, tie_word_embeddings=model_type == "llama"))
    model.initialize(1)
    more = {"lm_head.weight": model.lm_head.weight.detach().clone()} if model_type == "llama" else {}
    save_one(tmp_path, model, FAMILIES[model_type], **more)
    check_meshes(model.config, tmp_path)
    check_meshes(model.config, None)


def test_mistakes_that_a_stage_sees_in_a_folder(tmp_path: Path):
    """Headers are looked at by all, values by those who read them."""
    model = Decoder(model_of("llama"))
    model.initialize(1)
    save_one(tmp_path, model, FAMILIES["llama"])
    file, cutters = tmp_path / "model.safetensors", [MeshCutter(Mesh(rank, pipe_size=2)) for rank in range(2)]
    sound, name = load_file(file), "model.layers.1.mlp.down_proj.weight"
    save_file({**sound, name: torch.full_like(sound[name], torch.nan)}, file, {"format": "pt"})
    build(model.config, tmp_path, cutter=cutters[0])
    with pytest.raises(ValueError, match=f"{name} in .* holds values that are not finite"):
        build(model.config, tmp_path, cutter=cutters[1])
    save_file({key: tensor for key, tensor in sound.items() if key != name}, file, {"format": "pt"})
    lacking = f"lacks 1 weights of the model, for example {name.removeprefix('model.')}"
    for cutter in cutters:
        with pytest.raises(ValueError, match=lacking):
            build(model.config, tmp_path, cutter=cutter)


def test_experts_of_a_mesh_that_begin_as_a_dense_layer(tmp_path: Path):
    save_dense(tmp_path / "dense", DENSE)
    check_meshes(shape_of(tmp_path / "dense"), tmp_path / "dense")


def test_adapters_and_added_tokens_of_a_mesh(tmp_path: Path):
    config = base(tmp_path)
    check_meshes(config, tmp_path, adapter=adapter_of(CASES["lora, whole modules"].spec, tmp_path))
    grown = dataclasses.replace(config, vocab_size=config.vocab_size + 2)
    check_meshes(grown, tmp_path, new_rows=range(config.vocab_size, grown.vocab_size))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_folders_of_each_family(model_type: str, tied: bool, tmp_path: Path):
    model = Decoder(model_of(model_type, tie_word_embeddings=tied))
    model.initialize(1)
    more = {FAMILIES[model_type].their_name("lm_head.weight"): model.lm_head.weight.detach()} if tied else {}
    # (A head that repeats the embedding is read past.)
    save_one(tmp_path, model, FAMILIES[model_type], **{name: tensor.clone() for name, tensor in more.items()})
    check(hf.read_config(tmp_path), tmp_path)


def test_fused_tensors(packed: PackedFamily, tmp_path: Path):
    model = Decoder(packed.new(CONFIG, frozenset()))
    model.initialize(1)
    check(model.config, save_one(tmp_path, model, packed), torch.float32)


def test_stacks_of_experts_in_one_tensor(tmp_path: Path):
    model = Decoder(model_of("mixtral"))
    model.initialize(1)
    (rules,) = FAMILIES["mixtral"].other_rules(model.config, [name for name, _ in model.named_parameters()])
    tensors = hf.converted({name: p.detach() for name, p in model.named_parameters()}, rules)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, torch.float32)))
    check(model.config, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "ernie4_5_moe", "bloom"])
def test_new_weights(model_type: str, dtype: torch.dtype):
    check(model_of(model_type, tie_word_embeddings=model_type == "llama"), None, dtype)


def test_a_folder_with_padding(tmp_path: Path):
    model = Decoder(CONFIG)
    model.initialize(1)
    assert len(save_files(tmp_path, model, FAMILIES["llama"], 4000, CONFIG.vocab_size - 5)) > 2
    whole = check(CONFIG, tmp_path)
    assert torch.equal(whole.embed_tokens.weight, model.embed_tokens.weight.to(torch.bfloat16))


@pytest.mark.parametrize("tied", [False, True])
def test_experts_that_begin_as_a_dense_layer(tied: bool, tmp_path: Path):
    save_dense(tmp_path / "dense", dataclasses.replace(DENSE, tie_word_embeddings=tied))
    check(shape_of(tmp_path / "dense"), tmp_path / "dense")


def base(tmp_path: Path, **changes: object) -> ModelConfig:
    config = ModelConfig(**SHAPE | changes).resolve()
    model = Decoder(config)
    model.initialize(1)
    save_one(tmp_path, model, FAMILIES[changes.get("model_type", "llama")])
    return config


def adapter_of(spec: LoraSpec, directory: Path, loaded_from: Path | None = None) -> Adapter:
    return Adapter(spec, loaded_from, directory, "", False)


@pytest.mark.parametrize("name", ["lora, whole modules", "dora", "mixtral"])
def test_adapters(name: str, tmp_path: Path):
    """New ones, and those of a folder."""
    (tmp_path / "base").mkdir()
    case, saved = CASES[name], tmp_path / "adapter"
    config = base(tmp_path / "base", **case.fields)
    check(config, tmp_path / "base", adapter=adapter_of(case.spec, tmp_path / "base"))
    files = folder.saved_files(our_model(case), case.spec, tmp_path / "base", "")
    saved.mkdir()
    save_file({k: v.contiguous() for k, v in files.convert(files.parameters).items()}, saved / folder.TENSORS)
    for file, content in files.jsons.items():
        (saved / file).write_text(json.dumps(content))
    check(config, tmp_path / "base", adapter=adapter_of(case.spec, tmp_path / "base", saved))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trained", ["all", "rows", "whole"])
def test_added_tokens(trained: str, tied: bool, tmp_path: Path):
    """Some of them have rows already, which nobody has trained."""
    config = base(tmp_path, tie_word_embeddings=tied)
    new = range(config.vocab_size - 2, config.vocab_size + 3)
    shape, adapter = dataclasses.replace(config, vocab_size=new.stop), None
    if trained != "all":
        spec = dataclasses.replace(CASES["lora"].spec, **(
            {"token_ids": tuple(new)} if trained == "rows" else {"modules_to_save": ("embed_tokens", "lm_head")}
        ))  # fmt: skip
        adapter = adapter_of(spec, tmp_path)
    whole = check(shape, tmp_path, new_rows=new, adapter=adapter)
    assert len(whole.embed_tokens.weight) == new.stop


def test_each_rank_reads_its_own_rows(tmp_path: Path):
    """Values that are damaged are noticed by the rank that has their rows, or by all where a tensor is read whole."""
    model = Decoder(model_of("mixtral"))
    model.initialize(1)
    save_one(tmp_path, model, FAMILIES["mixtral"])
    file = tmp_path / "model.safetensors"
    sound = load_file(file)
    layer = "model.layers.0"
    for name, row, expected in [
        (f"{layer}.self_attn.q_proj.weight", -1, [False, False, True]),
        (f"{layer}.self_attn.q_proj.weight", 0, [True, False, False]),
        # Two experts belong to each rank, of four.
        (f"{layer}.block_sparse_moe.experts.3.w2.weight", 0, [False, True, False]),
    ]:
        tensors = {key: tensor.clone() for key, tensor in sound.items()}
        tensors[name][row, 0] = torch.nan
        save_file(tensors, file, {"format": "pt"})
        for rank in range(RANKS):
            if expected[rank]:
                with pytest.raises(ValueError, match=f"{name} in .* holds values that are not finite"):
                    build(model.config, tmp_path, rank=rank)
            else:
                build(model.config, tmp_path, rank=rank)


def test_what_follows_from_other_weights_is_compared_whole(tmp_path: Path):
    """A head that is not the embedding is refused by each rank, also by those whose rows are the same."""
    model = Decoder(model_of("llama", tie_word_embeddings=True))
    model.initialize(1)
    head = model.lm_head.weight.detach().clone()
    head[-1] += 1
    save_one(tmp_path, model, FAMILIES["llama"], **{"lm_head.weight": head})
    for rank in range(RANKS):
        with pytest.raises(ValueError, match="holds a lm_head.weight that is not the embedding"):
            build(model.config, tmp_path, rank=rank)


def test_four_bits_are_refused(tmp_path: Path):
    config = base(tmp_path)
    with pytest.raises(ValueError, match="--load_in_4bit: a model in 4 bits is not cut over processes"):
        build(config, tmp_path, rank=0, in_4bit=True, adapter=adapter_of(CASES["lora"].spec, tmp_path))
