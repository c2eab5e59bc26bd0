"""`python -m evaluation.report`; see command.py."""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 3)[0]
    from utils import environment

    environment.check()

    from evaluation.report.command import main
    from utils.terminal import run_main

    run_main(main)
