"""A served prompt has the tokens of the training's."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flocktune.config.schema import CustomTemplate, ModelConfig
from flocktune.data.chat_template import served_prompt, served_template
from flocktune.data.encoding import encode_prompt
from flocktune.data.examples import Example, Message
from flocktune.data.modelfile import modelfile
from flocktune.models.load import load_tokenizer
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

OWN = CustomTemplate('Q "{instruction}" 😀 of {context}\\n{{ bos_token }}\n', "Q\t{instruction} {% x %}{context}\n\n")
TALK = (Message("user", "Hello"), Message("assistant", "Hi. "), Message("user", "Who?"), Message("assistant", "Me."))
EXAMPLES = [
    Example("Name three fruits."),
    Example('Say "{context}" and {{ it }}\\n twice', "Braces {instruction}\nand 日本"),
    Example("And now?", history=TALK),
    Example("And now?", "of this", history=(Message("system", "Be brief."), *TALK)),
    Example("", history=(Message("system", "Be brief."),)),
]


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: a text begins with a space, but not after a special token."""
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ:#.,?!\n\t'\"\\{}%_😀日本"})
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", *letters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Neither begin nor end."""
    return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)


TOKENIZERS = {
    "bytes": lambda: tiny_tokenizer(chat=True),
    "embedded": lambda: load_tokenizer(ModelConfig()),
    "metaspace": metaspace_tokenizer,
    "bare": bare_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", ["alpaca", "short", OWN], ids=["alpaca", "short", "own"])
def test_a_served_prompt_has_the_tokens_of_the_training(kind: str, template) -> None:
    tokenizer = TOKENIZERS[kind]()
    found = served_template(template, tokenizer)
    assert found is not None
    for example in EXAMPLES:
        trained = encode_prompt(example, tokenizer, template=template, max_tokens=10**6)
        assert served_prompt(found, example, template, tokenizer) == trained


def test_a_tokenizers_own_chat_template_is_kept_and_gets_the_begin_of_text_that_training_adds() -> None:
    tokenizer = tiny_tokenizer(chat=True)
    found = served_template("chat", tokenizer)
    assert found == "{{- bos_token -}}" + CHAT_TEMPLATE
    for example in EXAMPLES:
        trained = encode_prompt(example, tokenizer, template="chat", max_tokens=10**6)
        assert trained[0] == tokenizer.bos_token_id
        assert served_prompt(found, example, "chat", tokenizer) == trained
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    assert served_template("chat", tokenizer) == "{{ bos_token }}" + CHAT_TEMPLATE


def test_a_template_that_writes_the_begin_of_text_itself_has_it_once() -> None:
    tokenizer, template = tiny_tokenizer(), CustomTemplate("<s>{instruction}|{context}:", "<s>{instruction}:")
    found = served_template(template, tokenizer)
    assert found is not None
    ids = served_prompt(found, Example("Go"), template, tokenizer)
    assert ids.count(0) == 1
    assert ids == encode_prompt(Example("Go"), tokenizer, template=template, max_tokens=99)


def test_where_no_chat_template_fits_there_is_none() -> None:
    mixed = CustomTemplate("<s>{instruction}|{context}:", "{instruction}:")
    assert served_template(mixed, tiny_tokenizer()) is None


def test_an_answer_in_a_conversation_ends_as_in_training_and_empty_ones_are_left_out() -> None:
    tokenizer = tiny_tokenizer()
    found = served_template("short", tokenizer)
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "b"},
             {"role": "user", "content": "C"}, {"role": "assistant", "content": " "}]  # fmt: skip
    text = tokenizer.apply_chat_template(turns, chat_template=found, tokenize=False)
    assert text == "<s>Instruction: A\nAnswer: b</s>\n\nInstruction: C\nAnswer:"


def test_a_modelfile_has_the_template_of_single_prompts() -> None:
    text = modelfile("short", tiny_tokenizer())
    assert text is not None
    assert text.startswith("FROM ./model.gguf\n")
    assert 'Instruction: {{ .Prompt }}\nAnswer:"""\n' in text
    assert 'PARAMETER stop "</s>"' in text
    own = modelfile(CustomTemplate("", "<s>{{ {instruction} {context}!"), tiny_tokenizer())
    assert own is not None
    assert '{{ end }}{{ "{{" }} {{ .Prompt }} !"""' in own, "the begin of the text is Ollama's to write"
    assert modelfile("chat", tiny_tokenizer(chat=True)) is None
    assert modelfile(CustomTemplate("", 'Say "{instruction}"'), tiny_tokenizer()) is None
