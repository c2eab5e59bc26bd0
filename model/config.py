"""Shape and numerics of the model. Plain data: importing this does not load torch."""

from dataclasses import dataclass
from typing import Literal

from utils.options import OnlyWith

_RANGES = {
    "vocab_size": (0, 2**31 - 1), "hidden_size": (1, 2**20), "intermediate_size": (1, 2**24),
    "num_hidden_layers": (1, 2_000), "num_attention_heads": (1, 2**16), "num_key_value_heads": (1, 2**16),
    "head_dim": (1, 2**16), "max_position_embeddings": (0, 2**31 - 1),
    "original_max_position_embeddings": (0, 2**31 - 1), "rms_norm_eps": (0.0, 1.0), "initializer_range": (0.0, 1.0),
    "rope_theta": (1.0, 1e30), "rope_scaling_factor": (1.0, 1e6),
}  # fmt: skip
"""Values that can be computed with: far more than anybody trains, so a value outside is a typing error. In float32, a
theta of 0 or 1e300 gives NaN."""


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding for a vocabulary: the next multiple of 64, which suits matrix kernels."""
    return -(-vocab_size // 64) * 64


@dataclass(frozen=True)
class ModelConfig:
    """Model. Fields bear the names of Hugging Face's llama config where it has them."""

    vocab_size: int = 0
    """Rows of the embedding; 0: as many as the tokenizer needs."""
    hidden_size: int = 768
    """Width of the residual stream."""
    intermediate_size: int = 0
    """Width of the feed-forward layer; 0: 8/3 of hidden_size, rounded up to a multiple of 64."""
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
    rms_norm_eps: float = 1e-5
    """Number added to the mean square under the root of RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    tie_word_embeddings: bool = False
    """Use one matrix for input embedding and output head."""
    attention_bias: bool = False
    """Bias on the Q, K, V and O projections, as in Hugging Face's llama."""
    qkv_bias: bool = False
    """Bias on Q, K and V only; exported as qwen2."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Literal["none", "linear", "dynamic", "llama3"] = "none"
    """Method to reach longer contexts. dynamic (NTK-aware) acts on sequences beyond max_position_embeddings."""
    rope_scaling_factor: float = 1.0
    """Factor by which the context is stretched."""
    rope_low_freq_factor: float = 1.0
    """llama3 scaling: wavelengths above the original context divided by this are stretched by the whole factor."""
    rope_high_freq_factor: float = 4.0
    """llama3 scaling: wavelengths below the original context divided by this stay as they are."""
    original_max_position_embeddings: int = 0
    """llama3 scaling: context before stretching; 0: max_position_embeddings."""
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
        self.resolve()

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
        values["intermediate_size"] = self.intermediate_size or -(-(self.hidden_size * 8 // 3) // 64) * 64
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
        if values["head_dim"] % 2:
            raise ValueError(f"rotary embeddings need an even head_dim, got {values['head_dim']}")
        if self.num_attention_heads % values["num_key_value_heads"]:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {values['num_key_value_heads']}"
            )
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias already covers Q, K and V: give only one of attention_bias and qkv_bias")
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= values[name] < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {values[name]}")
        for name, (least, most) in _RANGES.items():
            if not least <= values[name] <= most:
                raise ValueError(f"{name} must lie between {least:,} and {most:,}, got {values[name]}")
        if self.rope_scaling == "dynamic" and values["head_dim"] < 4:
            raise ValueError(f"rope_scaling=dynamic needs a head_dim of at least 4, got {values['head_dim']}")
        if self.rope_scaling == "llama3":
            low, high = self.rope_low_freq_factor, self.rope_high_freq_factor
            if not 0.0 < low:
                raise ValueError(f"rope_low_freq_factor must be positive, got {low}")
            if not low < high:
                raise ValueError(f"rope_high_freq_factor must be larger than rope_low_freq_factor {low}, got {high}")
        return ModelConfig(**values)


ONLY_WITH = (
    # With weights to start from, the others may come from their configuration.
    OnlyWith(
        ("rope_scaling",), lambda f: f["rope_scaling_factor"] != 1.0 or f["init_from"] or f["resume"],
        "with --rope_scaling_factor=1",
    ),
    OnlyWith(
        ("rope_scaling_factor",), lambda f: f["rope_scaling"] != "none" or f["init_from"] or f["resume"],
        "without --rope_scaling",
    ),
    OnlyWith(
        ("rope_low_freq_factor", "rope_high_freq_factor", "original_max_position_embeddings"),
        lambda f: f["rope_scaling"] == "llama3" or f["init_from"] or f["resume"], "without --rope_scaling=llama3",
    ),
)  # fmt: skip
