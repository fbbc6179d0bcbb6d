"""The adapters of several clients in one model at once: each acts on its own client's tokens.

A row of one buffer is a client's whole adapter, so that its gradient is one vector to clip and its optimiser has one
tensor to step. The factors of a group of modules (:mod:`flocktune.models.low_rank`) are views of all rows.

Shapes: C clients, P values of an adapter; R rank; G modules of a group; in and out as of a module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flocktune.models.lora import Adapter
from flocktune.models.lora_module import LoraLinear, SharedInput
from flocktune.models.low_rank import Spans, StackedPaths
from flocktune.types import A_SUFFIX, B_SUFFIX, Tensors


class Stack:
    """C clients' factors of the modules of ``adapter`` that have one in ``trained``; others stay as the adapter's own.

    ``values`` and ``sums`` (of gradients), [C, P] in the adapter's dtype: the first ``trained`` values of a row are the
    trained factors. Starts with zeros.
    """

    def __init__(self, adapter: Adapter, trained: Collection[str], clients: int) -> None:
        self.adapter = adapter
        self.names = {layer: name for name, layer in adapter.layers.items()}
        self.groups = _groups_of(adapter, trained)
        like = next(iter(adapter.parameters.values()))
        self.places: dict[str, tuple[int, tuple[int, ...]]] = {}
        blocks = sorted(self._blocks(), key=lambda names: names[0] not in trained)  # stable: the trained ones first
        offset = 0
        for names in blocks:
            for name in names:
                self.places[name] = offset, _stored_shape(name, adapter.parameters[name])
                offset += adapter.parameters[name].numel()
            if names[0] in trained:
                self.trained = offset
        self.values = torch.zeros(clients, offset, dtype=like.dtype, device=like.device)
        self.sums = torch.zeros_like(self.values)
        leaf = torch.zeros((), device=like.device, requires_grad=True)
        self.paths = [self._paths(group, leaf) for group in self.groups]

    def tensors(self, client: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Views of a client's factors, by name, of their usual shapes."""
        return self._views(self.values[client], self.places if names is None else names)

    def parameters(self, client: int, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """The same as parameters, whose gradients are views of the client's row of ``sums``."""
        gradients = self._views(self.sums[client], names)
        found = {name: nn.Parameter(value) for name, value in self.tensors(client, names).items()}
        for name, parameter in found.items():
            parameter.grad = gradients[name]
        return found

    def load(self, client: int, tensors: Tensors) -> None:
        """Set a client's factors, all of them."""
        for name, value in self.tensors(client).items():
            value.copy_(tensors[name])

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, the model's tokens are those of the clients of :meth:`spanning`."""
        for group, paths in zip(self.groups, self.paths, strict=True):
            group.stack = paths
        try:
            yield
        finally:
            for group in self.groups:
                group.stack = None
            self.adapter.forget_inputs()

    def spanning(self, spans: Spans) -> None:
        """Say whose tokens those of the next forward pass are."""
        for paths in self.paths:
            paths.spans = spans

    def _blocks(self) -> Iterator[list[str]]:
        """Factors that must lie side by side: all A's of a group; and every B."""
        for group in self.groups:
            yield [self.names[layer] + A_SUFFIX for layer in group.modules]
        for group in self.groups:
            for layer in group.modules:
                yield [self.names[layer] + B_SUFFIX]

    def _views(self, row: Tensor, names: Mapping[str, object] | Sequence[str]) -> dict[str, Tensor]:
        found = {}
        for name in names:
            offset, shape = self.places[name]
            view = row[offset : offset + shape[0] * shape[1]].view(shape)
            found[name] = view.t() if name.endswith(B_SUFFIX) else view
        return found

    def _paths(self, group: SharedInput, leaf: Tensor) -> StackedPaths:
        def a(buffer: Tensor) -> Tensor:
            offset, (rank, inputs) = self.places[self.names[group.modules[0]] + A_SUFFIX]
            rows = rank * len(group.modules)
            return buffer[:, offset : offset + rows * inputs].view(-1, rows, inputs)

        def b(buffer: Tensor, layer: LoraLinear) -> Tensor:
            offset, (rank, outputs) = self.places[self.names[layer] + B_SUFFIX]
            return buffer[:, offset : offset + rank * outputs].view(-1, rank, outputs)

        factors = [[b(buffer, layer) for layer in group.modules] for buffer in (self.values, self.sums)]
        return StackedPaths(a(self.values), factors[0], a(self.sums), factors[1], leaf)


def stacked_names(adapter: Adapter, trained: Collection[str]) -> set[str]:
    """The factors that clients trained at once have each of their own: those of groups in which one is trained."""
    groups = set(_groups_of(adapter, trained))
    names = [name for name, layer in adapter.layers.items() if layer.beside in groups]
    return {name + end for name in names for end in (A_SUFFIX, B_SUFFIX)}


def _groups_of(adapter: Adapter, trained: Collection[str]) -> list[SharedInput]:
    own = [layer.beside for name, layer in adapter.layers.items() if {name + A_SUFFIX, name + B_SUFFIX} & set(trained)]
    return list(dict.fromkeys(own))


def _stored_shape(name: str, value: Tensor) -> tuple[int, ...]:
    """B lies transposed, as the module's own does."""
    return tuple(value.t().shape) if name.endswith(B_SUFFIX) else tuple(value.shape)


@torch.no_grad()
def mixes_clients(adapter: Adapter) -> bool:
    """Whether tokens of one client see another one's adapter, as they may where a model sends them to experts.

    Two rows of random tokens go through the model with an adapter of their own, together and apart. What is mixed
    differs as much as other tokens would; in bfloat16, with adapters as large as these, rounding alone is a third of
    that after 32 layers.
    """
    model = adapter.model
    device = next(iter(adapter.parameters.values())).device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (2, 8), generator=generator).to(device)
    stack = Stack(adapter, adapter.parameters, 2)
    stack.values.copy_(torch.randn(stack.values.shape, generator=generator) / 8)
    before, apart = adapter.tensors(), []
    for client in range(2):
        adapter.put(stack.tensors(client))
        apart.append(model(input_ids=ids[client : client + 1], use_cache=False).logits)
    adapter.put(before)
    stack.spanning(Spans((0, 1), (8, 8)))
    try:
        with stack.attached():
            together = model(input_ids=ids, use_cache=False).logits
    except ValueError:  # a module that got other tokens than all
        return True
    expected = torch.cat(apart)
    most = 1e-2 if expected.dtype.itemsize >= 4 else 0.5
    return bool((together - expected).abs().max() > most * expected.abs().max())
