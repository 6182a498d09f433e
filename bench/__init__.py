"""The benchmark: lorainject, PEFT, and loralib where it has the same feature, on this machine.

Run it with `scripts/bench`, or `python -m bench`.

    measure.py   how a figure is taken: clocks, rounds, ratios, memory
    row.py       a row of the table with its goals, a figure, and a result
    models.py    the same model as base, ours and PEFT's, with the same A and B, and the check that they agree
    floor.py     the same model by torch's calls alone: what there is to reach
    verbs.py layer.py model.py merging.py disk.py experts.py    the rows, one group per file
    table.py     all rows, in order, and how they are run
    report.py    a run on the screen, as Markdown, as JSON, and compared with an earlier one

Overhead is T / T(frozen base) - 1, and rho is overhead(ours) / overhead(PEFT). A plain ratio of times would hide
everything behind the products of the base.
"""
