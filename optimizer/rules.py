"""The rules of --optimizer: a list for each, in which the first that takes a parameter steps it."""

from collections.abc import Callable, Mapping

from optimizer.adamw import AdamW
from optimizer.adamw8bit import AdamW8bit
from optimizer.config import AdamWConfig, LionConfig, MuonConfig
from optimizer.lion import Lion
from optimizer.lion8bit import Lion8bit
from optimizer.muon import Muon
from optimizer.param_groups import ParamGroups, Role
from optimizer.rule import Rule


def new_rules(
    optimizer: str, adamw: AdamWConfig, muon: MuonConfig, lion: LionConfig, kernel: str = "torch",
    roles: Mapping[str, Role] | None = None,
) -> list[Rule]:  # fmt: skip
    """The rules of an optimizer.

    Args:
        optimizer: a choice of --optimizer.
        kernel: "torch" or "triton"; see `choose_kernel`.
        roles: parameter name -> its role, which says whether it decays and whether Muon may step it; None: decide by
            name and shape, see param_groups.py.
    """
    groups, decay = ParamGroups(roles), adamw.weight_decay
    rules: dict[str, Callable[[], list[Rule]]] = {
        "adamw": lambda: [AdamW(adamw, groups, kernel)],
        "adamw8bit": lambda: [AdamW8bit(adamw, groups, kernel), AdamW(adamw, groups, kernel)],
        "muon": lambda: [Muon(muon, decay, groups), AdamW(adamw, groups, kernel)],
        "lion": lambda: [Lion(lion, decay, groups, kernel)],
        "lion8bit": lambda: [Lion8bit(lion, decay, groups, kernel), Lion(lion, decay, groups, kernel)],
    }
    return rules[optimizer]()
