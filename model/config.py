"""Shape and numerics of the model. Plain data: importing this does not load torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from utils.options import OnlyWith

ModelType = Literal[
    "", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "ernie4_5_moe", "bloom", "baichuan", "chatglm",
    "internlm", "aquila", "yuan",
]  # fmt: skip
"""Families that can be named: those of model/families/, which a test compares."""

_RANGES = {
    "vocab_size": (0, 2**31 - 1), "hidden_size": (1, 2**20), "intermediate_size": (1, 2**24),
    "num_hidden_layers": (1, 2_000), "num_attention_heads": (1, 2**16), "num_key_value_heads": (1, 2**16),
    "head_dim": (1, 2**16), "max_position_embeddings": (0, 2**31 - 1),
    "original_max_position_embeddings": (0, 2**31 - 1), "rms_norm_eps": (0.0, 1.0), "initializer_range": (0.0, 1.0),
    "rope_theta": (1.0, 1e30), "rope_scaling_factor": (1.0, 1e6), "rope_attention_factor": (0.0, 1e6),
    "sliding_window": (0, 2**31 - 1),
    "num_local_experts": (0, 2**16), "num_experts_per_tok": (1, 2**16), "moe_intermediate_size": (0, 2**24),
    "num_shared_experts": (0, 2**16), "router_aux_loss_coef": (0.0, 1e6), "router_z_loss_coef": (0.0, 1e6),
    "router_bias_update_rate": (0.0, 1e6), "partial_rotary_factor": (0.0, 1.0),
}  # fmt: skip
"""Values that can be computed with: far more than anybody trains, so a value outside is a typing error. In float32, a
theta of 0 or 1e300 gives NaN."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding for a vocabulary: the next multiple of 64, which suits matrix kernels."""
    return -(-vocab_size // 64) * 64


@dataclass(frozen=True)
class ModelConfig:
    """Model. Fields bear the names of Hugging Face's llama or mixtral config where one of them has them."""

    model_type: ModelType = ""
    """Family, by Hugging Face's name. Empty: that of the weights to begin with, or one that has the other fields."""
    vocab_size: int = 0
    """Rows of the embedding; 0: as many as the tokenizer needs."""
    hidden_size: int = 768
    """Width of the residual stream."""
    intermediate_size: int = 0
    """Width of the feed-forward layer; 0: 8/3 of hidden_size (gelu: 4 times), rounded up to a multiple of 64."""
    num_hidden_layers: int = 12
    """Transformer blocks."""
    num_attention_heads: int = 12
    """Query heads."""
    num_key_value_heads: int = 0
    """Key and value heads (grouped-query attention); 0: num_attention_heads."""
    head_dim: int = 0
    """Width of a head; 0: hidden_size / num_attention_heads."""
    max_position_embeddings: int = 0
    """Longest sequence that the positions are meant for; 0: max_seq_len."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm before each layer and after the last block; layernorm has biases."""
    rms_norm_eps: float = 1e-5
    """Number added under the root of the norms, to the mean square or the variance."""
    embedding_norm: bool = False
    """Also norm the embeddings."""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """Feed-forward layer: down(silu(gate x) * up x), or down(gelu(up x)) with GELU's tanh form."""
    mlp_bias: bool = False
    """Bias on the projections of the feed-forward layer."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """Use one matrix for input embedding and output head."""
    normalized_head: bool = False
    """Scale each row of the output head to length 1 before it is multiplied with."""
    attention_bias: bool = False
    """Bias on the Q, K, V and O projections, as in Hugging Face's llama."""
    qkv_bias: bool = False
    """Bias on Q, K and V only; exported as qwen2."""
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys, before the rotary positions."""
    local_filter: bool = False
    """Compute queries and keys from a filter over each token and the two before it."""
    sliding_window: int = 0
    """Latest keys that a query sees, itself among them; 0: all keys before it."""
    full_attention_layers: str = ""
    """Layers that see all keys in spite of sliding_window: numbers from 0, with commas."""
    position_embedding: Literal["rope", "alibi"] = "rope"
    """Positions: rotary, or ALiBi's penalty for the distance to a key."""
    rope_interleaved: bool = False
    """Rotate neighbouring channels of a head together, not those half a head apart."""
    partial_rotary_factor: float = 1.0
    """Share of each head's channels that is rotated: the first ones. proportional scaling: share of the pairs."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"] = "none"
    """Method to reach longer contexts. dynamic (NTK-aware) acts on sequences beyond max_position_embeddings."""
    rope_scaling_factor: float = 1.0
    """Factor by which the context is stretched; longrope: only what rope_attention_factor is derived from."""
    rope_low_freq_factor: float = 1.0
    """llama3 scaling: wavelengths above the original context divided by this are stretched by the whole factor."""
    rope_high_freq_factor: float = 4.0
    """llama3 scaling: wavelengths below the original context divided by this stay as they are."""
    rope_beta_fast: float = 32.0
    """yarn scaling: wavelengths that fit more often into the original context stay as they are."""
    rope_beta_slow: float = 1.0
    """yarn scaling: wavelengths that fit less often into the original context are stretched by the whole factor."""
    rope_truncate: bool = True
    """yarn scaling: let the range between these two begin and end at whole channels."""
    rope_short_factor: str = ""
    """longrope scaling: by how much each wavelength is stretched in sequences within the original context: a number for
    each pair of channels, with commas."""
    rope_long_factor: str = ""
    """longrope scaling: the same in longer sequences."""
    rope_attention_factor: float = 0.0
    """yarn and longrope scaling: scale of rotated queries and keys; 0: that of the method for rope_scaling_factor."""
    original_max_position_embeddings: int = 0
    """llama3, yarn and longrope scaling: context before stretching; 0: max_position_embeddings."""
    num_local_experts: int = 0
    """Experts of each feed-forward layer, of which a router chooses some for each token; 0: dense layers."""
    num_experts_per_tok: int = 2
    """Experts that each token is sent to."""
    moe_intermediate_size: int = 0
    """Width of an expert; 0: intermediate_size."""
    num_shared_experts: int = 0
    """Experts that every token is sent to besides; they are one of their common width."""
    dense_layers: str = ""
    """Layers without experts: numbers from 0, with commas."""
    norm_topk_prob: bool = True
    """Let the weights of a token's experts add up to 1."""
    router_aux_loss_coef: float = 0.001
    """Weight of the loss that keeps the load of the experts even."""
    router_aux_loss: Literal["row", "batch"] = "row"
    """Balance the load in each row, or in a batch and all layers as transformers; that needs one micro-batch a step."""
    router_z_loss_coef: float = 0.0
    """Weight of the loss that keeps the router's scores small."""
    router_bias: bool = False
    """Add a bias to each expert's probability, for the choice alone, that evens the load without a loss."""
    router_bias_update_rate: float = 0.0
    """Step of that bias after each optimizer step; above 0 it is there."""
    hidden_dropout: float = 0.0
    """Probability of dropping an element of each block's attention and feed-forward output."""
    attention_dropout: float = 0.0
    """Probability of dropping an attention weight; above 0, attention is the plain one."""
    residual_in_fp32: bool = True
    """Keep the residual stream in float32, whatever the dtype of the weights."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a combination that cannot be built.
        """
        known = replace(self, router_bias_update_rate=0.0)
        if self.model_type and not self.num_local_experts:
            # The family may say how many there are.
            known = replace(known, num_shared_experts=0, dense_layers="", router_bias=False)
        # The experts may also come from the weights to begin with.
        known.resolve()

    def resolve(self, vocab_size: int = 0, max_seq_len: int = 0) -> "ModelConfig":
        """The configuration with its zeros filled in, after a check that the fields fit together.

        Args:
            vocab_size: rows of the embedding, if the field is 0 (0: not known yet, stays 0).
            max_seq_len: max_position_embeddings, if the field is 0.
        Raises:
            ValueError: a combination that cannot be built.
        """
        values = dict(self.__dict__)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if values[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {values[name]}")
        for name in ("vocab_size", "intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
                     "max_position_embeddings", "original_max_position_embeddings", "initializer_range"):  # fmt: skip
            if values[name] < 0:
                raise ValueError(f"{name} must not be negative, got {values[name]}")
        values["vocab_size"] = self.vocab_size or vocab_size
        values["num_key_value_heads"] = self.num_key_value_heads or self.num_attention_heads
        # A gated layer has three matrices instead of two.
        times = (8, 3) if self.mlp == "swiglu" else (4, 1)
        values["intermediate_size"] = self.intermediate_size or -(-(self.hidden_size * times[0] // times[1]) // 64) * 64
        values["max_position_embeddings"] = self.max_position_embeddings or max_seq_len
        values["original_max_position_embeddings"] = (
            self.original_max_position_embeddings or values["max_position_embeddings"]
        )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}: choose one that is"
                )
            values["head_dim"] = self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % values["num_key_value_heads"]:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {values['num_key_value_heads']}"
            )
        if self.num_local_experts:
            values["moe_intermediate_size"] = self.moe_intermediate_size or values["intermediate_size"]
            values["router_bias"] = self.router_bias or self.router_bias_update_rate > 0.0
        resolved = ModelConfig(**values)
        resolved._check_attention()
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= values[name] < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {values[name]}")
        for name, (least, most) in _RANGES.items():
            if not least <= values[name] <= most:
                raise ValueError(f"{name} must lie between {least:,} and {most:,}, got {values[name]}")
        resolved._check_rope()
        resolved._check_experts()
        return resolved

    def _check_attention(self) -> None:
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias already covers Q, K and V: give only one of attention_bias and qkv_bias")
        _layers("full_attention_layers", self.full_attention_layers, self.num_hidden_layers)
        if self.full_attention_layers and not self.sliding_window:
            raise ValueError("full_attention_layers has no meaning without sliding_window: give both or neither")

    def _check_rope(self) -> None:
        if self.position_embedding != "rope":
            if self.rope_scaling != "none":
                raise ValueError(f"rope_scaling={self.rope_scaling} has no meaning for ALiBi: leave it out")
            return
        if self.head_dim % 2:
            raise ValueError(f"rotary embeddings need an even head_dim, got {self.head_dim}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} leaves {self.rotary_dim} channels of "
                f"{self.head_dim} to rotate: choose one that leaves an even number"
            )
        check = {
            "dynamic": self._check_dynamic, "llama3": self._check_llama3, "yarn": self._check_yarn,
            "longrope": self._check_longrope, "proportional": self._check_proportional,
        }.get(self.rope_scaling)  # fmt: skip
        if check is not None:
            check()

    def _check_dynamic(self) -> None:
        if self.rotary_dim < 4:
            raise ValueError(f"rope_scaling=dynamic needs a head_dim of at least 4, got {self.rotary_dim}")

    def _check_llama3(self) -> None:
        low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
        if not 0.0 < low:
            raise ValueError(f"rope_low_freq_factor must be positive, got {low}")
        if not low < high:
            raise ValueError(f"rope_high_freq_factor must be larger than rope_low_freq_factor {low}, got {high}")

    def _check_yarn(self) -> None:
        slow, fast = self.rope_beta_slow, self.rope_beta_fast
        if not 0.0 < slow:
            raise ValueError(f"rope_beta_slow must be positive, got {slow}")
        if not slow <= fast:
            raise ValueError(f"rope_beta_fast must be at least rope_beta_slow {slow}, got {fast}")
        if self.rope_theta == 1.0:
            raise ValueError("rope_scaling=yarn needs a rope_theta above 1, with which all wavelengths would be equal")

    def _check_longrope(self) -> None:
        if not self.vocab_size:
            # The shape, and maybe these numbers, may still come from weights to start from.
            return
        for name in ("rope_short_factor", "rope_long_factor"):
            factors = rope_factors(name, getattr(self, name))
            if len(factors) != self.rotary_dim // 2:
                raise ValueError(
                    f"{name} must have a number for each of the {self.rotary_dim // 2} pairs of channels, got "
                    f"{len(factors)}"
                )
        if self.original_max_position_embeddings == 1:
            raise ValueError("rope_scaling=longrope needs an original_max_position_embeddings above 1")

    def _check_proportional(self) -> None:
        if self.rotated_pairs < 1:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} leaves none of {self.head_dim // 2} pairs of "
                f"channels to rotate: choose a larger one"
            )

    def _check_experts(self) -> None:
        _layers("dense_layers", self.dense_layers, self.num_hidden_layers)
        if not self.num_local_experts:
            others = ("num_shared_experts", "dense_layers", "router_bias", "router_bias_update_rate")
            if given := [name for name in others if getattr(self, name)]:
                raise ValueError(f"{given[0]} has no meaning without experts: give --num_local_experts, too")
            return
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is more than num_local_experts "
                f"{self.num_local_experts}"
            )
        if self.mlp != "swiglu" or self.mlp_bias:
            raise ValueError("experts are SwiGLU without bias: leave out mlp and mlp_bias")

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that have an angle; with proportional scaling, it may be 0."""
        is_whole = self.rope_scaling == "proportional"
        return self.head_dim if is_whole else int(self.head_dim * self.partial_rotary_factor)

    @property
    def rotated_pairs(self) -> int:
        """Pairs of channels of each head whose angle is not 0."""
        return int(self.partial_rotary_factor * self.head_dim // 2)

    def window_of(self, layer: int) -> int:
        """Latest keys that a query of a layer sees; 0: all."""
        is_full = layer in _layers("full_attention_layers", self.full_attention_layers, self.num_hidden_layers)
        return 0 if is_full else self.sliding_window

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward part consists of experts."""
        is_dense = layer in _layers("dense_layers", self.dense_layers, self.num_hidden_layers)
        return self.num_local_experts > 0 and not is_dense


