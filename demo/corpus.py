"""The demo's corpus: the Python standard library's own source, from the interpreter that runs this.

    python -m demo.corpus --output_dir out/demo/corpus

It leaves out tests (not installed everywhere) and modules that are tables of characters rather than code.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import shutil
import sysconfig
from pathlib import Path

from utils.paths import a_path
from utils.terminal import run_main

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data",
                    "lib2to3", "ensurepip", "__pycache__"}  # fmt: skip


def copy_standard_library(output_dir: Path) -> tuple[int, int]:
    """Copy the modules to `output_dir`; return their number and their total bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    count = size = 0
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(relative.parts) or relative.parts[0].startswith(("config-", "lib-dynload")):
            continue
        target = output_dir / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        count += 1
        size += path.stat().st_size
    return count, size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo.corpus", description="Copy the standard library's source.")
    parser.add_argument("--output_dir", type=a_path, required=True)
    count, size = copy_standard_library(Path(parser.parse_args().output_dir))
    if not count:
        print("demo.corpus: this Python has no source files of its standard library", file=sys.stderr)
        return 2
    print(f"{count} modules of Python {sys.version.split()[0]}, {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
