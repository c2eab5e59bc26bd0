"""Write families.json: scores and gradients of small models whose classes transformers does not have.

    python -m tests.golden.make_families

Written from the published descriptions, for reading: float64, one token and one head at a time, and nothing of our
model. Gradients are torch's, of these loops. The weights are drawn from their names, so that a test has the same ones.
It takes seconds.

    baichuan    Baichuan 2 with 13 billion parameters (Yang et al., 2023): ALiBi (Press et al., 2022) and a head whose
                rows are scaled to length 1
    yuan        Yuan 2.0 (Wu et al., 2023): the local filter, and the rows of q_proj and k_proj as its code reads them
"""

import json
import math
import random
from pathlib import Path

import torch
from torch import Tensor

OUTPUT = Path(__file__).parent / "families.json"
TEXTS = {"long": [3, 14, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9], "short": [2, 7, 1, 8, 2, 8, 1]}
"""The first one is longer than the context."""
SIZES = {
    "vocab_size": 16, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "hidden_act": "silu",
}  # fmt: skip
CONFIGS = {
    "baichuan": SIZES | {"model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "model_max_length": 8,
                         "tie_word_embeddings": False, "normalized_head": True},
    "yuan": SIZES | {"model_type": "yuan", "architectures": ["YuanForCausalLM"], "max_position_embeddings": 8,
                     "model_max_length": 8, "tie_word_embeddings": True, "use_shareqk": False, "causal_mask": True},
}  # fmt: skip
"""As in published folders, but for the sizes; normalized_head says which head this vocabulary has."""


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Name of each tensor in the folder -> its shape."""
    vocab, width, inner = SIZES["vocab_size"], SIZES["hidden_size"], SIZES["intermediate_size"]
    found = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if kind == "baichuan":
        found["lm_head.weight"] = (vocab, width)
    for layer in (f"model.layers.{number}" for number in range(SIZES["num_hidden_layers"])):
        found |= {f"{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")}
        found |= {f"{layer}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        found[f"{layer}.mlp.down_proj.weight"] = (width, inner)
        attention = f"{layer}.self_attn"
        found[f"{attention}.o_proj.weight"] = (width, width)
        if kind == "baichuan":
            found[f"{attention}.W_pack.weight"] = (3 * width, width)
            continue
        found |= {f"{attention}.{name}_proj.weight": (width, width) for name in "qkv"}
        found[f"{attention}.lf_gate.conv1.weight"] = (width // 2, width, 2, 1)
        found[f"{attention}.lf_gate.conv1.bias"] = (width // 2,)
        found[f"{attention}.lf_gate.conv2.weight"] = (width, width // 2, 2, 1)
        found[f"{attention}.lf_gate.conv2.bias"] = (width,)
        found[f"{attention}.lf_gate.output_layernorm.weight"] = (width,)
    return found


def weights(kind: str) -> dict[str, Tensor]:
    """Tensors of the folder in float64: multiples of 1/64, which any dtype holds exactly."""
    made = {}
    for name, shape in shapes(kind).items():
        draw = random.Random(f"{kind}/{name}")
        values = [draw.randint(-32, 32) / 64 + ("norm" in name) for _ in range(math.prod(shape))]
        made[name] = torch.tensor(values, dtype=torch.float64).view(shape)
    return made


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + SIZES["rms_norm_eps"]) * weight


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def alibi_slopes(heads: int) -> list[float]:
    """A geometric sequence for a power of two; otherwise that of the power below, and every second of that above."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)][: heads - power]


def rotated(x: Tensor, position: int) -> Tensor:
    """Rotary positions with base 10,000: channels i and i + D/2 turn together."""
    half, out = len(x) // 2, [None] * len(x)
    for i in range(half):
        angle = position * 10000.0 ** (-2 * i / len(x))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i], out[i + half] = x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin
    return torch.stack(out)


def filtered(xs: list[Tensor], w: dict[str, Tensor], gate: str) -> list[Tensor]:
    """Yuan's filter: two convolutions over a token and the one before it, each of which sees zeros before the text."""
    ys = xs
    for conv in ("conv1", "conv2"):
        weight, bias = w[f"{gate}.{conv}.weight"], w[f"{gate}.{conv}.bias"]
        before = [torch.zeros_like(ys[0]), *ys[:-1]]
        ys = [weight[:, :, 0, 0] @ earlier + weight[:, :, 1, 0] @ now + bias for earlier, now in zip(before, ys)]
    return [rms_norm(y + x, w[f"{gate}.output_layernorm.weight"]) for x, y in zip(xs, ys)]


