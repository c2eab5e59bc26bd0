"""Report card of a run, as one page: `python -m evaluation.report RUN`.

    RUN --run.py--> Run  --trained.py, curves.py, cost.py, faults.py, audited.py, scores.py, samples.py, commands.py-->
        Card  --markdown.py--> report.md
              --page.py, drawing.py--> report.html

A card (card.py) is plain data and plain text: nothing in it is Markdown or HTML, whatever a model or a file name says.
The two writers alone know how their format escapes. What is missing or damaged becomes a remark, a sentence on top of
the card, and the rest of the card is made all the same.
"""
