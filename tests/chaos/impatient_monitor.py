"""monitor_process.py, changed only to ask a host that refused it again after seconds, not minutes."""

import runpy

from monitor import remote

if __name__ == "__main__":
    assert remote._LATER_AT_MOST > remote._LATER > 2.0
    remote._LATER, remote._LATER_AT_MOST = 1.0, 2.0
    runpy.run_path("monitor_process.py", run_name="__main__")
