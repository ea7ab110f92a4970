"""The engine: requests of one artifact advance together, one entry of their plans after another. `engine.py` is the place to begin."""
