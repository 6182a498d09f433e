"""lorainject beside PEFT (and loralib, where it has the like) on this machine: `scripts/bench`, or `python -m bench`.

    measure.py   clocks, rounds, ratios, memory: how a figure is taken
    row.py       what a row is: its name, what it must reach and aims at, how it is measured; and a result
    models.py    what is measured: the same model as base, ours and PEFT's, with the same A and B, and that they agree
    floor.py     the same model by torch's calls alone: what there is to reach
    verbs.py layer.py model.py merging.py disk.py experts.py    the rows, a group a file
    table.py     all rows, in order, and how they are run
    report.py    a run on the screen, as Markdown, as JSON, and beside an earlier one

Overhead is T / T(frozen base) - 1, rho is overhead(ours) / overhead(PEFT): a plain ratio of times would hide everything
behind the base's own products.
"""
