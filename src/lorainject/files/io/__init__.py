"""Bytes on disk: containers, bounded reads and atomic writes."""
