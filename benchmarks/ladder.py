"""One round of FedIT as its public code has it (Trainer, PEFT, files), and switches that replace its parts.

The public way is that of https://github.com/JayZhang42/FederatedGPT-Shepherd, written anew. For each client of each
round: its JSON file is read as a data set, shuffled and tokenised again, prompts twice; a new Trainer trains shuffled
padded batches and logs every step; the adapter is saved with torch.save and put back to what it was. The server loads
all of them and saves their mean. So that all end at the same loss, this is done with its defaults changed. Less is
charged for: the loss on answers alone and not on prompts too, our short template and not Alpaca's, one epoch and not
ten, no dropout, no int8 base (whose preparation has activations computed twice). And more: LoRA on the targets that
ours has, where the public default is q_proj alone.

One plain loop over clients, one over batches; a switch changes one thing.

Shapes: B rows, T tokens, N label positions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

from benchmarks.networks import Network
from flocktune.config.schema import LocalConfig, LoraConfig
from flocktune.data.batching import Batch, training_batches
from flocktune.data.encoding import Encoded
from flocktune.data.examples import Example
from flocktune.data.templates import SHORT, Template
from flocktune.seeds import derive_seed
from flocktune.training import next_token_loss

IGNORED = -100
"""The label of a token that is not trained."""

TEMPLATE: Template = "short"


@dataclass(frozen=True)
class Switches:
    """What is ours instead of the usual: all off is the alternative."""

    no_files: bool = False
    cached_tokens: bool = False
    bare_loop: bool = False
    own_lora: bool = False
    grouped_batches: bool = False
    label_logits: bool = False


LADDER: Mapping[str, Switches] = {
    "public FedIT's way: Trainer + PEFT, files": Switches(),
    "+ rows and adapters in memory": Switches(True),
    "+ tokens cached": Switches(True, True),
    "+ a bare loop, not Trainer": Switches(True, True, True),
    "+ our LoRA, not PEFT's": Switches(True, True, True, True),
    "+ length-grouped batches, no mask": Switches(True, True, True, True, True),
    "+ logits only at labels": Switches(True, True, True, True, True, True),
}


@dataclass(frozen=True, eq=False)
class Work:
    """Who trains on which rows, and how. A round is one epoch of every client."""

    examples: Sequence[Example]
    encoded: Encoded
    clients: Mapping[str, NDArray[np.int64]]
    held_out: NDArray[np.int64]
    tokenizer: Any
    pad_id: int
    local: LocalConfig
    lora: LoraConfig
    seed: int
    folder: str

    @cached_property
    def texts(self) -> Mapping[str, datasets.Dataset]:
        """Every client's rows as a data set of texts."""
        return {
            client: datasets.Dataset.from_list([prompt_and_answer(self.examples[row]) for row in rows])
            for client, rows in self.clients.items()
        }

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """The same, a file each: JSON lines."""
        found = {client: Path(self.folder) / f"{client}.jsonl" for client in self.clients}
        for client, path in found.items():
            path.write_text("".join(json.dumps(row) + "\n" for row in self.texts[client]), encoding="utf-8")
        return found


def plain_round(
    work: Work, network: Network, switches: Switches, state: Mapping[str, Tensor], number: int
) -> dict[str, Tensor]:
    """Round ``number`` from ``state``: train every client, average the state dicts by rows."""
    total = sum(len(rows) for rows in work.clients.values())
    trained: dict[str, Any] = {}
    for client in work.clients:
        network.write(state)
        train_client(work, network, switches, client, derive_seed(work.seed, number, client))
        trained[client] = network.read() if switches.no_files else _saved(network.read(), work, client)
    average = {name: torch.zeros_like(value) for name, value in state.items()}
    for client, rows in work.clients.items():
        theirs = trained[client] if switches.no_files else torch.load(trained[client], weights_only=True)
        for name, value in theirs.items():
            average[name] += len(rows) / total * value
    if not switches.no_files:
        _saved(average, work, "mean")
    return average


def _saved(state: Mapping[str, Tensor], work: Work, name: str) -> Path:
    place = Path(work.folder) / f"{name}.bin"
    torch.save(dict(state), place)
    return place


def train_client(work: Work, network: Network, switches: Switches, client: str, seed: int) -> None:
    """One epoch on one client's rows, in place, with a fresh optimiser and a rate that falls linearly to 0."""
    if switches.bare_loop:
        _bare_loop(work, network, switches, client, seed)
    else:
        _trainer(work, network, _shuffled_rows(work, switches, client, seed), seed, log=not switches.no_files)


def frozen_round(work: Work, model: Any, number: int) -> None:
    """The floor: forward passes of the round's batches, and gradients of activations; nothing is trained."""
    for client in work.clients:
        for batch in _grouped(work, client, derive_seed(work.seed, number, client)):
            next_token_loss(model, batch).backward()


