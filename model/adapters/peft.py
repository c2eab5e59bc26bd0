"""Adapters in PEFT's words: the content of an adapter_config.json, and the names of its tensors.

    ours     layers.0.self_attn.q_proj.lora_A.weight
    PEFT's   base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight

where the name of the module is the family's. Some families keep several of our matrices as one, or in other rows. Such
a change of rows J is linear, so an adapter of the parts is one of the whole:

    J [W_q; W_k; W_v]  +  s J blockdiag(B_q, B_k, B_v) [A_q; A_k; A_v]

Its rank is the sum of the parts' ranks, which PEFT's rank_pattern can say. The reverse holds, too: A is that of the
whole for each part, and B its rows of the whole's.

Shapes: C inputs, O outputs, r rank.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.adapters.config import ALL_LINEAR
from model.adapters.lora import LoraLinear, LoraSpec, base_name, is_adapters
from model.decoder import Decoder
from model.families import family_of
from model.families.family import EMBEDDING, HEAD, Rule
from model.families.keys import check_keys
from model.hf_files import shown
from model.linear import Head, Linear

PREFIX = "base_model.model."
_A, _B, _LENGTHS = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
_OUR_LENGTHS = ".lora_magnitude_vector.weight"
_ROWS = ".token_adapter.trainable_tokens_delta"

_UNDERSTOOD = frozenset({
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "modules_to_save", "use_rslora",
    "use_dora", "init_lora_weights", "base_model_name_or_path", "trainable_token_indices",
})  # fmt: skip
_HARMLESS = frozenset({
    # Notes, and the beginnings and helpers of methods that say themselves whether they are used.
    "auto_mapping", "inference_mode", "revision", "peft_version", "runtime_config", "megatron_core", "eva_config",
    "corda_config", "lora_ga_config", "loftq_config", "qalora_group_size", "ensure_weight_tying",
})  # fmt: skip
_HARMLESS_AT: dict[str, tuple[object, ...]] = {
    "bias": ("none",), "fan_in_fan_out": (False,), "lora_bias": (False,), "use_qalora": (False,),
    "layer_replication": ([],), "target_parameters": ([],),
    "megatron_config": ({},), "alora_invocation_tokens": ([],), "arrow_config": (None,), "kasa_config": (None,),
    "velora_config": (None,), "monteclora_config": (None,), "use_bdlora": (False,),
}  # fmt: skip
_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base as it is. Others (pissa, olora, corda, loftq) change it."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Layers of ours and modules of theirs that hold the same rows: one and one, or several if either side is fused."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    rule: Rule | None = None
    """None: one and one."""


def linear_layers(model: Decoder) -> dict[str, Linear | LoraLinear]:
    """Name -> linear layer of the blocks, adapted or not."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Linear | LoraLinear) and not isinstance(layer, Head) and not name.endswith(".base_layer")
    }


def adapted_layers(model: Decoder) -> list[str]:
    """Names of the layers that have an addition."""
    return [name for name, layer in model.named_modules() if isinstance(layer, LoraLinear)]


def whole_parameters(model: Decoder) -> list[str]:
    """Names of the base's parameters that train."""
    return [n for n, parameter in model.named_parameters() if parameter.requires_grad and not is_adapters(n)]


def groups_of(model: Decoder) -> list[Group]:
    """All linear layers of the blocks beside the modules of the family."""
    family, names = family_of(model.config), [f"{name}.weight" for name in linear_layers(model)]
    rules = [rule for rule in family.fused_rules(model.config, names) if set(rule.ours) <= set(names)]
    fused = {name for rule in rules for name in rule.ours}
    single = [Rule((family.their_name(name),), (name,)) for name in names if name not in fused]
    return [
        Group(tuple(map(_module, rule.ours)), tuple(map(_module, rule.theirs)), None if rule in single else rule)
        for rule in [*rules, *single]
    ]  # fmt: skip


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


# To PEFT.


