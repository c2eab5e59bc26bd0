"""Write whole_model.json: the losses of tests/unit/test_whole_model.py, for it to compare later ones with.

    python -m tests.golden.make_whole_model

To be run when a run is meant to have other losses, and the reason belongs into the commit. Takes a minute on a CPU.
"""

import json
import platform
from importlib.metadata import version

from tests.unit.test_whole_model import CASES, GOLDEN, train_exact, train_fused, train_plain
from utils.machine import cpu_name


def main() -> None:
    runs = {"float64": train_exact, "plain": train_plain, "fused": train_fused}
    losses = {name: {kind: run(config, dtype) for kind, run in runs.items()} for name, (dtype, config) in CASES.items()}
    made_on = [cpu_name(), f"Python {platform.python_version()}", *(f"{x} {version(x)}" for x in ("torch", "triton"))]
    GOLDEN.write_text(json.dumps({"made_on": made_on, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    main()
