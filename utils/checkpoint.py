"""The old door of `python -m checkpoint`: `python -m utils.checkpoint`."""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

    import runpy

    runpy.run_module("checkpoint", run_name="__main__")
