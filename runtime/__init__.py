"""prebake.runtime."""
