"""Windows of attention in a configuration: one for all layers, or for some of them."""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.families.keys import require_full_attention
from model.families.values import read_int, read_value, require_positive
from model.hf_files import shown

WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})
"""Keys of attention within a window. Which of them count, depends on the family."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_USUAL_WINDOW, _USUAL_FIRST = 4096, 28
"""transformers' sliding_window and max_window_layers where the keys are missing."""


def require_no_window(values: Mapping) -> None:
    """See that no key asks for a window, in a family that has none.

    Raises:
        ValueError: one does. transformers cuts a llama's cache by sliding_window alone, whatever use_sliding_window
            says.
    """
    if (window := values.get("sliding_window")) is not None:
        raise ValueError(f"sliding_window = {shown(window)} is not supported: a {values['model_type']} has none")
    if (on := values.get("use_sliding_window")) not in (None, False):
        raise ValueError(f"use_sliding_window = {shown(on)} is not supported: only false is")
    require_full_attention(values)


def read_window(values: Mapping, usual: int = _USUAL_WINDOW) -> int:
    """The number at `sliding_window`, which is 0 in our configuration if it is null.

    Args:
        usual: where the key is missing; 0: none.
    """
    if "sliding_window" not in values or values["sliding_window"] is None:
        return 0 if "sliding_window" in values else usual
    window = read_int(values, "sliding_window")
    require_positive({"sliding_window": window}, "sliding_window")
    return window


def require_window_of_all(values: Mapping, window: int) -> None:
    """See that `layer_types`, which transformers does not read in such a family, names the same for every layer.

    Raises:
        ValueError: it does not.
    """
    kinds, layers = values.get("layer_types"), values.get("num_hidden_layers")
    kind = _SLIDING if window else _FULL
    if kinds is not None and (not isinstance(kinds, list) or kinds != [kind] * len(kinds) or len(kinds) != layers):
        raise ValueError(f"layer_types {shown(kinds)} are not supported: all {shown(layers)} layers have {kind}")


def fields_by_layer(values: Mapping) -> dict[str, Any]:
    """Our fields, in families whose layers have a window by `layer_types`, or else from `max_window_layers` on.

    Raises:
        ValueError: a layer is of another kind, or there is no window for it.
    """
    layers = read_int(values, "num_hidden_layers")
    window = read_window(values) if read_value(values, "use_sliding_window", bool, False) else 0
    kinds = values.get("layer_types")
    if kinds is None:
        first = read_int(values, "max_window_layers", _USUAL_FIRST)
        kinds = [_SLIDING if window and layer >= first else _FULL for layer in range(layers)]
    if not isinstance(kinds, list) or any(kind not in (_FULL, _SLIDING) for kind in kinds):
        raise ValueError(f"layer_types {shown(kinds)} are not supported: only {_FULL} and {_SLIDING} are")
    if len(kinds) != layers:
        raise ValueError(f"layer_types names {len(kinds)} layers, num_hidden_layers {layers}")
    if _SLIDING not in kinds:
        return {}
    if not window:
        raise ValueError(
            f"layer_types names {_SLIDING}, but there is no window: set sliding_window, and use_sliding_window to true"
        )
    full = ",".join(str(layer) for layer, kind in enumerate(kinds) if kind == _FULL)
    return {"sliding_window": window, "full_attention_layers": full}


def keys_by_layer(config: ModelConfig) -> dict[str, object]:
    """The reverse. transformers reads `layer_types` from version 4.53 on; before, and in other programs, the layers
    before max_window_layers have no window."""
    if not config.sliding_window:
        return {"use_sliding_window": False}
    windows = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
    first = next((layer for layer, window in enumerate(windows) if window), len(windows))
    return {
        "use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": first,
        "layer_types": [_SLIDING if window else _FULL for window in windows],
    }  # fmt: skip
