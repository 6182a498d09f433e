"""Merge adapters into the weights of a model in memory, and restore the weights to the bit."""
