"""Other libraries' chatter, kept off the terminal: bars, deprecations and optional kernels that are not what went wrong.

Only the command line calls this; a program that imports the exporter keeps its own logging.
"""

from __future__ import annotations

import logging
import os
import warnings

CHATTY_LIBRARIES = ("torchao", "diffusers", "transformers")


def silence_libraries() -> None:
    """Errors alone from the libraries underneath; their exceptions are untouched."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for name in CHATTY_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|diffusers|transformers|torchao")
    from ..private_torch import silence_torch_logs  # brings torch

    silence_torch_logs()
    import diffusers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
