"""Which weights of a model a target names."""
