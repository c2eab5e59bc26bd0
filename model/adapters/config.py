"""Options of adapters and of the frozen weights below them. Plain data: importing this does not load torch."""

from dataclasses import dataclass
from typing import Literal

from utils.options import OnlyWith, require_share_below_1

ALL_LINEAR = "all-linear"
"""Value of lora_target_modules: every linear layer but the head."""


@dataclass(frozen=True)
class AdapterConfig:
    """Adapter. Names and defaults are those of PEFT's LoraConfig."""

    lora_r: int | None = None
    """Rank of the matrices that LoRA adds to chosen layers; all else stays frozen. None: train all weights."""
    lora_alpha: float = 8.0
    """Scale of what is added: alpha / r, with use_rslora alpha / sqrt(r)."""
    lora_dropout: float = 0.0
    """Probability of dropping an element of an adapted layer's input, for what is added alone."""
    lora_target_modules: str = "q_proj,v_proj"
    """Layers to adapt: the ends of their names, with commas, or all-linear for all but the head."""
    lora_modules_to_save: str = ""
    """Modules to train whole and to save with the adapter, with commas: embed_tokens, lm_head."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilized LoRA: Kalajdzievski, 2023)."""
    use_dora: bool = False
    """Train the length of each row of an adapted matrix apart from its direction (DoRA: Liu et al., 2024)."""
    adapter: str = ""
    """Folder of an adapter for the weights of --init_from, to go on training it; its own options count."""
    add_tokens: str = ""
    """File of new tokens, one a line, that tokenizer and embedding grow by."""
    train_added_tokens: Literal["new", "all"] = "new"
    """Rows of embedding and head that train when tokens are added to a frozen model: the new ones, or all."""
    load_in_4bit: bool = False
    """Keep the frozen matrices of the blocks in 4 bits (QLoRA: NF4 with double quantization, by bitsandbytes)."""

    @property
    def is_used(self) -> bool:
        """Whether the model's own weights stay frozen."""
        return self.lora_r is not None or bool(self.adapter)

    def check(self) -> None:
        """
        Raises:
            ValueError: an adapter that cannot be trained.
        """
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r must be positive, got {self.lora_r}: leave it out to train all weights")
        if self.lora_alpha <= 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}")
        require_share_below_1(self, "lora_dropout")
        if self.lora_r is not None and not names_of(self.lora_target_modules):
            raise ValueError("lora_target_modules names no layer: give some, such as q_proj,v_proj, or all-linear")
        if ALL_LINEAR in (names := names_of(self.lora_target_modules)) and len(names) > 1:
            raise ValueError(f"lora_target_modules has {ALL_LINEAR} beside other names: give it alone")
        if self.add_tokens and self.adapter:
            raise ValueError("--add_tokens: an adapter cannot be given more tokens: leave out --adapter, or merge it")


def names_of(text: str) -> list[str]:
    """Names in a list with commas."""
    return [name for name in (part.strip() for part in text.split(",")) if name]


ONLY_WITH = (
    OnlyWith(
        ("lora_alpha", "lora_dropout", "lora_target_modules", "lora_modules_to_save", "use_rslora", "use_dora"),
        lambda f: f["lora_r"] is not None, "without --lora_r",
    ),
    OnlyWith(("train_added_tokens",), lambda f: f["add_tokens"], "without --add_tokens"),
    OnlyWith(("train_added_tokens",), lambda f: f["lora_r"] is not None, "where all weights train"),
)  # fmt: skip
