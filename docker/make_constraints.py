"""Write docker/constraints-TARGET.txt: the versions of an image's packages, one name==version a line.

    python docker/make_constraints.py cpu --extra-index-url URL      # of torch's builds for CPUs
    python docker/make_constraints.py gpu --python-version 3.11 --only-binary :all: --target unused

Asks pip (22.2 or newer) what it would install now; nothing is installed. Arguments after the target go to pip. Run it
with Python 3.11, or as in the second line: a version for 3.11 exists for 3.12, too, but not the other way round.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"cpu": [], "gpu": ["liger-kernel"]}


def resolve(target: str, options: list[str]) -> dict[str, str]:
    """Name -> version of each package in an image of this target. The local part (+cpu) is left out: a constraint
    without one admits builds with any."""
    with tempfile.TemporaryDirectory() as directory:
        report = os.path.join(directory, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report",
                   report, "--requirement", "requirements-serve.txt", "--requirement", "requirements-ssh.txt",
                   "matplotlib", "orjson", *PACKAGES[target], *options]  # fmt: skip
        if subprocess.run(command, cwd=ROOT).returncode:
            raise ValueError("pip finds no set of packages that fits: see what it says above")
        packages = [item["metadata"] for item in json.loads(Path(report).read_text())["install"]]
    return {package["name"]: package["version"].partition("+")[0] for package in packages}


def main(argv: list[str]) -> int:
    if not argv or argv[0] not in PACKAGES:
        print("make_constraints: say cpu or gpu first, then pip's options", file=sys.stderr)
        return 2
    try:
        versions = resolve(argv[0], argv[1:])
    except ValueError as error:
        print(f"make_constraints: {error}", file=sys.stderr)
        return 2
    lines = [f"# What the {argv[0]} image is built with: docker/make_constraints.py writes this file."]
    lines += [f"{name}=={versions[name]}" for name in sorted(versions, key=str.lower)]
    path = ROOT / "docker" / f"constraints-{argv[0]}.txt"
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.relative_to(ROOT)}: {len(versions)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
