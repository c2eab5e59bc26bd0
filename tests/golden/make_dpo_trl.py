"""Write dpo_trl.json: TRL's results for one batch of preferences, for tests/unit/test_dpo_golden.py.

    pip install -r requirements-bench.txt
    python -m tests.golden.make_dpo_trl

TRL 1.16.0 runs as installed. Losses and options that it no longer has come from earlier releases, whose packages are
downloaded: only two pure functions of their files are executed, because the rest needs other libraries of that time.
Everything is float32 on one CPU thread.
"""

import argparse
import ast
import enum
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl import __version__ as NEW

from model import Decoder, hf
from model.config import ModelConfig
from tokenizer.hf_bbpe import train_hf_bbpe

OUTPUT = Path(__file__).parent / "dpo_trl.json"
CONFIG = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1}  # fmt: skip
SEEDS, BATCH_SEED = {"policy": 2, "reference": 1}, 3
CLAMPED_SEEDS = {"policy": 1, "reference": 2}
"""With these, both means of kto_pair are negative, so they count as zero. TRL 0.8.6 lets the gradient go through a
positive mean, where the paper does not back-propagate: there, only the losses can be compared."""
LENGTHS = [(3, 5, 9), (12, 1, 4), (1, 8, 2), (7, 11, 11), (5, 2, 13)]
"""Tokens of the prompt, the chosen and the rejected answer of each pair."""
OLD = {"0.9.6": "sigmoid robust hinge ipo sppo_hard nca_pair", "0.8.6": "sigmoid hinge ipo kto_pair"}
CASES = [
    ("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.0), ("sigmoid", 0.3, 0.2), ("robust", 0.3, 0.0), ("robust", 0.3, 0.2),
    ("hinge", 0.1, 0.0), ("ipo", 0.1, 0.0), ("ipo", 0.7, 0.0), ("kto_pair", 0.1, 0.0), ("kto_pair", 0.4, 0.0),
    ("sppo_hard", 0.1, 0.0), ("nca_pair", 0.1, 0.0), ("nca_pair", 0.4, 0.0),
]  # fmt: skip
"""(loss, beta, label smoothing)."""
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")  # fmt: skip


def make_pairs() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(BATCH_SEED)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {
            name: torch.randint(CONFIG["vocab_size"], (length,), generator=generator).tolist()
            for name, length in zip(names, lengths)
        }
        for lengths in LENGTHS
    ]


def hugging_face_model(seed: int, directory: Path) -> torch.nn.Module:
    """Our initial weights in a model of transformers."""
    model = Decoder(ModelConfig(**CONFIG).resolve())
    model.initialize(seed)
    directory.mkdir()
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, torch.float32)))
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """Name -> norm of the gradient, computed in float64."""
    return {name: parameter.grad.double().norm().item() for name, parameter in model.named_parameters()}


def run_new(pairs: list[dict], home: Path, loss: str, beta: float, smoothing: float, number: int) -> dict[str, Any]:
    """Loss, gradients and metrics of the installed TRL's trainer."""
    model, reference = (hugging_face_model(seed, home / f"{number}-{name}") for name, seed in SEEDS.items())
    tokenizer = AutoTokenizer.from_pretrained(home / "tokenizer")
    arguments = DPOConfig(
        output_dir=str(home / "out"), loss_type=[loss], beta=beta, label_smoothing=smoothing, use_cpu=True,
        bf16=False, report_to=[], gradient_checkpointing=False, disable_dropout=True,
    )  # fmt: skip
    # Needed only to construct the trainer: the batch consists of ids.
    texts = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = DPOTrainer(model, reference, arguments, train_dataset=texts, processing_class=tokenizer)
    trainer.model.train()
    value = trainer.compute_loss(trainer.model, trainer.data_collator(pairs))
    value.backward()
    metrics = {name: trainer._metrics["train"][name][0] for name in METRICS}
    return {"loss": value.item(), "gradient_norms": gradient_norms(trainer.model), "metrics": metrics}


class Divergence(enum.Enum):
    """Replaces the enumeration that 0.9.6 compares with."""

    REVERSE_KL, JS_DIVERGENCE, ALPHA_DIVERGENCE = "reverse_kl", "js_divergence", "alpha_divergence"


