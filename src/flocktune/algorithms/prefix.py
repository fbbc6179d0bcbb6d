"""What comes out of the frozen part of an emulator, for each row once a round: the trained layers run on it alone.

The layers below the first trained one change nothing in a round, and no dropout is on in them; so a row's hidden
states there are the same in every local epoch, whatever rows it shares a batch with.

R rows (sequences) of a batch, T tokens, D width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from flocktune.config.schema import EmulatorConfig
from flocktune.data.batching import Batch
from flocktune.data.merging import token_rows
from flocktune.gathering import gathered
from flocktune.models.layers import hidden_states, layers_of, starting_from
from flocktune.models.row_attention import rows_apart
from flocktune.training import Loss, next_token_loss, token_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PrefixCache:
    """Hidden states [length, D] of rows, kept up to ``settings.cache_mb`` of all clients who are at work at once;
    further ones are computed each time.

    They are kept in memory, that of the model's device or the host's, or on disk, in a file without a name. All states
    pass through ``settings.cache_dtype``, kept or not: how many fit changes a result only by the rounding of matrix
    products, whose order of sums depends on which rows are computed together. ``keep``: whether any row will come
    again. ``above``: the loss, which may take more than one forward pass.
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
        turn = gathered()
        share = settings.cache_mb * 2**20 // (turn.clients if turn else 1)
        self.left = share if keep and settings.cache != "none" else 0
        self.kept: dict[int, Callable[[], Tensor]] = {}
        # Without a name: it is gone when nobody holds it.
        on_disk = self.left and settings.cache == "disk"
        self.file = tempfile.TemporaryFile(prefix="flocktune-") if on_disk else None  # noqa: SIM115
        self.on_host = settings.cache == "host"
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

    def token_losses(self, batch: Batch, parts: Sequence[tuple[PrefixCache, Batch]]) -> Tensor:
        """Nats at each label [N] of ``batch``, which has the rows of several clients' batches, one after another."""
        with starting_from(self.model, self.stack, self.layer, laid_out(states_of(parts), batch)):
            return token_losses(self.model, batch)

    def states(self, batch: Batch) -> Tensor:
        """What goes into ``layer`` for ``batch``, of the shape of its input_ids and D; zeros where rows are padded."""
        return laid_out(states_of([(self, batch)]), batch)

    def compute(self, rows: list[Tensor], *, packed: bool) -> list[Tensor]:
        """Of rows of tokens, what goes into ``layer``, [length, D] each, computed in one forward pass."""
        if not rows:
            return []
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

    def keep(self, index: int, states: Tensor) -> None:
        """Keep a row's states, if they fit."""
        self.computed_rows += 1
        size = states.numel() * states.element_size()
        if size <= self.left:
            self.left -= size
            self.kept[index] = _on_disk(self.file, states) if self.file else _in_memory(states, self.on_host)


@torch.no_grad()
def states_of(parts: Sequence[tuple[PrefixCache, Batch]]) -> list[Tensor]:
    """States [length, D] of every row of some batches, from each one's cache, or computed, all at once, and kept there.

    The caches are of one model as it is now.
    """
    first, batch = parts[0]
    missing = {
        (part, place): row
        for part, (cache, own) in enumerate(parts)
        for place, (index, row) in enumerate(zip(own.index, token_rows(own), strict=True))
        if int(index) not in cache.kept
    }
    computed = first.compute(list(missing.values()), packed=batch.position_ids is not None)
    fresh = dict(zip(missing, computed, strict=True))
    found: list[Tensor] = []
    for part, (cache, own) in enumerate(parts):
        for place, index in enumerate(own.index):
            known = fresh.get((part, place))
            states = cache.kept[int(index)]() if known is None else known
            found.append(states.to(own.input_ids.device, first.model.dtype, non_blocking=True))
    for (part, place), states in fresh.items():
        cache, own = parts[part]
        cache.keep(int(own.index[place]), states)
    return found


def laid_out(rows: Sequence[Tensor], batch: Batch) -> Tensor:
    """Rows [length, D] as they lie in ``batch``: end to end [1, T, D], or padded with zeros [B, T, D]."""
    if batch.position_ids is not None:
        return torch.cat(list(rows)).unsqueeze(0)
    return pad_sequence(list(rows), batch_first=True)


def _in_memory(states: Tensor, on_host: bool) -> Callable[[], Tensor]:
    if on_host and states.is_cuda:
        pinned = torch.empty(states.shape, dtype=states.dtype, pin_memory=True).copy_(states)
        return lambda: pinned
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
