"""The table of families in docs/model.md: each claim is tried with a tiny model, by the commands that users give."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import generate
import train_my_ddp
from checkpoint.folder import MANIFEST, TRAINER_STATE, is_file_of_rank
from model import Decoder, ModelConfig, flops, hf
from model.families import FAMILIES
from model.ops import REFERENCE, Ops
from runs.reslog import read_reslog
from tests.conftest import SEQ_LEN
from tests.unit.test_known_tokenizers import FOLDERS
from tests.unit.test_sft_train import conversations, pretokenize, write_dpo, write_sft
from tokenizer import load_tokenizer
from tokenizer.chat_template import ChatTemplate, Message

DOCS = Path(__file__).resolve().parents[2] / "docs" / "model.md"
CLAIMS = ("train", "SFT", "DPO", "import", "export")
SETTINGS = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05}
"""Settings that a checkpoint must keep."""
SHAPE = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT = ["--chat", "--prompt=the red house", "--temperature=0", "--max_new_tokens=6", "--device=cpu", "--dtype=float32"]
OWN_TOKENIZERS = {"chatglm": "chatglm3", "baichuan": "baichuan2", "internlm": "internlm", "yuan": "yuan2"}
"""Family -> its tokenizer in published_tokenizers.py."""
FIELDS = {"rms_norm": "rms_norm add_rms_norm", "rope": "rope", "swiglu": "swiglu", "experts": "experts",
          "cross_entropy": "loss_sum", "attention": "causal"}  # fmt: skip
"""Op -> the functions by which a model uses it."""


def read_table() -> dict[str, dict[str, str]]:
    """Family -> column -> what the table says."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in DOCS.read_text().splitlines()]
    head = next(number for number, cells in enumerate(lines) if cells[0] == "family")
    rows: dict[str, dict[str, str]] = {}
    for cells in lines[head + 2 :]:
        if len(cells) != len(lines[head]):
            break
        rows[cells[0].strip("`")] = dict(zip(lines[head], cells))
    return rows


TABLE = read_table()


class Home:
    """Data of the three tasks for one tokenizer."""

    def __init__(self, path: Path, corpus: Path):
        tokenizer, talks = corpus / "tokenizer", conversations(24)
        self.corpus = corpus
        self.sft = pretokenize(write_sft(path / "raw-sft", talks), tokenizer, path / "sft", "sft")
        self.dpo = pretokenize(write_dpo(path / "raw-dpo", talks), tokenizer, path / "dpo", "dpo")


@pytest.fixture(scope="module")
def home(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("families"), data_dir)


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)


def run_flags(out_dir: Path, task: str, data: Path, steps: int) -> list[str]:
    return [
        f"--out_dir={out_dir}", f"--task_type={task}", f"--data_dir={data}", f"--max_iters={steps}",
        "--dtype=float32", "--device=cpu", "--train_batch_size=4", "--valid_batch_size=4", "--valid_iters=1",
        "--gradient_accumulation_steps=1", "--num_threads=1", "--sample_texts=0",
    ]  # fmt: skip


def losses_of(out_dir: Path) -> list[float]:
    return [record["loss"] for record in read_reslog(out_dir / "reslog.jsonl") if record["name"] == "train"]


def model_files(run: Path, step: int) -> dict[str, bytes]:
    """Content of the files of a checkpoint that belong to its model, as anybody may take it away."""
    path = run / "ckpt" / f"step-{step}"
    own = (MANIFEST, TRAINER_STATE)
    return {p.name: p.read_bytes() for p in path.iterdir() if p.name not in own and not is_file_of_rank(p.name)}


def taken_away(run: Path, step: int, folder: Path) -> Path:
    """A checkpoint's model alone, with settings of its own, as people publish it."""
    folder.mkdir()
    for name, content in model_files(run, step).items():
        (folder / name).write_bytes(content)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SETTINGS))
    return folder