def queries_keys_values(kind: str, xs: list[Tensor], w: dict[str, Tensor], layer: str) -> list[tuple[Tensor, ...]]:
    """(query, key, value) of each token, (heads, D) each."""
    heads, found = SIZES["num_attention_heads"], []
    width = SIZES["hidden_size"] // heads
    if kind == "baichuan":
        for x in xs:
            found.append(tuple((w[f"{layer}.W_pack.weight"] @ x).view(3, heads, width)))
        return found
    for position, (x, smooth) in enumerate(zip(xs, filtered(xs, w, f"{layer}.lf_gate"))):
        # Both results side by side; each head takes the next 2 D channels, queries first.
        both = torch.cat([w[f"{layer}.q_proj.weight"] @ smooth, w[f"{layer}.k_proj.weight"] @ smooth])
        query, key = [], []
        for head in both.view(heads, 2 * width):
            query.append(rotated(head[:width], position))
            key.append(rotated(head[width:], position))
        found.append((torch.stack(query), torch.stack(key), (w[f"{layer}.v_proj.weight"] @ x).view(heads, width)))
    return found


def attention(kind: str, xs: list[Tensor], w: dict[str, Tensor], layer: str) -> list[Tensor]:
    heads = SIZES["num_attention_heads"]
    tokens, slopes = queries_keys_values(kind, xs, w, layer), alibi_slopes(heads)
    results = []
    for t, (query, _, _) in enumerate(tokens):
        parts = []
        for head in range(heads):
            scores = [query[head] @ key[head] / math.sqrt(query.shape[1]) for _, key, _ in tokens[: t + 1]]
            if kind == "baichuan":
                scores = [score - slopes[head] * (t - s) for s, score in enumerate(scores)]
            shares = torch.softmax(torch.stack(scores), 0)
            parts.append(sum(share * value[head] for share, (_, _, value) in zip(shares, tokens)))
        results.append(w[f"{layer}.o_proj.weight"] @ torch.cat(parts))
    return results


def feed_forward(kind: str, x: Tensor, w: dict[str, Tensor], layer: str) -> Tensor:
    gate, up = (w[f"{layer}.{name}_proj.weight"] @ x for name in ("gate", "up"))
    # In Yuan, "up" goes through SiLU.
    inner = silu(gate) * up if kind == "baichuan" else silu(up) * gate
    return w[f"{layer}.down_proj.weight"] @ inner


def scores_of(kind: str, ids: list[int], w: dict[str, Tensor]) -> Tensor:
    """Scores (T, V) of a text."""
    hs = [w["model.embed_tokens.weight"][token] for token in ids]
    for layer in (f"model.layers.{number}" for number in range(SIZES["num_hidden_layers"])):
        normed = [rms_norm(h, w[f"{layer}.input_layernorm.weight"]) for h in hs]
        hs = [h + y for h, y in zip(hs, attention(kind, normed, w, f"{layer}.self_attn"))]
        normed = [rms_norm(h, w[f"{layer}.post_attention_layernorm.weight"]) for h in hs]
        hs = [h + feed_forward(kind, x, w, f"{layer}.mlp") for h, x in zip(hs, normed)]
    head = w["model.embed_tokens.weight"]
    if kind == "baichuan":
        head = torch.stack([row / torch.sqrt(row @ row) for row in w["lm_head.weight"]])
    return torch.stack([head @ rms_norm(h, w["model.norm.weight"]) for h in hs])


def loss_of(scores: Tensor, ids: list[int]) -> Tensor:
    """Sum of the cross entropies of the tokens that follow."""
    return sum(torch.logsumexp(row, 0) - row[token] for row, token in zip(scores, ids[1:]))


def rounded(values: object) -> object:
    """Eight digits after the point."""
    return [rounded(value) for value in values] if isinstance(values, list) else round(values, 8)


def main() -> None:
    made = {}
    for kind in CONFIGS:
        w = {name: weight.requires_grad_() for name, weight in weights(kind).items()}
        scores = {text: scores_of(kind, ids, w) for text, ids in TEXTS.items()}
        loss = sum(loss_of(scores[text], ids) for text, ids in TEXTS.items())
        loss.backward()
        made[kind] = {
            "loss": loss.item(),
            "scores": {text: rounded(values.tolist()) for text, values in scores.items()},
            "gradients": {name: rounded(weight.grad.flatten().tolist()) for name, weight in w.items()},
        }
    OUTPUT.write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
