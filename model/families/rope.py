"""Rotary positions in a configuration, in the spellings of transformers 4 and 5."""

from typing import Any

from model.config import ModelConfig, rope_factors
from model.families.keys import require
from model.families.values import REQUIRED, read_value
from model.hf_files import shown
from model.rope import attention_scale, yarn_scale

_BEFORE, _PART = "original_max_position_embeddings", "partial_rotary_factor"
ROPE_KEYS = frozenset({"rope_parameters", "rope_scaling", "rope_theta", _BEFORE, _PART})
"""Keys that are read here."""
THETA = 10000.0
"""Base of a configuration that names none, in most families."""
_FACTOR = {"factor": ("rope_scaling_factor", float, REQUIRED)}
_CONTEXT = {_BEFORE: (_BEFORE, int, 0)}
_SCALE = {"attention_factor": ("rope_attention_factor", float, 0.0)}
_KINDS: dict[str, dict[str, tuple[str, type, object]]] = {
    "default": {},
    "linear": {**_FACTOR},
    "dynamic": {**_FACTOR},
    "llama3": {
        **_FACTOR, **_CONTEXT, "low_freq_factor": ("rope_low_freq_factor", float, REQUIRED),
        "high_freq_factor": ("rope_high_freq_factor", float, REQUIRED),
    },
    "yarn": {
        "factor": ("rope_scaling_factor", float, 0.0), **_CONTEXT, **_SCALE,
        "beta_fast": ("rope_beta_fast", float, 32.0), "beta_slow": ("rope_beta_slow", float, 1.0),
        "truncate": ("rope_truncate", bool, True),
    },
    "longrope": {
        "factor": ("rope_scaling_factor", float, 0.0), **_CONTEXT, **_SCALE,
        "short_factor": ("rope_short_factor", list, REQUIRED), "long_factor": ("rope_long_factor", list, REQUIRED),
    },
    "proportional": {"factor": ("rope_scaling_factor", float, 1.0)},
}  # fmt: skip
"""Kind of rotary positions -> its keys -> (our field, kind of value, value if it is missing or null)."""
_OLD_NAMES = {"su": "longrope"}
_MSCALES = ("mscale", "mscale_all_dim")
"""Keys of yarn from which the attention factor follows, if that is not given."""


def rope_keys(config: ModelConfig) -> dict[str, object]:
    """Keys for rotary positions in both spellings, which mean the same to every reader: `rope_parameters` is that of
    transformers 5, `rope_scaling` with `rope_theta` that of version 4, which has no word for unscaled positions.

    Version 4 knows no proportional positions, and before 4.57 takes yarn's original context from
    max_position_embeddings and longrope's short list for every text.
    """
    scaling: dict[str, object] = {}
    old: dict[str, object] = {"rope_theta": config.rope_theta}
    if config.rope_scaling != "none":
        # Before version 4.43 it was "type", which readers besides transformers still ask for.
        scaling = {"rope_type": config.rope_scaling, "type": config.rope_scaling}
        scaling |= {key: _written(config, *told) for key, told in _KINDS[config.rope_scaling].items()}
    if config.rope_scaling in ("yarn", "longrope") and not config.rope_attention_factor:
        scaling.pop("attention_factor")
    if config.rope_scaling == "longrope":
        # Where version 4 looks for it. It then derives the attention factor from these two, version 5 from `factor`.
        old[_BEFORE] = config.original_max_position_embeddings
        ratio = config.max_position_embeddings / config.original_max_position_embeddings
        if config.rope_scaling_factor != max(ratio, 1.0):
            scaling["attention_factor"] = attention_scale(config)
    part: dict[str, object] = {_PART: config.partial_rotary_factor} if config.partial_rotary_factor != 1.0 else {}
    new = {"rope_type": "default", "rope_theta": config.rope_theta} | part | scaling
    new.pop("type", None)
    return old | part | ({"rope_scaling": scaling} if scaling else {}) | {"rope_parameters": new}


def _written(config: ModelConfig, field: str, kind: type, _default: object) -> object:
    value = getattr(config, field)
    return list(rope_factors(field, value)) if kind is list else value


