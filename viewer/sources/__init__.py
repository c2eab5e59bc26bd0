"""Where runs lie, and what is new of them: files on this machine, or on another over one SSH connection.

    addresses.py   what somebody calls a run: RUN, [user@]host:RUN, ssh://...
    files.py       what both kinds of machine have in common: sizes, bytes, folders
    local.py       files on this machine
    ssh.py         files on another, by SFTP, and who is asked for a password
    following.py   the new lines of a file that grows, is cut, or is replaced
    run.py         one run: its results, settings and heartbeat
    source.py      all runs on one machine, kept up to date by a thread
    labels.py      names that tell runs from each other
"""
