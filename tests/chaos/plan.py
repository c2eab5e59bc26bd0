"""What train_with_faults.py is to do to the numbers of one launch, and when."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

NAN_LOSS, NAN_WEIGHT, FLIPPED_BIT = "nan_loss", "nan_weight", "flipped_bit"


@dataclass(frozen=True)
class Plan:
    FILE: ClassVar[str] = "plan.json"

    what: str
    """NAN_LOSS: the losses of these steps are not finite, so they are skipped. NAN_WEIGHT, FLIPPED_BIT: once the first
    of these steps is done, a weight is spoiled."""
    launch: str | None
    """In no other; None: in any."""
    ranks: tuple[int, ...]
    first: int
    last: int
    seed: int = 0
    """Says which weight."""
    pause: float = 0.0
    """Seconds that each of these steps takes longer."""
    attempt: int = 0
    """Of the launch, as its start record has it."""

    def write(self, home: Path) -> None:
        temporary = home / f"{self.FILE}.new"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(home / self.FILE)

    @staticmethod
    def read(home: Path) -> "Plan | None":
        try:
            return Plan(**json.loads((home / Plan.FILE).read_text()))
        except FileNotFoundError:
            return None

    def note(self, home: Path, rank: int, step: int) -> None:
        """It was done."""
        with open(home / f"{self.FILE}.done", "a") as file:
            file.write(f"{self.launch} {self.what} {rank} {step}\n")

    def done(self, home: Path) -> list[tuple[int, int]]:
        """(rank, step) of what was done of it."""
        path = home / f"{self.FILE}.done"
        words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        own = [line for line in words if line[:2] == [str(self.launch), self.what]]
        return [(int(rank), int(step)) for _, _, rank, step in own if self.first <= int(step) <= self.last]
