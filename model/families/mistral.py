"""mistral: a llama without biases, whose layers all attend within a window; later releases have none."""

from typing import Any

from model.config import ModelConfig
from model.families.common import CommonFamily
from model.families.windows import read_window, require_window_of_all


class MistralFamily(CommonFamily):
    model_type = "mistral"
    architectures = ("MistralForCausalLM",)
    free = frozenset({"sliding_window", "rope_scaling"})
    usual = {"sliding_window": 4096}
    understood = CommonFamily.understood | {"sliding_window", "layer_types"}
    key_heads = 8

    def fields(self, values: dict) -> dict[str, Any]:
        window = read_window(values)
        require_window_of_all(values, window)
        return super().fields(values) | {"sliding_window": window}

    def keys(self, config: ModelConfig) -> dict[str, object]:
        return super().keys(config) | {"sliding_window": config.sliding_window or None}


MISTRAL = MistralFamily()
