"""Whether training fits into a device's memory as the recipe has it, or layers are computed again in the backward pass.

Each machine decides for itself: gradient checkpointing changes memory and time, and no result.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flocktune.config.schema import RunConfig
from flocktune.data.encoding import Encoded
from flocktune.emulation import alignment_settings, emulator_lora, emulator_settings, every_token, public_rows
from flocktune.footprint import largest_batch, recomputes, training_bytes
from flocktune.models.bundle import Bundle
from flocktune.models.load import describe, load_skeleton, pick_device


def fitted(config: RunConfig, rows: Encoded, bundle: Bundle | None = None, *, aligns: bool = False) -> RunConfig:
    """``config`` with ``model.gradient_checkpointing`` true or false. Raises UserError.

    ``rows``: of all clients that train here, perhaps none. ``bundle``: FedBiOT's emulator, which they hold in place of
    the model. ``aligns``: the full model is here as well, and trains the emulator on the public rows.
    """
    device = pick_device(config.runtime.device)

    def needed() -> int:
        batches = [(rows, config.local.batch_size)] if len(rows) else []
        weights = describe(config.model).base_bytes if bundle is None or aligns else 0
        held, lora = config.model, config.lora
        if bundle is not None:
            quantization = emulator_settings(config).quantization
            held = replace(held, path=str(bundle.folder), quantization=quantization)
            lora = emulator_lora(lora, bundle)
            weights += describe(held).base_bytes
        if aligns:
            batches.append((every_token(public_rows(config).encoded), alignment_settings(config).batch_size))
        shapes = [largest_batch(one, np.arange(len(one)), size, config.data.batching) for one, size in batches]
        shape = max(shapes, key=lambda one: one.tokens)

        def trained(name: str) -> bool:
            return bundle is None or aligns or bundle.plan.in_adapter(name)

        return weights + training_bytes(load_skeleton(held), lora, trained, config.local, shape, device)

    on = (len(rows) > 0 or aligns) and recomputes(config.model, needed, device)
    return replace(config, model=replace(config.model, gradient_checkpointing=on))
