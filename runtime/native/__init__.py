"""Native code: what a shared library says of itself, what it needs, and a compiled model by its C functions."""
