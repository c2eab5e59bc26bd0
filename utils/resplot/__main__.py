"""The door of the viewer: `python -m utils.resplot`."""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 3)[0]
    from utils import environment

    environment.check("requirements-viewer.txt")

    import runpy

    runpy.run_module("viewer", run_name="__main__")
