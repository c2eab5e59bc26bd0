"""The viewer of runs: `python -m utils.resplot [user@host:]RUN ...`, or `python -m viewer`.

It reads runs/history.py and runs/traces.py, and imports nothing else of the stack but utils. Whatever shows runs, on a
desktop, in a terminal or in a browser, needs these, which know neither Qt nor matplotlib:

    sources/     where bytes come from: local files, SSH; only new ones are read
    state.py     whether a run is running, stalled or ended, how fast it is, how long still
    table.py     a row a run: texts, order
    view.py      what is shown, and how
    panels.py    which panels there are; a new one is one entry here
    series.py    the numbers of a panel: x and y, smoothed and measured, ranges
    curves.py    smoothing, and as many points as the screen can show
    picture.py   what a cursor reads off a picture, and what a zoom asks for
    colours.py   what tells one run from another
    formats.py   numbers as text
    text.py      what the viewer says, in two languages

    drawing/     pictures and files of them, by matplotlib; without a desktop, too
    desktop/     the window, by Qt, which only shows and asks
    command.py   the command line
    timeline.py  a command of its own: where a step's time goes, drawn from traces
"""
