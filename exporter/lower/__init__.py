"""Lowering: all captured graphs of one package go in at once (a backend may share between them), files come out."""

from __future__ import annotations

BACKENDS = {"aoti": ".aoti"}