def _layers(name: str, text: str, num_layers: int) -> frozenset[int]:
    """Numbers of layers in a field.

    Raises:
        ValueError: it is not a list of numbers of layers.
    """
    numbers = [part.strip() for part in text.split(",")] if text else []
    if any(not (number.isascii() and number.isdigit() and int(number) < num_layers) for number in numbers):
        raise ValueError(f"{name} must be numbers of layers below {num_layers}, with commas, such as 0,1; got {text}")
    return frozenset(map(int, numbers))


def rope_factors(name: str, text: str) -> tuple[float, ...]:
    """Numbers in a field of longrope.

    Raises:
        ValueError: it is not a list of positive numbers.
    """
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(1e-6 <= number <= 1e6 for number in numbers):
        raise ValueError(f"{name} must be positive numbers with commas, such as 1.0,1.5; got {text or 'nothing'}")
    return numbers


_HAS_NO_FACTOR = ("longrope", "proportional")
"""Methods that do something else, too, than to stretch by rope_scaling_factor."""


def _is_method(*methods: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether fields of certain methods have an effect; see `OnlyWith.counts`."""
    return lambda f: f["rope_scaling"] in methods


ONLY_WITH = (
    OnlyWith(
        ("rope_scaling",),
        lambda f: f["rope_scaling_factor"] != 1.0 or f["rope_scaling"] in _HAS_NO_FACTOR,
        "with --rope_scaling_factor=1",
    ),
    OnlyWith(("rope_scaling_factor",), lambda f: f["rope_scaling"] != "none", "without --rope_scaling"),
    OnlyWith(
        ("rope_low_freq_factor", "rope_high_freq_factor"), _is_method("llama3"), "without --rope_scaling=llama3",
    ),
    OnlyWith(
        ("original_max_position_embeddings",), _is_method("llama3", "yarn", "longrope"),
        "without --rope_scaling=llama3, yarn or longrope",
    ),
    OnlyWith(
        ("rope_beta_fast", "rope_beta_slow", "rope_truncate"), _is_method("yarn"), "without --rope_scaling=yarn",
    ),
    OnlyWith(
        ("rope_short_factor", "rope_long_factor"), _is_method("longrope"), "without --rope_scaling=longrope",
    ),
    OnlyWith(
        ("rope_attention_factor",), _is_method("yarn", "longrope"), "without --rope_scaling=yarn or longrope",
    ),
    OnlyWith(
        ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef", "router_aux_loss",
         "router_z_loss_coef"),
        lambda f: f["num_local_experts"], "without --num_local_experts",
    ),
    OnlyWith(
        ("rope_theta", "rope_interleaved", "partial_rotary_factor"),
        lambda f: f["position_embedding"] == "rope", "with --position_embedding=alibi",
    ),
)  # fmt: skip
