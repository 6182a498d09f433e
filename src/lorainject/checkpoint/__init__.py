"""Merge adapters into the checkpoint of a model on disk."""
