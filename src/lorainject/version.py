"""The version of the package, which files name as their writer."""

__version__ = "0.1.0"
