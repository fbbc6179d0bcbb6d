"""The embedded default: a small invented world, its instructions and a small base model."""

from __future__ import annotations

from pathlib import Path

_WORLD = Path(__file__).parent / "world"


def embedded_model() -> Path:
    """Folder of the embedded base model and tokenizer (transformers format)."""
    return _WORLD / "model"


def embedded_data() -> Path:
    """The embedded instructions: JSONL with instruction, context, response, category, check."""
    return _WORLD / "instructions.jsonl"


def embedded_public() -> Path:
    """Instructions for the server to hold: other rows of the same kinds and columns, no prompt of the clients'."""
    return _WORLD / "public.jsonl"
