"""Keeps a training run alive: the parts of monitor_process.py.

    command.py   the training command: its run directory, and the flags that are added
    node.py      the job's processes on one machine; `python -m monitor.node` runs on remote hosts
    remote.py    a node behind an SSH connection
    hosts.py     the hosts file
    claim.py     which monitor has a run
    watch.py     which heartbeat is overdue
    policy.py    what the end of a launch means, and what to do next
    passing.py   disks that are full or away
    rewind.py    --resume_from=best, once
    status.py    the status file
    supervisor.py   launch, watch, end, launch again
"""
