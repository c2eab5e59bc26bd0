"""The start of a model that is cut over the ranks: no rank holds it whole at any time, and all rows are right."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

import train_my_ddp
from model import Decoder, ModelConfig, hf
from model.adapters.lora import LoraSpec
from model.families import FAMILIES
from parallel import destroy_context, init_context
from parallel.config import ParallelConfig
from parallel.engines import ModelCutter, model_cutter
from parallel.mesh import plan_mesh
from parallel.torch_engines.shards import local
from tests.conftest import SEQ_LEN
from tests.dist.group import run_ranks, use_new_port
from tests.runs import elsewhere
from tests.unit.test_hf_saved import save
from training.adapter import Adapter
from training.build_model import build_model
from training.config import SystemConfig

CPU, SEED = torch.device("cpu"), 7
# Most numbers of rows are no multiple of 3, so the last rank has fewer.
SHAPE = {
    "vocab_size": 97, "hidden_size": 20, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 32, "model_type": "mistral",
}  # fmt: skip
EXPERTS = {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 25}
DORA = LoraSpec(r=3, alpha=8.0, targets=("all-linear",), use_dora=True, token_ids=(97, 98))
LARGE = {"vocab_size": 500, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "head_dim": 32}


def config_of(**changes: object) -> ModelConfig:
    return ModelConfig(**SHAPE | changes).resolve()


def write(directory: Path, max_bytes: int, **changes: object) -> Path:
    """A folder of several files."""
    directory.mkdir()
    model = Decoder(config_of(**changes))
    model.initialize(1)
    assert len(save(directory, model, FAMILIES[model.config.model_type], max_bytes)) > 3
    return directory


def damage(directory: Path, name: str, row: int) -> Path:
    """Put a NaN into a row of a tensor."""
    file = next(file for file in sorted(directory.glob("*.safetensors")) if name in load_file(file))
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name][row, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    return file


def check_rows(cutter: ModelCutter, *args: object, **options: object) -> str:
    """Says which parameter's rows differ from those of the whole model; empty: none."""
    part = build_model(*args, cutter=cutter, **options)
    whole = dict(build_model(*args, **options).named_parameters())
    parameters = dict(part.named_parameters())
    assert parameters.keys() == whole.keys()
    if part.config.tie_word_embeddings:
        assert part.lm_head.weight is part.embed_tokens.weight
    assert all(map(torch.equal, part.buffers(), build_model(*args, **options).buffers()))
    for name, parameter in parameters.items():
        ((own, (rows, *_)),) = part.filling.held(parameter).parts or [(local(parameter.detach()), (slice(0),))]
        if own.dtype != (torch.float32 if parameter.requires_grad else whole[name].dtype):
            return f"{name} is {own.dtype}"
        if not torch.equal(own, whole[name][rows].to(own)):
            return name
    return ""


def refusal(build: Callable[[], object]) -> str:
    try:
        build()
    except ValueError as error:
        return str(error)
    return ""


def peak_bytes(build: Callable[[], object], files: list[Path]) -> int:
    """Largest sum of allocated memory. Mapped files do not count, as they need not stay in memory."""
    mapped = {file.stat().st_size for file in files}
    # What is left from before would be freed meanwhile.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = build()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes() if abs(event.nbytes()) not in mapped else 0
        peak = max(peak, live)
    del kept
    return peak


