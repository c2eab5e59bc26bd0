"""Write whole_model.json: losses with which tests/unit/test_whole_model.py compares later ones.

    python -m tests.golden.make_whole_model

Run it when a run's losses are meant to change, and give the reason in the commit. It takes a minute on a CPU.
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
