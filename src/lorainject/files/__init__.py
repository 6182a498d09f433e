"""Adapter files: one format a module, one record (`record.AdapterFile`) in the middle."""
