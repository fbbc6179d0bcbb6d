"""A prompt template as Ollama's: a Modelfile for a merged export that was converted to GGUF."""

from __future__ import annotations

from typing import Any

from flocktune.data.templates import FIELD, Template, plain_template

_QUOTES = '"""'


def modelfile(template: Template, tokenizer: Any, weights: str = "model.gguf") -> str | None:
    """The text of a Modelfile whose TEMPLATE is ``template`` without a context; ``weights`` lie beside it.

    Ollama writes the begin-of-text token itself. None for ``chat``, whose template Ollama takes from the GGUF file if
    it knows it, and for templates that can not be written between its quotes.
    """
    if template == "chat":
        return None
    texts, _ = plain_template(template)
    parts = FIELD.split(texts.without_context)  # text, field, text, field, ..., text
    written = tokenizer.bos_token or ""
    parts[0] = parts[0].removeprefix(written)
    values = {"instruction": "{{ .Prompt }}", "context": ""}
    body = "".join(values[part] if at % 2 else _literal(part) for at, part in enumerate(parts))
    if _QUOTES in body or body.startswith('"') or body.endswith('"'):
        return None
    stop = f'PARAMETER stop "{tokenizer.eos_token}"\n' if tokenizer.eos_token else ""
    system = '{{ if .System }}{{ .System }}{{ "\\n\\n" }}{{ end }}'
    return f"FROM ./{weights}\nTEMPLATE {_QUOTES}{system}{body}{_QUOTES}\n{stop}PARAMETER temperature 0\n"


def _literal(text: str) -> str:
    """Text of a Go template: braces that would open an action are written by one."""
    return text.replace("{{", '{{ "{{" }}')
