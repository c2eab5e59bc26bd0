"""Roles of parameters, by their names: how each begins, and how optimizers and parallelism treat it.

    role                 begins as                              decays   Muon   tensor parallelism cuts
    embedding, head      N(0, initializer_range)                yes      no     the vocabulary
    input projection     N(0, initializer_range)                yes      yes    its outputs ("column")
    output projection    N(0, initializer_range / sqrt(2 L))    yes      yes    its inputs ("row")
    bias                 0                                      no       no     as its matrix; after a sum: "first"
    norm                 1                                      no       no     nothing
    norm's bias          0                                      no       no     nothing
    router               N(0, initializer_range)                yes      no     nothing
    router's bias        0 (frozen: a rule moves it)            no       no     nothing
    local filter         N(0, initializer_range)                yes      no     nothing
    new tokens' rows     mean (model/adapters/tokens.py)        yes      no     nothing
    LoRA's A             uniform (model/adapters/lora.py)       yes      no     the inputs, if its layer's are cut
    LoRA's B             0                                      yes      no     the outputs, if its layer's are cut
    DoRA's lengths       those of the matrix's rows             no       no     nothing

The matrices of all experts of a layer are one parameter (E, outputs, inputs), whose role is that of each.

Input projections lead from the residual stream into a layer, an output projection leads back. The 2 L additions of L
blocks keep the stream's scale if each is smaller by the square root of 2 L (GPT-2: Radford et al., 2019). If the first
are cut by outputs and the second by inputs, the layer needs one sum over the ranks (Megatron-LM: Shoeybi et al., 2019).
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Role:
    """Plain data, which code that knows nothing of layers can be given."""

    begins: Literal["normal", "residual", "zero", "one"]
    """Initial value; "residual" is the smaller normal of the table."""
    decays: bool
    """Whether weight decay acts on it. Norms and biases have no scale that decay should pull to zero."""
    is_hidden: bool
    """Whether it is a matrix between hidden states, which Muon can step."""
    cut: Literal["column", "row", "vocabulary", "first", "none"]
    """Cut by tensor parallelism. "column": a matrix (outputs, inputs) or a bias (outputs,) by its outputs; "row": a
    matrix by its inputs; "vocabulary": an embedding or a head (vocabulary, C); "first": the first rank alone has it,
    as it is added once to a sum over the ranks."""
    joined: int = 1
    """Matrices of one height that lie below one another in it, such as gate and up. Muon steps each by itself."""
    is_stack: bool = False
    """Whether it holds a matrix for each expert: (E, outputs, inputs)."""
    is_partial: bool = False
    """Whether tensor parallelism leaves it whole on every rank, each of which uses it for its part of the work."""
    is_between: bool = False
    """Whether it acts on single positions between the matrices: sequence parallelism shares these positions, and then
    it is partial."""


EMBEDDING = Role("normal", True, False, "vocabulary")
INPUT_PROJECTION = Role("normal", True, True, "column")
GATE_AND_UP = Role("normal", True, True, "column", joined=2, is_stack=True)
OUTPUT_PROJECTION = Role("residual", True, True, "row")
EXPERTS_DOWN = Role("residual", True, True, "row", is_stack=True)
INPUT_BIAS = Role("zero", False, False, "column")
OUTPUT_BIAS = Role("zero", False, False, "first")
NORM = Role("one", False, False, "none", is_between=True)
HEADS_NORM = Role("one", False, False, "none", is_partial=True)
NORM_BIAS = Role("zero", False, False, "none", is_between=True)
ROUTER = Role("normal", True, False, "none")
ROUTER_BIAS = Role("zero", False, False, "none")
FILTER = Role("normal", True, False, "none")
FILTER_BIAS = Role("zero", False, False, "none")
TRAINED_ROWS = Role("zero", True, False, "none")
LORA_WHOLE = Role("zero", True, False, "none", is_partial=True)
LORA_OF_INPUTS = Role("zero", True, False, "row")
LORA_OF_OUTPUTS = Role("zero", True, False, "column")
LORA_LENGTHS = Role("zero", False, False, "none")

ROLES: tuple[tuple[str, Role], ...] = (
    (r"(embed_tokens|lm_head)\.weight", EMBEDDING),
    (r".*\.(q|k|v|gate|up)_proj\.weight", INPUT_PROJECTION),
    (r".*\.(o|down)_proj\.weight", OUTPUT_PROJECTION),
    (r".*\.(q|k|v|gate|up)_proj\.bias", INPUT_BIAS),
    (r".*\.(o|down)_proj\.bias", OUTPUT_BIAS),
    (r".*\.[qk]_norm\.weight", HEADS_NORM),
    (r"(.*\.)?((\w*_layer|embed_)?norm)\.weight", NORM),
    (r"(.*\.)?((\w*_layer|embed_)?norm)\.bias", NORM_BIAS),
    (r".*\.mlp\.router\.weight", ROUTER),
    (r".*\.mlp\.router\.selection_bias", ROUTER_BIAS),
    (r".*\.experts\.gate_up_proj", GATE_AND_UP),
    (r".*\.experts\.down_proj", EXPERTS_DOWN),
    (r".*\.local_filter\.conv[12]\.weight", FILTER),
    (r".*\.local_filter\.conv[12]\.bias", FILTER_BIAS),
    (r"(embed_tokens|lm_head)\.token_adapter\.trainable_tokens_delta", TRAINED_ROWS),
    (r".*\.(q|k|v|gate|up)_proj\.lora_A\.weight", LORA_WHOLE),
    (r".*\.(q|k|v|gate|up)_proj\.lora_B\.weight", LORA_OF_OUTPUTS),
    (r".*\.(o|down)_proj\.lora_A\.weight", LORA_OF_INPUTS),
    (r".*\.(o|down)_proj\.lora_B\.weight", LORA_WHOLE),
    (r".*\.lora_magnitude_vector\.weight", LORA_LENGTHS),
)
"""(pattern of a whole name, role) for every parameter that model/decoder.py and adapters can have. What an adapter
initializes itself, `begins` says nothing about."""


def role_of(name: str, roles: tuple[tuple[str, Role], ...] = ROLES) -> Role:
    """The role of a parameter; the first pattern counts."""
    found = next((role for pattern, role in roles if re.fullmatch(pattern, name)), None)
    assert found is not None, f"{name} has no role: give it one in model/roles.py or in its family"
    return found


def generator_of(seed: int, name: str) -> torch.Generator:
    """Source of a parameter's initial values, which depend on the seed and its name alone."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
