"""Rotary positions in a configuration, in the spellings of transformers 4 and 5."""

from model.config import ModelConfig
from model.families.keys import require
from model.families.values import REQUIRED, read_value
from model.hf_files import shown

_BEFORE = "original_max_position_embeddings"
ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta", _BEFORE})
"""Keys that are read here."""
THETA = 10000.0
"""Base of a configuration that names none, in most families."""
_KINDS: dict[str, dict[str, tuple[str, type, object]]] = {
    "default": {},
    "linear": {"factor": ("rope_scaling_factor", float, REQUIRED)},
    "dynamic": {"factor": ("rope_scaling_factor", float, REQUIRED)},
    "llama3": {
        "factor": ("rope_scaling_factor", float, REQUIRED),
        "low_freq_factor": ("rope_low_freq_factor", float, REQUIRED),
        "high_freq_factor": ("rope_high_freq_factor", float, REQUIRED),
        _BEFORE: (_BEFORE, int, 0),
    },
}
"""Kind of rotary positions -> its keys -> (our field, kind of value, value if it is missing or null)."""


def rope_keys(config: ModelConfig) -> dict[str, object]:
    """Keys for rotary positions in both spellings, which mean the same to every reader: `rope_parameters` is that of
    transformers 5, `rope_scaling` with `rope_theta` that of version 4, which has no word for unscaled positions."""
    scaling: dict[str, object] = {}
    if config.rope_scaling != "none":
        # Before version 4.43 it was "type", which readers besides transformers still ask for.
        scaling = {"rope_type": config.rope_scaling, "type": config.rope_scaling, "factor": config.rope_scaling_factor}
        if config.rope_scaling == "llama3":
            scaling[_BEFORE] = config.original_max_position_embeddings
            scaling["low_freq_factor"] = config.rope_low_freq_factor
            scaling["high_freq_factor"] = config.rope_high_freq_factor
    new = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    new.pop("type", None)
    old: dict[str, object] = {"rope_theta": config.rope_theta}
    return old | ({"rope_scaling": scaling} if scaling else {}) | {"rope_parameters": new}


def rope_fields(values: dict, theta: float = THETA) -> dict[str, object]:
    """Our fields for rotary positions, from a folder's keys.

    transformers 5 writes `rope_parameters`, with rope_theta inside. Version 4 knows `rope_scaling`, with rope_theta
    beside it, which version 5 prefers to its own (modeling_rope_utils.py, convert_rope_params_to_dict). If the two
    versions would read different numbers, nobody can tell with which the weights were trained.

    Args:
        theta: base where none is named.
    Raises:
        ValueError: the positions are of a kind that this model does not have, or mean something else to each version.
    """
    spellings = ("rope_scaling", "rope_parameters")
    given: dict[str, dict] = {name: values[name] for name in spellings if values.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a dictionary, not {shown(value)}")
    name = next((name for name, rope in given.items() if rope), "rope_parameters")
    rope = given.get(name, {})
    kind = _kind_of(name, rope)
    fields = {"rope_scaling": "none" if kind == "default" else kind, "rope_theta": _theta(values, given, name, theta)}
    for key, (ours, number, default) in _KINDS[kind].items():
        outer = values.get(key) if key == _BEFORE else None
        if name == "rope_scaling" and rope.get(key) is not None and outer not in (None, rope[key]):
            raise ValueError(f"{key} is {shown(rope[key])} in {name} and {shown(outer)} beside it: take one out")
        if key == _BEFORE and key in rope and rope[key] is None:
            raise ValueError(f"{name} has {key} null: take it out, or write the context before the stretching")
        # As in transformers 5: if the original context stands in both places, the outer one counts.
        fields[ours] = read_value(rope if outer is None else values, key, number, default)
    return fields


def _kind_of(name: str, rope: dict) -> str:
    """Kind of rotary positions, once all its keys are known.

    Args:
        name: the key that holds `rope`.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{name} of type {shown(kind)} is not supported: only {', '.join(_KINDS)} are")
    if rope.get("type") not in (None, kind):
        raise ValueError(f"{name} has rope_type {shown(kind)} and type {shown(rope['type'])}: take one out")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_KINDS[kind]}
    for key, value in rope.items():
        if key not in known and value is not None:
            raise ValueError(f"{name} holds {shown(key)}, which has no meaning for type {shown(kind)}: take it out")
    require("partial_rotary_factor", rope.get("partial_rotary_factor"), (1,))
    return kind


def _theta(values: dict, given: dict[str, dict], name: str, default: float) -> object:
    """Base of the rotary positions, which may stand in as many places as there are spellings.

    Args:
        given: rope_scaling and rope_parameters, if they are there.
        name: the spelling that counts.
        default: where there is none.
    """
    places = {f"in {place}": read_value(rope, "rope_theta", float, None) for place, rope in given.items()}
    outer, beside = read_value(values, "rope_theta", float, None), "beside it"
    if name == "rope_scaling" and outer is None:
        # Then neither version looks into rope_parameters, and version 4 does not look into rope_scaling either.
        outer, beside = default, "for want of one beside it"
    found = {place: theta for place, theta in (places | {beside: outer}).items() if theta is not None}
    if len(set(found.values())) > 1:
        told = " and ".join(f"{theta:g} {place}" for place, theta in found.items())
        raise ValueError(f"rope_theta is {told}: write the right one everywhere")
    return next(iter(found.values()), default)