def test_the_table_names_every_family_and_claims_what_can_be_tried():
    assert sorted(TABLE) == sorted(FAMILIES)
    for row in TABLE.values():
        assert {row[claim] for claim in CLAIMS} <= {"yes", "no"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_familys_claims(model_type: str, home: Home, tmp_path: Path, capsys: pytest.CaptureFixture):
    """From nothing to a model that answers: each run begins with the folder that the one before it has saved."""
    claimed = {claim for claim in CLAIMS if TABLE[model_type][claim] == "yes"}

    def runs(claim: str, *flags: str) -> bool:
        """Whether a command works, which the table must say; if it does not, one sentence says why."""
        capsys.readouterr()
        code = train_my_ddp.main([*flags])
        said = capsys.readouterr().out.splitlines()
        assert code == (0 if claim in claimed else 2), said
        assert code == 0 or len(said) == 1
        return code == 0

    shape = [f"--{name}={value}" for name, value in SHAPE.items()] + [f"--max_seq_len={SEQ_LEN}"]
    new = [*run_flags(tmp_path / "new", "pretrain", home.corpus, 2), f"--model_type={model_type}", *shape]
    if not runs("train", *new):
        return
    from_new = f"--init_from={taken_away(tmp_path / 'new', 2, tmp_path / 'folder')}"
    if runs("SFT", *run_flags(tmp_path / "sft", "sft", home.sft, 20), "--learning_rate=1e-2", from_new):
        told = losses_of(tmp_path / "sft")
        assert sum(told[-3:]) < 0.9 * sum(told[:3]), told
        check_answers(tmp_path / "sft", capsys)
        said = json.loads(model_files(tmp_path / "sft", 20)["generation_config.json"])
        assert said.items() >= SETTINGS.items() and len(said["eos_token_id"]) > 1
    # The log-probabilities of the model that it begins with are kept beside the data.
    data = shutil.copytree(home.dpo, tmp_path / "data")
    if runs("DPO", *run_flags(tmp_path / "dpo", "dpo", data, 3), "--learning_rate=1e-3", from_new):
        first, *_, last = losses_of(tmp_path / "dpo")
        # As likely as under the reference, which is the model itself, until a step has changed it.
        assert first == pytest.approx(math.log(2), abs=1e-6) and abs(last - first) > 1e-5
    if "export" in claimed:
        # A step too small to change a weight, so that the second export has the first one's bytes.
        still = [*run_flags(tmp_path / "again", "sft", home.sft, 1), "--learning_rate=1e-30", "--weight_decay=0"]
        assert train_my_ddp.main([*still, f"--init_from={tmp_path / 'sft'}"]) == 0
        before, after = model_files(tmp_path / "sft", 20), model_files(tmp_path / "again", 1)
        assert before.keys() == after.keys() and not [name for name in before if before[name] != after[name]]
        assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"} <= before.keys()


def check_answers(run: Path, capsys: pytest.CaptureFixture) -> None:
    """The trained model answers by the template that its own folder holds."""
    capsys.readouterr()
    assert (next((run / "ckpt").iterdir()) / "chat_template.jinja").exists()
    assert generate.main(["--ckpt", str(run), *CHAT]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and not err


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES])
def test_a_folder_that_others_wrote(model_type: str, tmp_path: Path):
    """In several files, by transformers: the same scores. Tests of the other families have folders by other means."""
    config = tiny(model_type).config
    values = hf.to_hf_config(config, torch.float32, family=FAMILIES[model_type])
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert TABLE[model_type]["import"] == "yes"
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).float().eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    config = hf.read_config(tmp_path / "theirs")
    ours, ids = Decoder(config).eval(), torch.arange(24).view(2, 12)
    hf.load_weights(ours, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-5)


def tiny(model_type: str, ops: Ops = REFERENCE, rows: int = 64) -> Decoder:
    config = FAMILIES[model_type].new(ModelConfig(**SHAPE), SHAPE.keys()).resolve(rows, 128)
    model = Decoder(config, ops=ops)
    model.initialize(0)
    return model


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_uses_the_kernels_that_the_table_names(model_type: str):
    used: set[str] = set()

    def recorded(op: str, function: Callable, *args, **kwargs):
        used.add(op)
        return function(*args, **kwargs)

    functions = [(op, name) for op, names in FIELDS.items() for name in names.split()]
    watched = {name: partial(recorded, op, getattr(REFERENCE, name)) for op, name in functions}
    model, ids = tiny(model_type, dataclasses.replace(REFERENCE, **watched)), torch.arange(12)[None]
    model.loss_sum(model(ids), ids).backward()
    assert used == set(TABLE[model_type]["kernels"].split(", "))


@pytest.mark.parametrize(("model_type", "tokenizer"), OWN_TOKENIZERS.items())
def test_a_family_answers_by_its_own_template(model_type: str, tokenizer: str, tmp_path: Path, capsys):
    """As it is published, with a tokenizer whose control tokens stand in code."""
    model, source = tiny(model_type, rows=640), FOLDERS[tokenizer](tmp_path / "source")
    said, family = json.loads((source / "config.json").read_text()), FAMILIES[model_type]
    values = hf.to_hf_config(model.config, torch.float32, family=family) | said
    (source / "config.json").write_text(json.dumps(values))
    save_file(hf.named_weights(model, family), source / "model.safetensors", {"format": "pt"})
    data, run = write_sft(tmp_path / "raw", conversations(24)), tmp_path / "run"
    flags = run_flags(run, "sft", data, 20)
    assert train_my_ddp.main([*flags, f"--init_from={source}", "--max_seq_len=128", "--learning_rate=1e-2"]) == 0
    told = losses_of(run)
    assert sum(told[-3:]) < 0.9 * sum(told[:3]), told
    capsys.readouterr()
    assert generate.main(["--ckpt", str(run), *CHAT]) == 0
    out, err = capsys.readouterr()
    # What it says is hardly taught: blanks are an answer, too.
    assert out.strip("\n") and "may never have seen" not in err
    asked = [Message("user", "the red house")]
    theirs, ours = (ChatTemplate(load_tokenizer(folder)).prompt(asked) for folder in (source, run / "ckpt" / "step-20"))
    assert ours == theirs
    still = run_flags(tmp_path / "again", "sft", data, 1)
    assert train_my_ddp.main([*still, f"--init_from={run}", "--max_seq_len=128", "--learning_rate=1e-30",
                              "--weight_decay=0"]) == 0  # fmt: skip
    before, after = model_files(run, 20), model_files(tmp_path / "again", 1)
    assert before.keys() == after.keys() and not [name for name in before if before[name] != after[name]]