def rope_fields(values: dict, theta: float = THETA, rotates_part: bool = False) -> dict[str, object]:
    """Our fields for rotary positions, from a folder's keys.

    transformers 5 writes `rope_parameters`, with rope_theta inside. Version 4 knows `rope_scaling`, with rope_theta
    beside it, which version 5 prefers to its own (modeling_rope_utils.py, convert_rope_params_to_dict). If the two
    versions would read different numbers, nobody can tell with which the weights were trained.

    Args:
        theta: the family's base, where the folder names none.
        rotates_part: whether the family rotates only the first channels if `partial_rotary_factor` is below 1. Others
            know that factor for proportional positions alone: with another kind, transformers 5 leaves it out in
            silence or fails.
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
    fields: dict[str, Any] = {"rope_scaling": "none" if kind == "default" else kind}
    for key, (ours, number, default) in _KINDS[kind].items():
        # As in transformers 5: if the original context stands in both places, the outer one counts.
        is_beside = key == _BEFORE and values.get(key) is not None
        if name == "rope_scaling" and is_beside and rope.get(key) not in (None, values[key]):
            raise ValueError(f"{key} is {shown(rope[key])} in {name} and {shown(values[key])} beside it: take one out")
        if key in (_BEFORE, "truncate") and key in rope and rope[key] is None:
            raise ValueError(f"{name} has {key} null, where a missing one means something else: take it out")
        fields[ours] = _read(values if is_beside else rope, key, number, default)
    if kind in ("yarn", "longrope"):
        fields |= _derived(values, rope, kind, fields)
    fields[_PART] = _part(values, rope, kind, rotates_part)
    return fields | {"rope_theta": _theta(values, given, name, theta)}


def _kind_of(name: str, rope: dict) -> str:
    """Kind of rotary positions, once all its keys are known.

    Args:
        name: the key that holds `rope`.
    """
    named = [rope[key] for key in ("rope_type", "type") if rope.get(key) not in (None, "")]
    kinds = [_OLD_NAMES.get(kind, kind) if isinstance(kind, str) else kind for kind in named] or ["default"]
    kind = kinds[0]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{name} of type {shown(kind)} is not supported: only {', '.join(_KINDS)} are")
    if kinds[-1] != kind:
        raise ValueError(f"{name} has rope_type {shown(named[0])} and type {shown(named[-1])}: take one out")
    known = {"rope_type", "type", "rope_theta", _PART, *_KINDS[kind], *(_MSCALES if kind == "yarn" else ())}
    for key, value in rope.items():
        if key not in known and value is not None:
            raise ValueError(f"{name} holds {shown(key)}, which has no meaning for type {shown(kind)}: take it out")
    return kind


def _read(place: dict, key: str, kind: type, default: object) -> object:
    """The value of a key, as our field holds it; see `read_value`."""
    value = place.get(key)
    if kind is list:
        if not isinstance(value, list):
            missing = f"{key} is missing"
            raise ValueError(missing if value is None else f"{key} must be a list of numbers, not {shown(value)}")
        return ",".join(repr(read_value({key: number}, key, float, REQUIRED)) for number in value)
    found = read_value(place, key, kind, default)
    if value is not None and default == 0 and not found:
        # In our fields, that would mean "fill it in".
        raise ValueError(f"{key} must be positive, got {shown(value)}")
    return found


def _derived(values: dict, rope: dict, kind: str, fields: dict[str, Any]) -> dict[str, object]:
    """Factors of yarn and longrope that may be left to the ratio of the contexts, and the scale to other factors.

    Args:
        fields: what the keys say.
    """
    factor, scale = fields["rope_scaling_factor"], fields["rope_attention_factor"]
    if not factor:
        if kind == "yarn" and "factor" not in rope:
            raise ValueError("factor is missing")
        longest: Any = read_value(values, "max_position_embeddings", int, REQUIRED)
        factor = longest / (fields[_BEFORE] or longest)
        # A context that shrinks has the scale of one that stays.
        factor = max(factor, 1.0) if kind == "longrope" else factor
    mscales: Any = [read_value(rope, name, float, 0.0) for name in _MSCALES]
    if not scale and all(mscales):
        scale = yarn_scale(factor, mscales[0]) / yarn_scale(factor, mscales[1])
    return {"rope_scaling_factor": factor, "rope_attention_factor": scale}


def _part(values: dict, rope: dict, kind: str, rotates_part: bool) -> object:
    """partial_rotary_factor, which version 5 looks for inside first, version 4 only beside it."""
    inner, outer = (read_value(place, _PART, float, None) for place in (rope, values))
    if inner is not None and outer is not None and inner != outer:
        raise ValueError(f"{_PART} is {inner:g} among the rotary positions and {outer:g} beside them: take one out")
    part = outer if inner is None else inner
    if kind != "proportional" and not rotates_part:
        require(_PART, part, (1,))
    return 1.0 if part is None else part


def _theta(values: dict, given: dict[str, dict], name: str, default: float) -> object:
    """Base of the rotary positions, which may stand in as many places as there are spellings.

    Args:
        given: rope_scaling and rope_parameters, if they are there.
        name: the spelling that counts.
        default: the family's base.
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
