"""The old door of `python -m viewer.timeline`: `python -m utils.timeline`."""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check("requirements-viewer.txt")

    import runpy

    runpy.run_module("viewer.timeline", run_name="__main__")
