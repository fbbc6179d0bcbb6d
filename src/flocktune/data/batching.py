"""From encoded rows to batches: which rows together, in which order, padded or packed.

B batch, T tokens, N label positions, R sequences (B when padded).

Either way a batch of some rows has the same targets, so its loss is the same. Padded rows need
no attention mask: padding is on the right, and causal attention never looks there. Packed rows lie end
to end in one row; positions that restart at 0 tell transformers (5.x, when no mask and no cache are
given) to keep them apart. Models that know no positions ignore this: see :func:`packing_leak`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flocktune.data.encoding import Encoded
from flocktune.errors import Problem, UserError
from flocktune.seeds import derive_seed

Batching = Literal["padded", "packed"]
Indices = NDArray[np.int64]

WINDOW_BATCHES = 16
"""Rows are sorted by length within so many batches: little padding, and still a random order."""


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass.

    input_ids:    int64 [B, T]
    position_ids: int64 [B, T] when packed (restarts at 0 for every row), else None
    label_index:  int64 [N], flat positions b * T + t whose NEXT token is trained
    targets:      int64 [N], those next tokens
    index:        int64 [R], which sequences these are, in the order in which they lie in input_ids
    lengths:      int64 [R], their tokens
    labels:       int64 [R], their label positions
    pairs:        the first half are prompts with chosen answers, the other half the same with rejected ones
    """

    input_ids: Tensor
    position_ids: Tensor | None
    label_index: Tensor
    targets: Tensor
    index: Indices
    lengths: Indices
    labels: Indices
    pairs: bool = False

    @property
    def rows(self) -> int:
        """How many sequences."""
        return len(self.index)

    @property
    def units(self) -> int:
        """What a mean loss is the mean over: label tokens, or pairs."""
        return len(self.index) // 2 if self.pairs else len(self.targets)

    @property
    def tokens(self) -> int:
        """How many tokens, without padding."""
        return int(self.lengths.sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch, which is in the host's memory, on ``device``. Nothing waits for the device."""

        def placed(values: Tensor) -> Tensor:
            return values.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=placed(self.input_ids),
            position_ids=None if self.position_ids is None else placed(self.position_ids),
            label_index=placed(self.label_index),
            targets=placed(self.targets),
        )


def collate(rows: Encoded, indices: Sequence[int] | Indices, *, batching: Batching, pad_id: int) -> Batch:
    """Put rows ``indices`` of ``rows`` into one batch: [B, longest] padded, or [1, all tokens] packed."""
    index = rows.sequences(indices)
    pieces = [rows.rows(int(sequence)) for sequence in index]
    lengths = np.array([len(tokens) for tokens, _ in pieces], np.int64)
    flat = np.concatenate([tokens for tokens, _ in pieces]).astype(np.int64)
    trainable = np.concatenate([mask for _, mask in pieces])
    within = np.concatenate([np.arange(length) for length in lengths])
    positions = None
    match batching:
        case "padded":
            width = int(lengths.max())
            place = np.repeat(np.arange(len(lengths)) * width, lengths) + within
            grid = np.full((len(lengths), width), pad_id, np.int64)
            grid.reshape(-1)[place] = flat
        case "packed":
            place = np.arange(len(flat))
            grid = flat[None]
            positions = torch.from_numpy(within[None])
        case _:
            assert_never(batching)
    labels = np.flatnonzero(trainable & (within > 0))
    ends = np.cumsum(lengths)
    return Batch(
        input_ids=torch.from_numpy(grid),
        position_ids=positions,
        label_index=torch.from_numpy(place[labels] - 1),
        targets=torch.from_numpy(flat[labels]),
        index=index,
        lengths=lengths,
        labels=np.diff(np.searchsorted(labels, np.concatenate([[0], ends]))),
        pairs=rows.pairs,
    )


