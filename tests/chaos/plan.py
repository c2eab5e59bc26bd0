"""What train_with_faults.py does to the numbers of one launch, and when."""

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
    """Launch for which the plan holds; None: any."""
    ranks: tuple[int, ...]
    first: int
    last: int
    seed: int = 0
    """Chooses the weight."""
    pause: float = 0.0
    """Extra seconds for each of these steps."""
    attempt: int = 0
    """Number of the launch, from its start record."""

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
        """Record that the plan struck on a rank, at a step."""
        with open(home / f"{self.FILE}.done", "a") as file:
            file.write(f"{self.launch} {self.what} {rank} {step}\n")

    def done(self, home: Path) -> list[tuple[int, int]]:
        """(rank, step) of each strike of this plan."""
        path = home / f"{self.FILE}.done"
        words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        own = [line for line in words if line[:2] == [str(self.launch), self.what]]
        return [(int(rank), int(step)) for _, _, rank, step in own if self.first <= int(step) <= self.last]