def to_peft(model: Decoder, spec: LoraSpec, base: str) -> dict[str, object]:
    """Content of the adapter_config.json of a model with its adapter.

    Args:
        base: folder of the base.
    Raises:
        ValueError: PEFT has no such adapter.
    """
    adapted, groups = set(adapted_layers(model)), groups_of(model)
    parts = {theirs: len(adapted.intersection(group.ours)) for group in groups for theirs in group.theirs}
    targets = [theirs for theirs, count in parts.items() if count]
    ends = _ends(targets, parts)
    ranks, alphas = {}, {}
    for end in ends:
        counts = {count for theirs, count in parts.items() if _is_meant(theirs, [end])}
        # Layers with another number of parts have other names, or the whole name.
        for name in [end] if len(counts) == 1 else [theirs for theirs in targets if _is_meant(theirs, [end])]:
            count = parts[name] if name in parts else next(iter(counts))
            if count > 1:
                ranks[name] = count * spec.r
                alphas[name] = _whole(spec.alpha * (math.sqrt(count) if spec.use_rslora else count))
    # PEFT does not look for a dot before these ends.
    modules = _their_modules(model).values()
    whole = {_module(name) for name in _their_whole(model)}
    saved = sorted({n if any(m.endswith(_leaf(n)) for m in modules if m not in whole) else _leaf(n) for n in whole})
    return {
        "alpha_pattern": alphas,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": _whole(spec.alpha),
        "lora_bias": False,
        "lora_dropout": spec.dropout,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "r": spec.r,
        "rank_pattern": ranks,
        "revision": None,
        "target_modules": ends,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": {
            _leaf(theirs): list(spec.token_ids) for theirs in _with_rows(model).values()
        } if spec.token_ids else None,
        "use_dora": spec.use_dora,
        "use_rslora": spec.use_rslora,
    }


def _whole(number: float) -> float:
    """A number as PEFT writes it: without a point if it needs none."""
    return int(number) if number == int(number) else number


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(chosen: Collection[str], names: Iterable[str]) -> list[str]:
    """The chosen ones of these names, in short: last words that mean no other name, and otherwise whole names."""
    others = {_leaf(name) for name in names if name not in chosen}
    return sorted({name if _leaf(name) in others else _leaf(name) for name in chosen})


def _is_meant(name: str, ends: Iterable[str]) -> bool:
    """Whether one of the words is a name, or its end."""
    return any(name == end or name.endswith(f".{end}") for end in ends)


def _their_modules(model: Decoder) -> dict[str, str]:
    """Our name of each module that has weights -> theirs; of those that are not fused."""
    family = family_of(model.config)
    names = [*(name for name, _ in model.named_parameters() if not is_adapters(name)), HEAD]
    return {_module(name): _module(family.their_name(name)) for name in map(base_name, names)}


def _with_rows(model: Decoder) -> dict[str, str]:
    """Our name of each module with rows of tokens that train -> theirs. Of a tied matrix, PEFT takes the embedding."""
    family, names = family_of(model.config), [EMBEDDING, HEAD]
    parameters = dict(model.named_parameters())
    return {n: _module(family.their_name(f"{n}.weight")) for n in map(_module, names) if f"{n}{_ROWS}" in parameters}


def _their_whole(model: Decoder) -> dict[str, str]:
    """Their name of each parameter of the base that trains -> ours. A tied matrix stands for both of its modules, as
    PEFT would otherwise train one of them alone."""
    family, config, names = family_of(model.config), model.config, whole_parameters(model)
    found = {family.their_name(name): name for name in names}
    if EMBEDDING in names and config.tie_word_embeddings:
        found[family.their_name(HEAD)] = EMBEDDING
    return found


def copies(model: Decoder) -> set[str]:
    """Names of tensors that PEFT also writes if the model was resized: of embedding and head the frozen matrix, and
    once more what is trained."""
    family = family_of(model.config)
    modules = [f"{PREFIX}{_module(family.their_name(name))}" for name in (EMBEDDING, HEAD)]
    if not _with_rows(model):
        whole = {f"{PREFIX}{theirs}" for theirs in _their_whole(model)}
        kinds = ("original_module", "modules_to_save")
        return {f"{each}.{kind}.weight" for each in modules if f"{each}.weight" in whole for kind in kinds}
    tied = {f"{modules[1]}{_ROWS}"} if model.config.tie_word_embeddings else set()
    return {f"{each}.token_adapter.base_layer.weight" for each in modules} | tied