def plan_batches(
    lengths: Sequence[int] | Indices,
    *,
    batch_size: int,
    seed: int,
    steps: int | None,
    epochs: int | None,
    alike: bool = True,
) -> list[Indices]:
    """Which rows go into which batch, as indices into ``lengths``; ``alike``: rows of a batch are of like length.

    Every row once an epoch; each epoch is shuffled anew from ``seed``, and its last batch may be short.
    Exactly one of ``steps`` (that many batches, over as many epochs as that takes) and ``epochs`` is
    set. Raises ValueError else, or when there is no row.
    """
    if (steps is None) == (epochs is None):
        raise ValueError(f"expected either steps or epochs, got steps={steps} and epochs={epochs}")
    sizes = np.asarray(lengths, np.int64)
    if not len(sizes):
        raise ValueError("there is no row to make batches of")
    if epochs is not None:
        return [batch for epoch in range(epochs) for batch in _epoch(sizes, batch_size, seed, epoch, alike)]
    plan: list[Indices] = []
    for epoch in count():
        if len(plan) >= (steps or 0):
            return plan[:steps]
        plan += _epoch(sizes, batch_size, seed, epoch, alike)
    raise AssertionError("count() never ends")


def training_batches(
    encoded: Encoded,
    indices: Sequence[int] | Indices,
    *,
    batch_size: int,
    batching: Batching,
    pad_id: int,
    seed: int,
    steps: int | None,
    epochs: int | None,
) -> Iterator[Batch]:
    """Batches of rows ``indices`` in the order of :func:`plan_batches`; rows without a target are left out.

    Rows are padded beside rows of like length; packed ones need not be, and batches are then as mixed as the data.
    Raises UserError, at once, when no row is left.
    """
    rows = trainable_rows(encoded, indices)
    plan = plan_batches(
        encoded.lengths[rows], batch_size=batch_size, seed=seed, steps=steps, epochs=epochs, alike=batching == "padded"
    )
    return (collate(encoded, rows[batch], batching=batching, pad_id=pad_id) for batch in plan)


def evaluation_batches(
    encoded: Encoded, indices: Sequence[int] | Indices, *, batch_size: int, batching: Batching, pad_id: int
) -> Iterator[tuple[Indices, Batch]]:
    """(row indices, batch), every row of ``indices`` that has a target once.

    Longest first, so that too little memory shows at the start. Raises UserError when no row is left.
    """
    rows = trainable_rows(encoded, indices)
    ordered = rows[np.argsort(-encoded.lengths[rows], kind="stable")]
    groups = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return ((group, collate(encoded, group, batching=batching, pad_id=pad_id)) for group in groups)


def trainable_rows(encoded: Encoded, indices: Sequence[int] | Indices) -> Indices:
    """Those of ``indices`` that have a target. Raises UserError when there is none."""
    asked = np.asarray(indices, np.int64)
    rows = asked[encoded.targets[asked] > 0]
    if not len(rows):
        got = f"{len(asked)} rows without one" if len(asked) else "no rows"
        raise UserError(Problem("data", "at least one row with a response to learn from", got))
    return rows


def packing_leak(logits: Callable[[Tensor, Tensor], Tensor], vocabulary: int) -> float:
    """How much one packed row sees of the row before it, relative to the largest logit; 0 is not at all.

    ``logits(input_ids [1, T], position_ids [1, T]) -> [1, T, V]``, in evaluation mode, no cache. The
    first of two packed rows is changed; the second one's logits must stay. Families without position
    ids (ALiBi, state-space models) leak, as does OPT; packing would train them on the wrong text.
    """
    generator = torch.Generator().manual_seed(0)
    first, other, second = (torch.randint(vocabulary, (1, 8), generator=generator) for _ in range(3))
    positions = torch.arange(8).repeat(2)[None]
    with torch.no_grad():
        seen = [logits(torch.cat([row, second], dim=1), positions)[:, 8:].float() for row in (first, other)]
    return float((seen[0] - seen[1]).abs().max() / seen[0].abs().max())


def _epoch(lengths: Indices, batch_size: int, seed: int, epoch: int, alike: bool) -> list[Indices]:
    random = np.random.default_rng(derive_seed(seed, "batches", epoch))
    order = random.permutation(len(lengths))
    if not alike:
        return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    batches: list[Indices] = []
    for start in range(0, len(order), batch_size * WINDOW_BATCHES):
        window = order[start : start + batch_size * WINDOW_BATCHES]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
    return [batches[at] for at in random.permutation(len(batches))]