def old_functions(version: str, home: Path) -> dict[str, Callable]:
    """`dpo_loss` and `get_batch_logps` of an earlier TRL."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(home), f"trl=={version}"]
    subprocess.run(pip, check=True)
    with zipfile.ZipFile(next(home.glob(f"trl-{version}-*.whl"))) as wheel:
        tree = ast.parse(wheel.read("trl/trainer/dpo_trainer.py"))
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DPOTrainer")
    wanted = [node for node in trainer.body if getattr(node, "name", "") in ("dpo_loss", "get_batch_logps")]
    for node in wanted:
        node.decorator_list = []
    names: dict[str, Any] = {"torch": torch, "F": F, "FDivergenceType": Divergence}
    code = ast.Module([ast.parse("from __future__ import annotations").body[0], *wanted], [])
    exec(compile(ast.fix_missing_locations(code), f"trl {version}", "exec"), names)
    return names


def run_old(
    functions: dict[str, Callable], pairs: list[dict], home: Path, loss: str, beta: float, smoothing: float,
    seeds: dict[str, int],
) -> dict[str, Any]:  # fmt: skip
    """Loss and gradients by the formulas of an earlier TRL, on a model of transformers."""
    home.mkdir()
    model, reference = (hugging_face_model(seed, home / name) for name, seed in seeds.items())
    rows = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.tensor([(prompt + answer + [0] * width)[:width] for prompt, answer in rows])
    labels = torch.tensor([([-100] * len(p) + a + [-100] * width)[:width] for p, a in rows])
    mask = torch.tensor([([1] * len(p + a) + [0] * width)[:width] for p, a in rows])

    def log_probs(one: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        answers = functions["get_batch_logps"](one(input_ids=ids, attention_mask=mask).logits, labels)
        # 0.9.6 also returns the lengths; 0.8.6 can average by itself, with the same result.
        sums = answers[0] if isinstance(answers, tuple) else answers
        means = sums / (labels != -100).sum(-1)
        return (means if loss == "ipo" else sums).chunk(2)

    with torch.no_grad():
        expected = log_probs(reference)
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), reference_free=False, f_divergence_type="reverse_kl",
        f_divergence_params=None, loss_type=loss, beta=beta, label_smoothing=smoothing,
    )  # fmt: skip
    losses, _, _ = functions["dpo_loss"](trainer, *log_probs(model), *expected)
    losses.mean().backward()
    return {"loss": losses.mean().item(), "gradient_norms": gradient_norms(model)}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    pairs, results = make_pairs(), []
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        train_hf_bbpe(["a b c " * 20], 261, show_progress=False).save_pretrained(home / "tokenizer")
        functions = {version: old_functions(version, home) for version in OLD}
        for number, (loss, beta, smoothing) in enumerate(CASES):
            case = {"kind": loss, "beta": beta, "label_smoothing": smoothing, "seeds": SEEDS}
            # The new version ignores the smoothing of sigmoid.
            if loss != "kto_pair" and not (loss == "sigmoid" and smoothing):
                results.append({"trl": NEW, **case, **run_new(pairs, home, loss, beta, smoothing, number)})
            for version, known in OLD.items():
                if loss in known.split():
                    arguments = (functions[version], pairs, home / f"{version}-{number}", loss, beta, smoothing, SEEDS)
                    results.append({"trl": version, **case, **run_old(*arguments)})
            if loss == "kto_pair":
                del results[-1]["gradient_norms"]
                arguments = (functions["0.8.6"], pairs, home / f"clamped-{number}", loss, beta, smoothing)
                figures = run_old(*arguments, CLAMPED_SEEDS)
                results.append({"trl": "0.8.6", **case, "seeds": CLAMPED_SEEDS, **figures})
    content = {
        "made_with": {"torch": torch.__version__.partition("+")[0], "trl": [NEW, *OLD]},
        "config": CONFIG,
        "pairs": pairs,
        "results": results,
    }
    OUTPUT.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{len(results)} results in {OUTPUT.name}")


if __name__ == "__main__":
    main()
