"""The rules of --optimizer: a list for each, in which the first that takes a parameter steps it."""

from collections.abc import Callable, Mapping

from optimizer.adamw import AdamW
from optimizer.config import AdamWConfig, MuonConfig
from optimizer.muon import Muon
from optimizer.param_groups import ParamGroups, Role
from optimizer.rule import Rule


def new_rules(
    optimizer: str, adamw: AdamWConfig, muon: MuonConfig, kernel: str = "torch", roles: Mapping[str, Role] | None = None
) -> list[Rule]:
    """The rules of an optimizer.

    Args:
        optimizer: a choice of --optimizer.
        kernel: "torch" or "triton"; see `choose_kernel`.
        roles: parameter name -> its role, which says whether it decays and whether Muon may step it; None: decide by
            name and shape, see param_groups.py.
    """
    groups = ParamGroups(roles)
    rules: dict[str, Callable[[], list[Rule]]] = {
        "adamw": lambda: [AdamW(adamw, groups, kernel)],
        "muon": lambda: [Muon(muon, adamw.weight_decay, groups), AdamW(adamw, groups, kernel)],
    }
    return rules[optimizer]()
