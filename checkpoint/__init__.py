"""Checkpoints: written in the background, whole or absent, found again and read.

folder.py       files of a checkpoint, its manifest, whether it is whole
named.py        tensors as parts of parameters; any cut is filled from any other
stores.py       nodes that do not share a file system

saving.py       one save after the other, each in the background
writing.py      one rank's part in writing a checkpoint
host_copies.py  copies of tensors in host memory
retention.py    which checkpoints stay

opening.py      a run directory at the beginning of a launch
choosing.py     which checkpoint to take
fetching.py     files from other nodes

command.py      python -m checkpoint ls, verify, prune
"""
