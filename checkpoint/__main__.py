"""`python -m checkpoint`: see checkpoint/command.py."""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

from checkpoint.command import main
from utils.terminal import run_main

if __name__ == "__main__":
    run_main(main, goes_on=True)
