"""Exact arithmetic on tensors and files: no modules and no models."""