def _trainer(work: Work, network: Network, rows: Any, seed: int, *, log: bool) -> None:
    arguments = TrainingArguments(
        output_dir=work.folder,
        per_device_train_batch_size=work.local.batch_size,
        num_train_epochs=1,
        learning_rate=work.local.lr,
        weight_decay=work.local.weight_decay,
        max_grad_norm=work.local.clip_norm,
        lr_scheduler_type="linear",
        optim="adamw_torch",
        train_sampling_strategy="sequential",  # the rows are shuffled already, the same way for every variant
        logging_strategy="steps" if log else "no",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=seed % 2**31,
    )
    trainer = Trainer(model=network.model, args=arguments, train_dataset=rows, data_collator=_collator(work))
    trainer.remove_callback(PrinterCallback)  # it writes among our tables
    trainer.train()


def _bare_loop(work: Work, network: Network, switches: Switches, client: str, seed: int) -> None:
    steps = -(-len(work.clients[client]) // work.local.batch_size)
    optimizer = torch.optim.AdamW(network.trained, lr=work.local.lr, weight_decay=work.local.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for loss in _losses(work, network.model, switches, client, seed):
        loss.backward()
        nn.utils.clip_grad_norm_(network.trained, work.local.clip_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def _losses(work: Work, model: Any, switches: Switches, client: str, seed: int) -> Iterator[Tensor]:
    """The mean loss over the labels of every batch, one forward pass after another."""
    if not switches.grouped_batches:
        rows, collate = _shuffled_rows(work, switches, client, seed), _collator(work)
        for start in range(0, len(rows), work.local.batch_size):
            yield model(**collate(rows[start : start + work.local.batch_size])).loss
        return
    for batch in _grouped(work, client, seed):
        if switches.label_logits:
            yield next_token_loss(model, batch) / len(batch.targets)
        else:
            yield model(input_ids=batch.input_ids, labels=labels_of(batch), use_cache=False).loss


def _collator(work: Work) -> DataCollatorForSeq2Seq:
    return DataCollatorForSeq2Seq(work.tokenizer, padding=True, pad_to_multiple_of=8, label_pad_token_id=IGNORED)


def _shuffled_rows(work: Work, switches: Switches, client: str, seed: int) -> Any:
    """A client's rows in random order, tokenised: from the cache as a list, or made now as a data set."""
    order = np.random.default_rng(seed).permutation(len(work.clients[client]))
    if switches.cached_tokens:
        return [cached_row(work.encoded, int(row)) for row in work.clients[client][order]]
    if switches.no_files:
        texts = work.texts[client].select(order)
    else:
        files, cache = str(work.files[client]), str(Path(work.folder) / "cache")
        texts = datasets.load_dataset("json", data_files=files, cache_dir=cache)["train"].select(order)
    return texts.map(lambda row: usual_tokens(work.tokenizer, **row), remove_columns=texts.column_names)


def _grouped(work: Work, client: str, seed: int) -> Iterator[Batch]:
    """The batches that flocktune draws for the same task."""
    return training_batches(
        work.encoded,
        work.clients[client],
        batch_size=work.local.batch_size,
        batching="padded",
        pad_id=work.pad_id,
        seed=derive_seed(seed, "batches"),
        steps=None,
        epochs=1,
    )


def cached_row(encoded: Encoded, row: int) -> dict[str, list[int]]:
    """A row of the token cache, as :func:`usual_tokens` gives it."""
    tokens, trainable = encoded.rows(row)
    return {
        "input_ids": tokens.tolist(),
        "attention_mask": [1] * len(tokens),
        "labels": np.where(trainable, tokens, IGNORED).tolist(),
    }


def prompt_and_answer(example: Example) -> dict[str, str]:
    """Both texts in the short template."""
    form = SHORT.with_context if example.context else SHORT.without_context
    prompt = form.replace("{context}", example.context).replace("{instruction}", example.instruction)
    return {"prompt": prompt, "answer": " " + example.response}


def usual_tokens(tokenizer: Any, prompt: str, answer: str) -> dict[str, list[int]]:
    """Tokenise the whole text, then the prompt again to learn how much of it not to train."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = start + tokenizer(prompt + answer, add_special_tokens=False)["input_ids"] + end
    untrained = len(start) + len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return {
        "input_ids": tokens,
        "attention_mask": [1] * len(tokens),
        "labels": [IGNORED] * untrained + tokens[untrained:],
    }


def labels_of(batch: Batch) -> Tensor:
    """A padded batch's labels [B, T], as transformers wants them: :data:`IGNORED` where nothing is trained."""
    labels = torch.full_like(batch.input_ids, IGNORED).flatten()
    labels[batch.label_index + 1] = batch.targets
    return labels.view_as(batch.input_ids)
