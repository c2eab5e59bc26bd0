"""What a parameter is for, by its name: how it begins, and how those treat it who know nothing of layers.

    role         begins as                                  decays   Muon   tensor parallelism cuts
    embedding    N(0, initializer_range)                    yes      no     the vocabulary
    spreading    N(0, initializer_range)                    yes      yes    its outputs ("column")
    gathering    N(0, initializer_range / sqrt(2 L))        yes      yes    its inputs ("row")
    bias         0                                          no       no     as its matrix, or not at all
    scale        1                                          no       no     nothing

A spreading matrix reads the residual stream and leads into a layer, a gathering one leads back: 2 L additions keep the
stream's scale if each is smaller by the square root of 2 L (GPT-2: Radford et al., 2019). Cut after one another by
outputs and by inputs, the two need one sum over the ranks (Megatron-LM: Shoeybi et al., 2019).
"""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Role:
    begins: Literal["normal", "residual", "zero", "one"]
    """Initial value; "residual" is the smaller normal of the table."""
    decays: bool
    """Whether weight decay acts on it: the scale of a norm's weight or of a bias means something."""
    is_hidden: bool
    """Whether it is a matrix between hidden states, which Muon can step."""
    cut: Literal["column", "row", "vocabulary", "none"]
    """How tensor parallelism would cut it: a matrix (outputs, inputs) or a bias (outputs,) by its outputs, a matrix by
    its inputs, an embedding or a head (vocabulary, C) by the vocabulary, or not at all."""


EMBEDDING = Role("normal", True, False, "vocabulary")
SPREADING = Role("normal", True, True, "column")
GATHERING = Role("residual", True, True, "row")
SPREADING_BIAS = Role("zero", False, False, "column")
GATHERING_BIAS = Role("zero", False, False, "none")
SCALE = Role("one", False, False, "none")

ROLES: tuple[tuple[str, Role], ...] = (
    (r"(embed_tokens|lm_head)\.weight", EMBEDDING),
    (r".*\.(q|k|v|gate|up)_proj\.weight", SPREADING),
    (r".*\.(o|down)_proj\.weight", GATHERING),
    (r".*\.(q|k|v|gate|up)_proj\.bias", SPREADING_BIAS),
    (r".*\.(o|down)_proj\.bias", GATHERING_BIAS),
    (r"(.*\.)?(\w*_layer)?norm\.weight", SCALE),
)
"""Pattern of a whole name -> role, of every parameter that model/decoder.py can have."""


def role_of(name: str, roles: tuple[tuple[str, Role], ...] = ROLES) -> Role:
    """The role of a parameter; the first pattern counts."""
    found = next((role for pattern, role in roles if re.fullmatch(pattern, name)), None)
    assert found is not None, f"{name} has no role: give it one in model/roles.py or in its family"
    return found
