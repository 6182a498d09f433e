"""An example of the whole life of an adapter: teach a text model to find Python functions by their docstrings.

scripts/demo    runs it (`scripts/demo --help` lists the options)
data.py         the task: pairs of a docstring and its function
encoder.py      the model, its training and its score
demo.py         the tour: train, save, load, merge, unmerge and export, with a check at each step
report.py       what is shown: lines, checks, tables and the plot
"""
