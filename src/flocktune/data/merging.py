"""One batch of the batches of several clients, for one forward pass; no row sees another one, as within a batch.

B batch, T tokens, N label positions, R sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flocktune.data.batching import Batch, Indices


@dataclass(frozen=True)
class Merged:
    """``batch``: all rows, padded or packed. Of every part: its tokens and label positions here, one after another;
    and where in the part's own batch, flat, each of these tokens comes from (of padding: some position of its row)."""

    batch: Batch
    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    places: tuple[Tensor, ...]


def merged(parts: Sequence[Batch], *, packed: bool) -> Merged:
    """Rows of ``parts`` in their order: end to end in one row, or padded to the longest of all."""
    lengths = np.concatenate([part.lengths for part in parts])
    rows = [row for part in parts for row in token_rows(part)]
    if packed:
        input_ids = torch.cat(rows).unsqueeze(0)
        position_ids = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])[None])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    else:
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        position_ids = None
        starts = np.arange(len(rows)) * input_ids.shape[1]
    first_rows = np.cumsum([0, *[part.rows for part in parts]])
    labels, places = [], []
    for part, first in zip(parts, first_rows, strict=False):
        new, old = starts[first : first + part.rows], _starts(part)
        at = part.label_index.numpy()
        row = np.searchsorted(old, at, side="right") - 1
        labels.append(torch.from_numpy(new[row] + at - old[row]))
        places.append(_places(old, part.lengths, None if packed else input_ids.shape[1]))
    batch = Batch(
        input_ids,
        position_ids,
        torch.cat(labels),
        torch.cat([part.targets for part in parts]),
        np.concatenate([part.index for part in parts]),
        lengths,
        np.concatenate([part.labels for part in parts]),
    )
    return Merged(batch, tuple(map(len, places)), tuple(map(len, labels)), tuple(places))


def token_rows(batch: Batch) -> list[Tensor]:
    """The tokens of each row, int64 [length]."""
    lengths = batch.lengths.tolist()
    if batch.position_ids is not None:
        return list(batch.input_ids[0].split(lengths))
    return [row[:length] for row, length in zip(batch.input_ids, lengths, strict=True)]


def _starts(batch: Batch) -> Indices:
    """Where each row begins among the flat positions of its batch."""
    if batch.position_ids is not None:
        return np.concatenate([[0], np.cumsum(batch.lengths)[:-1]])
    return np.arange(batch.rows) * batch.input_ids.shape[1]


def _places(starts: Indices, lengths: Indices, width: int | None) -> Tensor:
    """Flat positions of the tokens of every row, or of ``width`` tokens a row, of which the last one stands for what is
    beyond it."""
    pieces = [
        start + np.minimum(np.arange(width or length), length - 1)
        for start, length in zip(starts, lengths, strict=True)
    ]
    return torch.from_numpy(np.concatenate(pieces))
