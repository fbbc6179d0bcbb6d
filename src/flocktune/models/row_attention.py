"""Attention among packed rows that costs what the rows cost: the sum of their lengths' squares.

Packed rows lie end to end in one row. Transformers tells them apart by a mask [T, T], and T^2 is what its attention
then costs, most of it masked. Here something small stands where the mask would, :class:`Rows`, and each row attends to
itself alone: on a CPU row by row, on a GPU in one kernel for rows of any lengths.

It comes in through transformers' own registers of masks and of attention, so every model that asks them both for its
attention can use it; :func:`attend_by_rows` finds that out. Whatever is more than causal within a row (windows shorter
than a row, two-sided attention, masks of a model's own) stays with transformers, layer by layer.

R rows of T tokens in all, H heads (K of keys and values), D their width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from flocktune.data.batching import Batch

NAME = "flocktune_rows"
"""What transformers calls it. Without packed rows it is ``sdpa``."""

BEYOND_CAUSAL = ("softcap", "s_aux", "position_bias")
"""What models ask of attention beyond a causal softmax, and their names for it."""

BETTER_IN_FLOAT32 = 256
"""Rows of bfloat16 up to so many tokens attend in float32 on a CPU: torch's kernel of bfloat16 takes 1.3 to 3 times as
long for them, casts counted. Rows of 512 are better off in bfloat16."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows, in place of a mask: layers take it as an argument, also when they are computed again.

    lengths: of the rows, T in all;    bounds: where they begin and end, int32 [R + 1], on the model's device
    """

    lengths: tuple[int, ...]
    bounds: Tensor


_open: ContextVar[Rows | None] = ContextVar("rows", default=None)


@contextmanager
def rows_of(batch: Batch) -> Iterator[None]:
    """Inside, forward passes of ``batch`` keep its rows apart at the cost of the rows, in models that can.

    Padded batches, and other models, are computed as ever. The backward pass may come later.
    """
    if batch.position_ids is None:
        yield
    else:
        with rows_apart(batch.lengths.tolist(), batch.input_ids.device):
            yield


@contextmanager
def rows_apart(lengths: Sequence[int], device: torch.device) -> Iterator[None]:
    """As :func:`rows_of`, for packed rows of these lengths. Nothing waits for the device."""
    bounds = torch.tensor((0, *lengths)).cumsum(0, dtype=torch.int32)
    token = _open.set(Rows(tuple(lengths), bounds.to(device, non_blocking=True)))
    try:
        yield
    finally:
        _open.reset(token)


def attend_by_rows(model: PreTrainedModel) -> bool:
    """Let ``model`` attend row by row from now on, if packed rows then have the logits that padded ones have.

    Returns whether; a model for which not is as before.
    """
    before = model.config._attn_implementation
    if before == NAME:
        return True
    if before != "sdpa":
        return False
    try:
        model.set_attn_implementation(NAME)
        exact = model.config._attn_implementation == NAME and _exact(model)
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError):
        # It does more with a mask than hand it on, or transformers asks for masks in other words.
        exact = False
    if not exact:
        model.set_attn_implementation(before)
    return exact


@torch.no_grad()
def _exact(model: PreTrainedModel) -> bool:
    """Whether random tokens, packed, have the logits that they have padded, to half the digits of the dtype."""
    generator, lengths = torch.Generator().manual_seed(0), (7, 1, 12)
    vocabulary = model.config.get_text_config().vocab_size
    rows = [torch.randint(vocabulary, (length,), generator=generator).to(model.device) for length in lengths]
    places = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
    padded = model(input_ids=pad_sequence(rows, batch_first=True), use_cache=False).logits
    with rows_apart(lengths, model.device):
        packed = model(input_ids=torch.cat(rows)[None], position_ids=places, use_cache=False).logits[0]
    wanted = torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])
    return bool((packed - wanted).abs().max() <= torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max())


def _mask(**known: Any) -> Any:
    """What transformers hands to a model's layers as their mask: its own, or the rows that are open."""
    rows = _open.get()
    if rows is None or not _only_causal(rows, known):
        return sdpa_mask(**known)
    return rows


def _only_causal(rows: Rows, known: dict[str, Any]) -> bool:
    """Whether a token is to see all that lies before it in its row, and nothing else."""
    tokens, window = sum(rows.lengths), known.get("local_size")
    return (
        (known["batch_size"], known["q_length"], known["kv_length"]) == (1, tokens, tokens)
        and (window is None or max(rows.lengths) <= window)
        and not known.get("use_vmap")  # a mask of the model's own
        and "allow_is_bidirectional_skip" not in known
    )


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention: [1, H, T, D], keys and values [1, K, T, D] -> [1, T, H, D]; or as its own ``sdpa``."""
    if not isinstance(attention_mask, Rows):
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **asked}
        if attention_mask is None and _better_in_float32(query, key.shape[2]):
            out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), None, **options)
            return out.to(query.dtype), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if is_causal is False or any(asked.get(name) is not None for name in BEYOND_CAUSAL):
        raise ValueError(f"{type(module).__name__} asks for more than causal attention within rows")
    if _one_kernel(query, value) and not dropout:
        return _varlen(query, key, value, attention_mask, scaling), None
    return _row_by_row(query, key, value, attention_mask.lengths, dropout, scaling), None


def _row_by_row(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float, scaling: float | None
) -> Tensor:
    """Views of the rows, one after another: on CPUs no gathering of rows of like length was faster."""
    if _better_in_float32(query, max(lengths)):
        return _row_by_row(query.float(), key.float(), value.float(), lengths, dropout, scaling).to(query.dtype)
    attend = functools.partial(
        F.scaled_dot_product_attention,
        is_causal=True,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = map(attend, *(x.split(lengths, dim=2) for x in (query, key, value)))
    return torch.cat([row.transpose(1, 2) for row in out], dim=1)


def _better_in_float32(query: Tensor, longest: int) -> bool:
    """Whether rows of at most so many tokens had better be cast; a token by itself, as in generation, had not."""
    short = query.shape[2] > 1 and longest <= BETTER_IN_FLOAT32
    return short and query.device.type == "cpu" and query.dtype == torch.bfloat16


def _one_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention for rows of any lengths is there for these."""
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and width == value.shape[-1] <= 256
        and width % 8 == 0
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scaling: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeats = query.shape[1] // key.shape[1]  # torch 2.11's has as many heads of keys as of queries
    q, k, v = (x.transpose(1, 2)[0] for x in (query, key, value))
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    longest = max(rows.lengths)
    out = varlen_attn(q, k, v, rows.bounds, rows.bounds, longest, longest, scale=scaling, window_size=(-1, 0))
    return out.unsqueeze(0)  # type: ignore[union-attr]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
