"""Ranges of sizes: which a call may ask for, and what the dimensions of a graph's tensors are at each of them."""
