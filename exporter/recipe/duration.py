"""Duration: a time as a recipe writes it."""

from __future__ import annotations

import re

DURATION = r"^(full|[1-9][0-9]{0,4}[smh])$"
"""`90s`, `10m`, `2h`, or `full`: as long as it takes."""
SECONDS = {"s": 1, "m": 60, "h": 3600}


def parse_duration(text: str) -> float | None:
    """Seconds, None for `full`. Raises ValueError for what is no duration."""
    if not re.match(DURATION, text):
        raise ValueError(f"{text!r}: expected a time such as 90s, 10m or 2h, or full")
    return None if text == "full" else float(text[:-1]) * SECONDS[text[-1]]
