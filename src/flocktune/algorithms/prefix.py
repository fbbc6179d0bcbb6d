"""What comes out of the frozen part of an emulator, for each row once a round: the trained layers run on it alone.

The layers below the first trained one change nothing in a round, and no dropout is on in them; so a row's hidden
states there are the same in every local epoch, whatever rows it shares a batch with.

R rows (sequences) of a batch, T tokens, D width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flocktune.config.schema import EmulatorConfig
from flocktune.data.batching import Batch
from flocktune.models.layers import hidden_states, layers_of, starting_from
from flocktune.models.row_attention import rows_apart
from flocktune.training import Loss, next_token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixCache:
    """Hidden states [length, D] of rows, kept up to ``settings.cache_mb``; further ones are computed each time.

    They are kept in memory (that of the model's device), or on disk, in a file without a name. All states pass through
    ``settings.cache_dtype``, kept or not: how many fit changes a result only by the rounding of matrix products, whose
    order of sums depends on which rows are computed together. ``keep``: whether any row will come again. ``above``:
    the loss, which may take more than one forward pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stack: str,
        layer: int,
        settings: EmulatorConfig,
        *,
        keep: bool = True,
        above: Loss = next_token_loss,
    ) -> None:
        self.model, self.stack, self.layer, self.above = model, stack, layer, above
        self.dtype = torch.bfloat16 if settings.cache_dtype == "bfloat16" else None
        keep = keep and layer > 0  # below the first layer there is only the embedding
        self.left = settings.cache_mb * 2**20 if keep and settings.cache != "none" else 0
        self.kept: dict[int, Callable[[], Tensor]] = {}
        # Without a name: it is gone when nobody holds it.
        on_disk = self.left and settings.cache == "disk"
        self.file = tempfile.TemporaryFile(prefix="flocktune-") if on_disk else None  # noqa: SIM115
        self.computed_rows = 0

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """As ``above``, through the layers from ``layer`` on."""
        with self.given(batch):
            return self.above(model, batch)

    @contextmanager
    def given(self, batch: Batch) -> Iterator[None]:
        """Inside, a forward pass of ``batch`` begins with ``layer``."""
        with starting_from(self.model, self.stack, self.layer, self.states(batch)):
            yield

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """What goes into ``layer`` for ``batch``, of the shape of its input_ids and D; zeros where rows are padded."""
        ids = batch.input_ids
        rows = list(_rows(batch))
        missing = [place for place, index in enumerate(batch.index) if int(index) not in self.kept]
        packed = batch.position_ids is not None
        fresh = dict(zip(missing, self._compute([rows[place] for place in missing], packed=packed), strict=True))
        found = [
            fresh[place] if place in fresh else self.kept[int(index)]().to(ids.device)
            for place, index in enumerate(batch.index)
        ]
        for place, states in fresh.items():
            self._keep(int(batch.index[place]), states)
        own = [states.to(self.model.dtype) for states in found]
        if packed:
            return torch.cat(own).unsqueeze(0)
        return pad_sequence(own, batch_first=True)

    def _compute(self, rows: list[Tensor], *, packed: bool) -> list[Tensor]:
        if not rows:
            return []
        self.computed_rows += len(rows)
        lengths = [len(row) for row in rows]
        wanted = [layers_of(self.model, self.stack)[self.layer]]
        if packed:
            places = torch.arange(max(lengths), device=rows[0].device)
            positions = torch.cat([places[:length] for length in lengths]).unsqueeze(0)
            with rows_apart(lengths, places.device):
                [hidden] = hidden_states(self.model, torch.cat(rows).unsqueeze(0), positions, wanted)
            states = hidden[0].split(lengths)
        else:
            [hidden] = hidden_states(self.model, pad_sequence(rows, batch_first=True), None, wanted)
            states = [state[:length] for state, length in zip(hidden, lengths, strict=True)]
        return [state.to(self.dtype or state.dtype) for state in states]

    def _keep(self, index: int, states: Tensor) -> None:
        size = states.numel() * states.element_size()
        if size <= self.left:
            self.left -= size
            self.kept[index] = _on_disk(self.file, states) if self.file else _in_memory(states)


def _in_memory(states: Tensor) -> Callable[[], Tensor]:
    copy = states.clone()  # a view would hold the whole batch
    return lambda: copy


def _on_disk(file: BinaryIO, states: Tensor) -> Callable[[], Tensor]:
    """Append ``states`` to ``file``. Raises OSError, as on a full disk."""
    flat = states.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    offset = file.seek(0, os.SEEK_END)
    file.write(flat.data)
    file.flush()

    def read() -> Tensor:
        blob = bytearray(os.pread(file.fileno(), len(flat), offset))
        return torch.frombuffer(blob, dtype=states.dtype).view(states.shape)

    return read


def _rows(batch: Batch) -> Iterator[Tensor]:
    """The tokens of each row, int64 [length]."""
    lengths = [int(length) for length in batch.lengths]
    if batch.position_ids is not None:
        yield from batch.input_ids[0].split(lengths)
        return
    for row, length in zip(batch.input_ids, lengths, strict=True):
        yield row[:length]
