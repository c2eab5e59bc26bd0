"""Exported folders in other versions of transformers: logits for each kind of rotary positions.

    python -m benchmarks.interop_transformers --python ENV46/bin/python ENV57/bin/python ENV5/bin/python

Each PYTHON is the interpreter of an environment that has torch, safetensors and some version of transformers. A model
with large random weights is exported, and a plain `AutoModelForCausalLM.from_pretrained` loads it there. The float32
logits of texts within the context and beyond it are compared. The exit code is 1 if a difference exceeds 1e-4 of the
largest logit.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

CONTEXT, BEFORE = 64, 16
"""Context of the model, and of the shorter model that llama3's scaling assumes."""
LENGTHS = {"within": 12, "stretched": 60, "beyond": 150}
KINDS = {
    "default": {"rope_theta": 5000.0},
    "linear": {"rope_scaling": "linear", "rope_scaling_factor": 4.0, "rope_theta": 5000.0},
    "dynamic": {"rope_scaling": "dynamic", "rope_scaling_factor": 2.0, "rope_theta": 5000.0},
    "llama3": {
        "rope_scaling": "llama3", "rope_scaling_factor": 8.0, "rope_theta": 5000.0,
        "original_max_position_embeddings": BEFORE,
    },
    "yarn": {
        "rope_scaling": "yarn", "rope_scaling_factor": 4.0, "rope_theta": 5000.0, "rope_beta_fast": 2.0,
        "original_max_position_embeddings": BEFORE,
    },
    "longrope": {
        "rope_scaling": "longrope", "rope_scaling_factor": 4.0, "rope_theta": 5000.0,
        "rope_short_factor": "1.0,1.0,1.1,1.1,1.2,1.2,1.4,2.0", "rope_long_factor": "1.0,1.3,1.7,2.4,3.1,4.7,9.9,20.5",
        "original_max_position_embeddings": BEFORE,
    },
    "longrope, 2": {
        "rope_scaling": "longrope", "rope_scaling_factor": 2.0, "rope_theta": 5000.0,
        "rope_short_factor": "1.0,1.0,1.1,1.1,1.2,1.2,1.4,2.0", "rope_long_factor": "1.0,1.3,1.7,2.4,3.1,4.7,9.9,20.5",
        "original_max_position_embeddings": BEFORE,
    },
    "proportional": {"rope_scaling": "proportional", "rope_scaling_factor": 2.0, "partial_rotary_factor": 0.5},
    "qwen2, linear": {"qkv_bias": True, "rope_scaling": "linear", "rope_scaling_factor": 4.0},
    "tied, llama3": {
        "tie_word_embeddings": True, "rope_scaling": "llama3", "rope_scaling_factor": 8.0,
        "original_max_position_embeddings": BEFORE,
    },
}  # fmt: skip
SINCE = {"yarn": (4, 57), "longrope": (4, 57), "longrope, 2": (4, 57), "proportional": (5, 0)}
"""The first of the versions tried that computes a kind as version 5 does. Before it, yarn's original context was
max_position_embeddings, a llama took longrope's short list for every text, and proportional positions are unknown."""
TOLERANCE = 1e-4


def text(length: int) -> torch.Tensor:
    """Token ids (1, length)."""
    return torch.arange(length)[None] * 37 % 96


@torch.no_grad()
def export(directory: Path, changes: dict) -> None:
    """Write an exported folder with its expected logits beside it."""
    from model import Decoder, ModelConfig, hf

    shape = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    }  # fmt: skip
    model = Decoder(ModelConfig(**shape | changes).resolve()).eval()
    model.initialize(0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    directory.mkdir(parents=True)
    save_file(hf.named_weights(model), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(model.config, torch.float32)))
    logits = {name: model.logits(model(text(length))).contiguous() for name, length in LENGTHS.items()}
    save_file(logits, directory / "expected.safetensors")


@torch.no_grad()
def check(root: Path) -> int:
    """Compare with the installed transformers. Runs in an environment without this project."""
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    worst, version = 0.0, tuple(map(int, transformers.__version__.split(".")[:2]))
    for directory in sorted(root.iterdir()):
        if version < SINCE.get(directory.name, version):
            print(f"transformers {transformers.__version__:8} {directory.name:14} computes something else")
            continue
        for name, expected in load_file(directory / "expected.safetensors").items():
            # A new model each time, because dynamic scaling remembers the longest text.
            model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").float().eval()
            found = model(text(expected.shape[1])).logits
            error = ((found - expected).abs().max() / expected.abs().max()).item()
            worst = max(worst, error)
            print(f"transformers {transformers.__version__:8} {directory.name:14} {name:10} {error:.1e}")
    return 0 if worst <= TOLERANCE else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters to try")
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.check is not None:
        return check(options.check)
    with tempfile.TemporaryDirectory() as root:
        for kind, changes in KINDS.items():
            export(Path(root) / kind, changes)
        # -I keeps this file's folder, with its kernels.py, off the import path.
        codes = [subprocess.run([python, "-I", __file__, "--check", root]).returncode for python in options.python]
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