def work(home: str, train_flags: list[str]) -> dict:
    """On each rank."""
    path, found, flags = Path(home), {}, ParallelConfig(data_parallel="fsdp")
    context = init_context("cpu")
    mesh, rank = plan_mesh(flags, context), context.rank
    bf16, fp32 = (model_cutter(flags, context, mesh, dtype) for dtype in (torch.bfloat16, torch.float32))
    narrow = (SystemConfig(), SEED, CPU, torch.bfloat16)
    wide = (SystemConfig(), SEED, CPU, torch.float32)
    grown = config_of(vocab_size=99)
    adapter = Adapter(DORA, None, path / "llama", "", False)
    found["rows"] = {
        "new": check_rows(bf16, config_of(tie_word_embeddings=True), *narrow, None),
        "new float32": check_rows(fp32, config_of(**EXPERTS), *wide, None),
        "folder": check_rows(bf16, config_of(), *narrow, path / "llama"),
        "experts": check_rows(bf16, config_of(**EXPERTS), *narrow, path / "experts"),
        "dora and tokens": check_rows(bf16, grown, *narrow, path / "llama", adapter=adapter, new_rows=range(97, 99)),
    }
    own = path / ("cut" if rank == 1 else "llama")
    found["refusals"] = [
        refusal(lambda: build_model(config_of(), *narrow, path / "damaged", cutter=bf16)),
        refusal(lambda: build_model(config_of(), *narrow, own, cutter=bf16)),
    ]
    large, files = config_of(**LARGE), sorted((path / "large").glob("*.safetensors"))
    found["bytes"] = {
        "new": peak_bytes(lambda: build_model(large, *wide, None, cutter=fp32), []),
        "folder": peak_bytes(lambda: build_model(large, *wide, path / "large", cutter=fp32), files),
    }
    destroy_context(context)
    use_new_port()
    found["code"] = train_my_ddp.main(train_flags)
    return found


@pytest.fixture(scope="module")
def folders(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Folders of weights, and the flags of a run that begins with damaged ones."""
    path = tmp_path_factory.mktemp("weights")
    write(path / "llama", 4000), write(path / "experts", 4000, **EXPERTS), write(path / "large", 400_000, **LARGE)
    for name in ("damaged", "cut"):
        shutil.copytree(path / "llama", path / name)
    damage(path / "damaged", "model.layers.1.mlp.down_proj.weight", -1)
    file = sorted((path / "cut").glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-8])
    write(path / "begin", 20_000, vocab_size=512)
    shutil.copytree(data_dir.parent / "tokenizer", path / "begin", dirs_exist_ok=True)
    damage(path / "begin", "model.embed_tokens.weight", -1)
    return path, [
        f"--data_dir={data_dir}", "--out_dir=-", f"--max_seq_len={SEQ_LEN}", "--device=cpu", "--num_threads=1",
        "--train_batch_size=1", "--gradient_accumulation_steps=6", "--dist_timeout=60", "--data_parallel=fsdp",
        f"--init_from={path / 'begin'}",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ranks(folders: tuple[Path, list[str]]) -> list[dict]:
    path, flags = folders
    return run_ranks(3, work, str(path), elsewhere(flags, path / "run"))


def test_all_rows_are_those_of_the_whole_model(ranks: list[dict]):
    for found in ranks:
        assert found["rows"] == dict.fromkeys(found["rows"], "")


def test_a_mistake_that_one_rank_sees_ends_all_with_its_sentence(ranks: list[dict]):
    """A value that is damaged is seen by the rank that has its row, a file that is cut short by the rank whose disk has
    it."""
    first, *others = (found["refusals"] for found in ranks)
    assert all(other == first for other in others)
    assert "mlp.down_proj.weight in" in first[0] and "holds values that are not finite: take another copy" in first[0]
    assert "cut/model-00002" in first[1] and "cannot be read" in first[1]
    assert [found["code"] for found in ranks] == [2] * len(ranks)


def test_no_rank_holds_more_than_its_part_and_one_parameter(ranks: list[dict]):
    outline = hf.outline(config_of(**LARGE))
    sizes = [(len(p), p[0].numel() * 4 if p.dim() > 1 else 4) for p in outline.parameters()]
    part = sum(-(-rows // len(ranks)) * width for rows, width in sizes)
    whole, largest = sum(rows * width for rows, width in sizes), max(rows * width for rows, width in sizes)
    for found in ranks:
        for what, peak in found["bytes"].items():
            # Beside these, some small tensors.
            assert part <= peak < part + 1.02 * largest + 20_000 < 0.75 * whole, (what, peak, part, largest)
        # Rows that are read lie in the mapped file.
        assert found["bytes"]["folder"] < part + 0.6 * largest
