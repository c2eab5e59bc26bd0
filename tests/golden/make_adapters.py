"""Write adapters.json: PEFT's results for small models with adapters, for tests/unit/test_lora_parity.py.

    pip install -r requirements-dev.txt
    python -m tests.golden.make_adapters

PEFT adapts models of transformers, in float32, on one CPU thread. The cases and their weights, which torch's generator
draws, are those of tests/adapter_cases.py.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from torch import Tensor

from tests.adapter_cases import CASES, Result, our_model, peft_model, peft_names, run

OUTPUT = Path(__file__).parent / "adapters.json"
ELEMENTS = 20
"""Elements of a gradient that are kept, evenly spaced, beside its norm; and of the logits ten times as many."""


def picked_logits(result: Result) -> list[float]:
    return _picked(result.logits, 10 * ELEMENTS)


def picked_gradients(result: Result) -> dict[str, list[float]]:
    """Parameter -> the norm of its gradient, and elements of it."""
    return {
        name: [gradient.double().norm().item(), *_picked(gradient, ELEMENTS)]
        for name, gradient in result.gradients.items()
    }


def _picked(tensor: Tensor, count: int) -> list[float]:
    return tensor.flatten()[:: max(tensor.numel() // count, 1)].tolist()


def main() -> None:
    results = {}
    for name, case in CASES.items():
        ours = our_model(case)
        with tempfile.TemporaryDirectory() as directory:
            result = run(peft_model(case, ours, Path(directory) / "base"), peft_names(ours))
        gradients = picked_gradients(result)
        results[name] = {"logits": picked_logits(result), "gradients": gradients, "losses": result.losses}
    made_with = [f"{package} {version(package)}" for package in ("peft", "transformers", "torch")]
    OUTPUT.write_text(rounded(json.dumps({"made_with": made_with, "results": results})) + "\n")


def rounded(text: str) -> str:
    """JSON with numbers of seven digits, a case a line."""
    values = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.7g}"))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values["results"].items())
    return f'{{"made_with": {json.dumps(values["made_with"])},\n"results": {{\n{lines}\n}}}}'


if __name__ == "__main__":
    main()
