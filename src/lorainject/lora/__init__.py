"""One adapter, and how it sits on a module: the idea of the library."""
