"""`python -m prebake.exporter` is the command `prebake`."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
