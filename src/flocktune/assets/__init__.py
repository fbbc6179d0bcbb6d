"""What comes along: a small invented world with its base model, and what is known of public models and data."""

from __future__ import annotations

from pathlib import Path

_WORLD = Path(__file__).parent / "world"
_KNOWN = Path(__file__).parent / "known"


def embedded_model() -> Path:
    """Folder of the embedded base model and tokenizer (transformers format)."""
    return _WORLD / "model"


def embedded_manifest() -> Path:
    """How the embedded world was made, and the sha256 of each of its files."""
    return _WORLD / "MANIFEST.json"


def embedded_data() -> Path:
    """The embedded instructions: JSONL with instruction, context, response, category, check."""
    return _WORLD / "instructions.jsonl"


def embedded_public() -> Path:
    """Instructions for the server to hold: other rows of the same kinds and columns, no prompt of the clients'."""
    return _WORLD / "public.jsonl"


def known_model_files() -> list[Path]:
    """What is known of base models on the hub without their files: ids, source, parameters, shapes."""
    return sorted((_KNOWN / "models").glob("*.json"))


def known_data_file() -> Path:
    """What is known of public data sets without their rows: names, rows, categories, where they are."""
    return _KNOWN / "data.json"
