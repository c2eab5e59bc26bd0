"""Small models with adapters, ours and PEFT's, with the same weights. PEFT is loaded only where it is used."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model import Decoder, ModelConfig, hf
from model.adapters.lora import LoraSpec, adapter_parameters, attach, base_name, is_adapters
from model.families import family_of

VOCAB_SIZE, STEPS = 48, 20
SHAPE = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "initializer_range": 0.2,
}  # fmt: skip
ALL = ("all-linear",)
WHOLE = ("embed_tokens", "lm_head")


class Case(NamedTuple):
    spec: LoraSpec
    fields: dict[str, Any] = {}
    """Fields of the model, beside SHAPE."""
    theirs: dict[str, Any] = {}
    """Arguments of PEFT's LoraConfig that differ from the spec's."""


_BLOOM = {
    "model_type": "bloom", "norm": "layernorm", "embedding_norm": True, "mlp": "gelu", "mlp_bias": True,
    "attention_bias": True, "position_embedding": "alibi", "num_key_value_heads": 4, "intermediate_size": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
_MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
CASES = {
    "lora": Case(LoraSpec(r=4, alpha=8.0, targets=("q_proj", "v_proj"))),
    "lora, whole modules": Case(LoraSpec(r=3, alpha=8.0, targets=("o_proj", "up_proj"), modules_to_save=WHOLE)),
    "rslora": Case(LoraSpec(r=4, alpha=8.0, targets=ALL, use_rslora=True)),
    "rslora, whole modules": Case(
        LoraSpec(r=4, alpha=4.0, targets=ALL, use_rslora=True, modules_to_save=(*WHOLE, "input_layernorm"))
    ),
    "dora": Case(LoraSpec(r=4, alpha=8.0, targets=ALL, use_dora=True)),
    "dora, whole modules": Case(
        LoraSpec(r=32, alpha=16.0, targets=("k_proj", "down_proj"), use_dora=True, modules_to_save=WHOLE)
    ),
    "qwen2": Case(LoraSpec(r=4, alpha=8.0, targets=ALL, use_dora=True), {"model_type": "qwen2", "qkv_bias": True}),
    "mixtral": Case(LoraSpec(r=4, alpha=8.0, targets=("q_proj", "k_proj", "v_proj", "o_proj")), _MIXTRAL),
    "bloom": Case(
        LoraSpec(r=4, alpha=8.0, targets=("o_proj", "up_proj", "down_proj"), use_dora=True), _BLOOM,
        {"target_modules": ["dense", "dense_h_to_4h", "dense_4h_to_h"]},
    ),
}  # fmt: skip
"""Name -> case. Bloom's queries, keys and values are one tensor there, so they cannot be compared. For
Mixtral, all-linear would be more there: routers and experts."""


def our_model(case: Case) -> Decoder:
    """A model whose adapter does something."""
    model = Decoder(ModelConfig(**SHAPE | case.fields).resolve())
    model.initialize(1)
    attach(model, case.spec, seed=2)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if is_adapters(name) or name.endswith(".bias"):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter += 0.1 * noise
    return model


def peft_model(case: Case, ours: Decoder, directory: Path) -> nn.Module:
    """PEFT's model with our weights, base and adapter.

    Args:
        directory: is created, and receives the base model.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = Decoder(ours.config)
    base.load_state_dict({base_name(name): value for name, value in ours.state_dict().items() if not is_adapters(name)})
    directory.mkdir()
    save_file(hf.named_weights(base), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(base.config, torch.float32)))
    spec = case.spec
    arguments: dict[str, Any] = {
        "r": spec.r, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "use_rslora": spec.use_rslora,
        "use_dora": spec.use_dora, "modules_to_save": list(spec.modules_to_save) or None,
        "target_modules": "all-linear" if spec.targets == ALL else list(spec.targets), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    model = get_peft_model(plain, LoraConfig(**arguments | case.theirs))
    theirs, named = dict(model.named_parameters()), peft_names(ours)
    assert set(named.values()) == {name for name, parameter in theirs.items() if parameter.requires_grad}
    with torch.no_grad():
        for name, parameter in adapter_parameters(ours).items():
            theirs[named[name]].copy_(parameter)
    return model


def peft_names(ours: Decoder) -> dict[str, str]:
    """Name of a trained parameter -> that of PEFT's, in memory."""
    family, named = family_of(ours.config), {}
    for name in adapter_parameters(ours):
        if is_adapters(name):
            layer, _, rest = name.partition(".lora_")
            module = family.their_name(f"{layer}.weight").removesuffix(".weight")
            named[name] = f"base_model.model.{module}.lora_{rest.removesuffix('.weight')}.default.weight"
        else:
            module, _, kind = family.their_name(base_name(name)).rpartition(".")
            named[name] = f"base_model.model.{module}.modules_to_save.default.{kind}"
    return named


def batch(step: int) -> Tensor:
    """Tokens (2, 10); the same four batches, repeated."""
    return torch.randint(0, VOCAB_SIZE, (2, 10), generator=torch.Generator().manual_seed(100 + step % 4))


class Result(NamedTuple):
    """Figures of a case: logits (2, 9, V) of the first batch, the gradients of all trained parameters there by our
    names, the losses of STEPS steps."""

    logits: Tensor
    gradients: dict[str, Tensor]
    losses: list[float]


def run(model: nn.Module, names: dict[str, str] | None = None) -> Result:
    """Train a model, ours or, with `names` (our name -> theirs), PEFT's."""
    torch.set_num_threads(1)
    parameters = dict(model.named_parameters())
    trained = {ours: parameters[theirs] for ours, theirs in names.items()} if names else adapter_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-3, weight_decay=0.1)
    logits, gradients, losses = torch.empty(0), {}, []
    for step in range(STEPS):
        tokens, loss_of = batch(step), _our_loss if names is None else _their_loss
        loss, scores = loss_of(model, tokens)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            logits = scores.detach()
            gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
        optimizer.step()
        losses.append(loss.item())
    return Result(logits, gradients, losses)


def _our_loss(model: Decoder, tokens: Tensor) -> tuple[Tensor, Tensor]:
    hidden, labels = model(tokens[:, :-1]), tokens[:, 1:]
    return model.loss_sum(hidden, labels) / labels.numel(), model.logits(hidden)


def _their_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), logits
