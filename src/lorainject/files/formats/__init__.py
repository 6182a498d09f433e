"""One module per library whose adapter files are read and written."""
