"""Run the command line as `python -m lorainject.cli`."""

from . import main

main()
