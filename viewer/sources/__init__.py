"""Reads what is new in the files of runs, on this machine or on another over one SSH connection.

    addresses.py   the names that users give to runs: RUN, [user@]host:RUN, ssh://...
    files.py       the questions that both kinds of machine answer: sizes, bytes, folders
    local.py       files on this machine
    ssh.py         files on another, by SFTP; passwords and unknown hosts
    following.py   new lines of a file that grows, is cut, or is replaced
    run.py         one run: its results, settings and heartbeat
    source.py      the runs on one machine, kept up to date by a thread
    labels.py      names that tell runs from each other
"""
