"""The tokenizer: byte-level BPE in which every word of the world is one token.

Text is normalised so that each word carries one space before it wherever it
stands, and no space stays at the end. So a word has a single token, and a text
cut into segments at white space ("... Answer: " and "baker") has the same tokens
as the whole: whoever encodes prompt and response apart loses nothing. Runs of
spaces become one. Any other text can still be encoded, as bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
TEMPLATE_WORDS = ("Instruction", "Context", "Answer")
WORD = re.compile(r"[A-Za-z]+")


def train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A tokenizer with at most that many tokens, trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend(" "),
            normalizers.Replace("\n", "\n "),
            normalizers.Replace(Regex(" +\n"), "\n"),
            normalizers.Replace(Regex(" +"), " "),
            normalizers.Replace(Regex(r" \z"), ""),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def split_words(tokenizer: Tokenizer, words: Iterable[str]) -> list[str]:
    """The words that are more than one token."""
    return sorted(word for word in set(words) if len(tokenizer.encode(word).ids) != 1)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context_length: int) -> None:
    """Write the two files that transformers loads, of version 4 as well as 5."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "padding_side": "left",
    }
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / "tokenizer_config.json").write_text(text + "\n")
