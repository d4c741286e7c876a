"""A third-party pass for memcompile."""
