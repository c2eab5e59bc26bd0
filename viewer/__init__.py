"""The viewer of runs: `python -m utils.resplot [user@host:]RUN ...`.

    sources.py   where bytes come from: local files, SSH; only new ones are read
    runs.py      bytes -> columns of numbers; what a resumed run superseded goes
    curves.py    smoothing, and as many points as the screen can show
    colours.py   what tells one run from another
    layout.py    where panels lie, and how much text fits
    panels.py    the pictures, drawn by matplotlib; also without a desktop
    timeline.py  where a step's time goes, drawn from traces
    desktop/     the window, by Qt, which only shows and asks: qt.py says whether there can be one
"""
