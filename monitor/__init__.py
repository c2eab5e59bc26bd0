"""Keeps a training run alive: what monitor_process.py is made of.

    command.py   the training command: its run directory, and what is added to it
    node.py      the job's processes on one machine; also `python -m monitor.node`, what runs on a remote host
    remote.py    a node behind an SSH connection
    hosts.py     the hosts file
    claim.py     whose a run is
    watch.py     which heartbeat is overdue
    policy.py    what an ending means, and what to do next
    passing.py   disks that are full or away
    rewind.py    --resume_from=best, once
    status.py    the status file
    supervisor.py   launch, watch, end, launch again
"""