def to_theirs(model: Decoder, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter_model.safetensors.

    Args:
        trained: what trains, by our names; tensors without memory give the shapes.
    Raises:
        ValueError: PEFT has no such adapter.
    """
    found: dict[str, Tensor] = {}
    rows_of = {name: layer.out_features for name, layer in linear_layers(model).items()}
    for group in groups_of(model):
        parts = [_pair(trained, name) for name in group.ours]
        lengths = [trained[key] for name in group.ours if (key := f"{name}{_OUR_LENGTHS}") in trained]
        if group.rule is not None and any(parts):
            if lengths and len(lengths) < len(group.ours):
                raise ValueError(
                    f"--use_dora with some of {', '.join(map(_leaf, group.ours))}: PEFT adapts them together in a "
                    f"{family_of(model.config).model_type}, so name all of them in --lora_target_modules"
                )
            matrix_a, rows = _across(parts, [rows_of[name] for name in group.ours], group.rule.join)
            # A file holds no two names for one memory.
            parts = [(matrix_a.clone(), matrix_b) for matrix_b in rows]
            lengths = list(group.rule.join(lengths)) if lengths else []
        for at, (theirs, part) in enumerate(zip(group.theirs, parts)):
            if part is not None:
                found[f"{PREFIX}{theirs}{_A}"], found[f"{PREFIX}{theirs}{_B}"] = part
                found |= {f"{PREFIX}{theirs}{_LENGTHS}": lengths[at]} if lengths else {}
    for ours, theirs in _with_rows(model).items():
        found[f"{PREFIX}{theirs}{_ROWS}"] = trained[f"{ours}{_ROWS}"]
    for theirs, ours in _their_whole(model).items():
        found[f"{PREFIX}{theirs}"] = trained[ours].clone() if model.config.tie_word_embeddings else trained[ours]
    return found


def _pair(trained: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor] | None:
    """A and B of a layer; None: it is not adapted."""
    return (trained[f"{layer}{_A}"], trained[f"{layer}{_B}"]) if f"{layer}{_A}" in trained else None


Move = Callable[[Sequence[Tensor]], Sequence[Tensor]]
Parts = Sequence[tuple[Tensor, Tensor] | None]


def _across(parts: Parts, rows: Sequence[int], move: Move) -> tuple[Tensor, list[Tensor]]:
    """The adapter of matrices whose rows `move` makes of those of other matrices.

    Args:
        parts: A (r, C) and B (O, r) of each of the others; None: it has no adapter.
        rows: rows of each of the others.
    Returns:
        A (sum of r, C), the same for all of them; B of each.
    """
    ranks = [len(part[0]) if part is not None else 0 for part in parts]
    given = [part for part in parts if part is not None]
    like, width = given[0][1], sum(ranks)
    padded = []
    for number, (part, rank) in enumerate(zip(parts, ranks)):
        wide = like.new_zeros(rows[number], width)
        if part is not None:
            begin = sum(ranks[:number])
            wide[:, begin : begin + rank] = part[1]
        padded.append(wide)
    return torch.cat([matrix_a for matrix_a, _ in given]), list(move(padded))


# From PEFT.


def from_peft(values: dict, model: Decoder, own_targets: Sequence[str] | None) -> LoraSpec:
    """The adapter that the content of an adapter_config.json describes.

    Args:
        model: the base, which may be without memory.
        own_targets: our layers, as a folder of ours notes them if the family fuses them; None: PEFT's names say it.
    Raises:
        ValueError: a key may change the adapter and is not understood, or a value is impossible; the key is named.
    """
    _check(values)
    r, alpha = _number(values, "r", 8, int), float(_number(values, "lora_alpha", 8, float))
    rslora = _flag(values, "use_rslora")
    targets, chosen = own_targets, _chosen(values, model)
    if targets is None:
        groups = [group for group in groups_of(model) if chosen.intersection(group.theirs)]
        if any(not chosen.issuperset(group.theirs) for group in groups):
            raise ValueError("target_modules names one of two modules that share the rows of layers here: name both")
        ranks = {_rank_of(values, group.theirs, r, alpha, rslora) for group in groups}
        if len(ranks) > 1:
            raise ValueError("rank_pattern or alpha_pattern gives some layers another rank: all must have one")
        ((r, alpha),) = ranks
        targets = _ends([name for group in groups for name in group.ours], list(linear_layers(model)))
    modules, saved = _their_modules(model), _names(values, "modules_to_save")
    for name in saved:
        if not any(theirs.endswith(name) for theirs in modules.values()):
            raise ValueError(f"modules_to_save names {shown(name)}, which the model does not have")
    whole = [ours for ours, theirs in modules.items() if theirs.endswith(tuple(saved))]
    return LoraSpec(
        r, alpha, float(_number(values, "lora_dropout", 0.0, float)), tuple(targets), tuple(_ends(whole, modules)),
        rslora, _flag(values, "use_dora"), _token_ids(values, model),
    )  # fmt: skip


def _token_ids(values: dict, model: Decoder) -> tuple[int, ...]:
    """Tokens whose rows of embedding and head train."""
    key, family = "trainable_token_indices", family_of(model.config)
    given = values.get(key) or []
    embedding, head = (_leaf(_module(family.their_name(name))) for name in (EMBEDDING, HEAD))
    of_module = given if isinstance(given, dict) else {embedding: given}
    lists = list(of_module.values())
    if not given:
        return ()
    is_list = isinstance(lists[0], list) and all(type(each) is int for each in lists[0])
    if not is_list or any(ids != lists[0] for ids in lists) or len(set(lists[0])) < len(lists[0]):
        raise ValueError(f"{key} must name the same tokens, each once, for embedding and head")
    wanted = [{embedding}, {embedding, head}] if model.config.tie_word_embeddings else [{embedding, head}]
    if {_leaf(str(name)) for name in of_module} not in wanted:
        raise ValueError(f"{key} must name rows of {embedding} and {head}, not {shown(sorted(map(str, of_module)))}")
    if not all(0 <= each < model.config.vocab_size for each in lists[0]):
        raise ValueError(f"{key} names tokens that the model does not have, which has {model.config.vocab_size}")
    return tuple(lists[0])


def rows_needed(values: dict) -> int:
    """Rows of the vocabulary that the tokens of an adapter need."""
    given = values.get("trainable_token_indices") or []
    lists = given.values() if isinstance(given, dict) else [given]
    ids = [each for ids in lists if isinstance(ids, list) for each in ids if isinstance(each, int)]
    return max(ids, default=-1) + 1


def _check(values: dict) -> None:
    """
    Raises:
        ValueError: a key is not understood, or the adapter is of another kind.
    """
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type = {shown(values.get('peft_type'))} is not supported: only LORA is")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type = {shown(values['task_type'])} is not supported: only CAUSAL_LM is")
    begins = values.get("init_lora_weights", True)
    if begins is not None and begins not in _BEGINNINGS:
        raise ValueError(
            f"init_lora_weights = {shown(begins)} is not supported, as it changes the base: save the adapter again by "
            f"PEFT with path_initial_model_for_weight_conversion"
        )
    check_keys(values, _UNDERSTOOD | _HARMLESS, _HARMLESS_AT, replaces_code=True)


def _number(values: dict, name: str, default: float, kind: type) -> Any:
    value = values.get(name, default)
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    least = 0 if name == "lora_dropout" else 1 if name == "r" else math.ulp(0.0)
    number: Any = value if is_number else math.nan
    if not least <= number < (1.0 if name == "lora_dropout" else math.inf):
        raise ValueError(f"{name} = {shown(value)} is not possible")
    return number


def _flag(values: dict, name: str) -> bool:
    value = values.get(name) or False
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, not {shown(value)}")
    return value


def _names(values: dict, name: str) -> list[str]:
    value = values.get(name) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{name} must be a list of names, not {shown(value)}")
    return value


def _matches(values: dict, key: str, name: str) -> bool:
    """Whether a key of PEFT's means a module: a pattern for all of its name, or a list of ends."""
    value = values.get(key)
    if isinstance(value, str):
        return bool(_pattern(key, value).fullmatch(name))
    return _is_meant(name, _names(values, key))


def _pattern(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{key} = {shown(text)} is no pattern: {error}") from None


def _chosen(values: dict, model: Decoder) -> set[str]:
    """Their modules that are adapted."""
    modules = [theirs for group in groups_of(model) for theirs in group.theirs]
    everything = values.get("target_modules") == ALL_LINEAR
    chosen = modules if everything else [name for name in modules if _matches(values, "target_modules", name)]
    if not chosen:
        raise ValueError(f"target_modules = {shown(values.get('target_modules'))} fits no layer of the model")
    return {name for name in chosen if not _matches(values, "exclude_modules", name) and _is_layer(values, name)}


def _is_layer(values: dict, name: str) -> bool:
    """Whether a module lies in one of the layers that are to be adapted."""
    layers = values.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, list) or not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"layers_to_transform must be a list of numbers, not {shown(layers)}")
    words = values.get("layers_pattern") or [r"[^.]*"]
    for word in [words] if isinstance(words, str) else words:
        if match := _pattern("layers_pattern", rf".*\.{word}\.(\d+)\.").match(name):
            return int(match[1]) in layers
    return False


