"""What comes out of the frozen part of an emulator, for each row once a round: the trained layers run on it alone.

The layers below the first trained one change nothing in a round, and no dropout is on in them; so a row's hidden
states there are the same in every local epoch, whatever rows it shares a batch with.

R rows of a batch, T tokens, D width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flocktune.config.schema import EmulatorConfig
from flocktune.data.batching import Batch
from flocktune.models.layers import hidden_states, layers_of, starting_from
from flocktune.training import next_token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixCache:
    """Hidden states [length, D] of rows, kept until ``max_bytes`` are used; further rows are computed each time.

    ``where``: in memory (that of the model's device), or on disk, in a file without a name. ``dtype``: None keeps the
    model's own. All states pass through it, kept or not, so that a result does not depend on how many fit.
    """

    def __init__(
        self, model: PreTrainedModel, stack: str, layer: int, settings: EmulatorConfig, *, keep: bool = True
    ) -> None:
        self.model, self.stack, self.layer = model, stack, layer
        self.dtype = torch.bfloat16 if settings.cache_dtype == "bfloat16" else None
        self.left = settings.cache_mb * 2**20 if keep and settings.cache != "none" else 0
        self.kept: dict[int, Tensor] = {}
        self.disk = _Disk(self.left) if self.left and settings.cache == "disk" else None
        self.computed_rows = 0

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """As :func:`next_token_loss`, through the layers from ``layer`` on."""
        with starting_from(model, self.stack, self.layer, self.states(batch)):
            return next_token_loss(model, batch)

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """What goes into ``layer`` for ``batch``, of the shape of its input_ids and D; zeros where rows are padded."""
        ids = batch.input_ids
        rows = list(_rows(batch))
        missing = [place for place, index in enumerate(batch.index) if int(index) not in self.kept]
        fresh = dict(zip(missing, self._compute([rows[place] for place in missing]), strict=True))
        found = [
            fresh[place] if place in fresh else self.kept[int(index)].to(ids.device)
            for place, index in enumerate(batch.index)
        ]
        for place, states in fresh.items():
            self._keep(int(batch.index[place]), states)
        own = [states.to(self.model.dtype) for states in found]
        if batch.position_ids is not None:
            return torch.cat(own).unsqueeze(0)
        return pad_sequence(own, batch_first=True)

    def _compute(self, rows: list[Tensor]) -> list[Tensor]:
        if not rows:
            return []
        self.computed_rows += len(rows)
        ids = pad_sequence(rows, batch_first=True)
        [hidden] = hidden_states(self.model, ids, None, [layers_of(self.model, self.stack)[self.layer]])
        return [states[: len(row)].to(self.dtype or states.dtype) for states, row in zip(hidden, rows, strict=True)]

    def _keep(self, index: int, states: Tensor) -> None:
        size = states.numel() * states.element_size()
        if size <= self.left:
            self.left -= size
            # A copy: a view would hold the whole padded batch.
            self.kept[index] = self.disk.put(states) if self.disk else states.clone()


class _Disk:
    """Tensors one after another in a file that takes only what is written, and is gone when nobody holds it."""

    def __init__(self, max_bytes: int) -> None:
        with tempfile.TemporaryDirectory(prefix="flocktune-") as folder:
            self.bytes = torch.from_file(str(Path(folder) / "states"), shared=True, size=max_bytes, dtype=torch.uint8)
        self.used = 0

    def put(self, states: Tensor) -> Tensor:
        flat = states.contiguous().cpu().reshape(-1).view(torch.uint8)
        place = self.bytes[self.used : self.used + len(flat)]
        place.copy_(flat)
        self.used += len(flat)
        return place.view(states.dtype).view(states.shape)


def _rows(batch: Batch) -> Iterator[Tensor]:
    """The tokens of each row, int64 [length]."""
    lengths = [int(length) for length in batch.lengths]
    if batch.position_ids is not None:
        yield from batch.input_ids[0].split(lengths)
        return
    for row, length in zip(batch.input_ids, lengths, strict=True):
        yield row[:length]
