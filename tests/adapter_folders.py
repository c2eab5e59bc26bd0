"""Folders of models and adapters, made by transformers and peft."""

from pathlib import Path

import torch
from torch import Tensor, nn

SHAPE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
SHAPES = {"bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4}}
IDS = torch.arange(24).view(2, 12)


def make_base(path: Path, model_type: str = "llama", shard: str = "5GB", **changes: object) -> Path:
    """Folder of a tiny model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SHAPES.get(model_type, SHAPE) | changes)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # As weights of a trained model: norms are not 1, and nothing is 0.
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path, max_shard_size=shard)
    return path


def make_adapter(path: Path, base: Path, seed: int = 1, **options: object) -> Path:
    """Folder of an adapter by peft, whose additions are not 0."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]} | options
    model = get_peft_model(load(base), LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    return path


def load(path: Path) -> nn.Module:
    """A model of transformers, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def scores_by_peft(base: Path, adapter: Path | None = None, is_merged: bool = False) -> Tensor:
    """Scores of IDS by transformers and peft."""
    from peft import PeftModel

    model = load(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
        model = model.merge_and_unload() if is_merged else model
    return model(IDS).logits