def _rank_of(values: dict, modules: Sequence[str], r: int, alpha: float, rslora: bool) -> tuple[int, float]:
    """Rank and alpha of our layers for an adapter of modules that hold their rows."""
    ranks = [_by_pattern(values, "rank_pattern", name, r) for name in modules]
    alphas = [_by_pattern(values, "alpha_pattern", name, alpha) for name in modules]
    if len(set(zip(ranks, alphas))) > 1 or not isinstance(ranks[0], int) or ranks[0] < 1:
        raise ValueError("rank_pattern or alpha_pattern gives some layers another rank: all must have one")
    count = len(modules)
    return count * ranks[0], float(alphas[0] * (math.sqrt(count) if rslora else count))


def _by_pattern(values: dict, key: str, name: str, default: float) -> Any:
    patterns = values.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} must be a dictionary, not {shown(patterns)}")
    for text, value in patterns.items():
        if _pattern(key, rf"(.*\.)?({text})$").match(name):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{key} must hold numbers, not {shown(value)}")
            return value
    return default


def shapes(model: Decoder, are_own: bool) -> dict[str, Shape]:
    """Name -> shape of each tensor that the folder of a model's adapter must hold.

    Args:
        are_own: whether fused modules were written here, block by block.
    """
    # (By its shape: a parameter may be cut over several processes.)
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    empty = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in trained}
    found = {name: tuple(tensor.shape) for name, tensor in to_theirs(model, empty).items()}
    for group in groups_of(model) if not are_own else ():
        for theirs in group.theirs if group.rule is not None else ():
            name_a, name_b = f"{PREFIX}{theirs}{_A}", f"{PREFIX}{theirs}{_B}"
            if name_a in found:
                rank = len(empty[f"{group.ours[0]}{_A}"]) // len(group.theirs)
                found[name_a], found[name_b] = (rank, found[name_a][1]), (found[name_b][0], rank)
    return found


