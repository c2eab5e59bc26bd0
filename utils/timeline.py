"""The old door of viewer.timeline: `python -m utils.timeline`."""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check("requirements-viewer.txt")

from utils.terminal import run_main
from viewer.timeline import main

if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), goes_on=True)