def to_ours(model: Decoder, theirs: Mapping[str, Tensor], are_own: bool) -> dict[str, Tensor]:
    """What trains, by our names; the reverse of to_theirs.

    Args:
        theirs: tensors with the names and shapes of `shapes`.
    Raises:
        ValueError: two tensors that stand for one differ.
    """
    adapted, found = set(adapted_layers(model)), dict[str, Tensor]()
    for group in groups_of(model):
        names = [name for name in group.ours if name in adapted]
        if not names:
            continue
        parts = [(theirs[f"{PREFIX}{name}{_A}"], theirs[f"{PREFIX}{name}{_B}"]) for name in group.theirs]
        lengths = [theirs[key] for name in group.theirs if (key := f"{PREFIX}{name}{_LENGTHS}") in theirs]
        if group.rule is not None:
            lengths = list(group.rule.split(lengths)) if lengths else []
            parts = _blocks(group, names, parts) if are_own else _shared(group.rule, parts)
        for at, name in enumerate(group.ours):
            if name in names:
                found[f"{name}{_A}"], found[f"{name}{_B}"] = parts[at]
                found |= {f"{name}{_OUR_LENGTHS}": lengths[at]} if lengths else {}
    for ours, name in _with_rows(model).items():
        found[f"{ours}{_ROWS}"] = theirs[f"{PREFIX}{name}{_ROWS}"]
    for name, ours in _their_whole(model).items():
        tensor = theirs[f"{PREFIX}{name}"]
        if ours in found and not torch.equal(found[ours], tensor):
            raise ValueError("embedding and head differ, which are one matrix in the base: they were trained apart")
        found[ours] = tensor
    return found


def _blocks(group: Group, adapted: list[str], parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """A and B of our layers from modules that were written here, block by block; of those that are adapted."""
    assert group.rule is not None
    matrix_a, rank = parts[0][0], len(parts[0][0]) // len(adapted)
    rows, found = group.rule.split([matrix_b for _, matrix_b in parts]), []
    for name, matrix_b in zip(group.ours, rows):
        begin = adapted.index(name) * rank if name in adapted else 0
        found.append((matrix_a[begin : begin + rank], matrix_b[:, begin : begin + rank]))
    return found


def _shared(rule: Rule, parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """A and B of our layers from modules that PEFT adapted as they are: A is the same for all of them."""
    matrix_a, rows = _across(parts, [len(matrix_b) for _, matrix_b in parts], rule.split)
    return [(matrix_a, matrix_b) for matrix_b in rows]


def is_fused(model: Decoder) -> bool:
    """Whether modules of the family hold several of the adapted layers."""
    adapted = set(adapted_layers(model))
    return any(group.rule is not None and adapted.intersection(group.ours) for group in groups_of(model))
