"""A client's half of the method that a recipe names, with all that goes around it; the server's, corrected for drift.

An owner's side of a federation is built here as a simulated client's is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flocktune.algorithms import drift, factors, fedavg, fedbiot
from flocktune.algorithms.local import ClientData
from flocktune.algorithms.personal import with_ditto
from flocktune.algorithms.preferences import Preferences, with_its_reference
from flocktune.algorithms.private_rows import accounted
from flocktune.allocation import ClientRows, client_data
from flocktune.attacks import attacking
from flocktune.config.capabilities import correction_of, personal_of
from flocktune.config.personal import Ditto
from flocktune.config.schema import Dpo, LocalConfig, Named, RunConfig
from flocktune.emulation import Emulated, emulator_settings
from flocktune.interfaces import ClientHalf, ServerHalf
from flocktune.models.lora import Adapter
from flocktune.protection import around_client, largest_value
from flocktune.tensors import group
from flocktune.training import Adjust, Penalty


def clients_side(config: RunConfig, data: ClientRows, half: ClientHalf) -> ClientHalf:
    """The client half as tasks are given to it, with what attackers make of it."""
    return around_client(config, attacking(config, data.attackers, half))


def adapter_client(
    config: RunConfig, adapter: Adapter, data: Callable[[str], ClientData], local: LocalConfig, *, rounds: int
) -> ClientHalf:
    """A client's side of every method whose clients hold the base model, without what the recipe puts around it."""

    def make(penalty: Penalty | None, adjust: Adjust | None) -> ClientHalf:
        weights = config.aggregation.weights
        return fedavg.client_half(adapter, data, local, weights, rounds=rounds, penalty=penalty, adjust=adjust)

    half = drift.corrected_client(correction_of(config), make, bound=largest_value(config))
    personal = personal_of(config)
    if isinstance(personal, Ditto):
        half = with_ditto(half, personal, adapter, data, local, rounds=rounds, trained=drift.methods_own)
    half = accounted(half, lambda client: data(client).private)
    return factors.around_client(factors.sharing_of(config), adapter.parameters, half)


def emulator_client(config: RunConfig, emulated: Emulated, data: ClientRows, secret: bytes | None = None) -> ClientHalf:
    """A client's side of FedBiOT. It needs the bundle and the client's rows; the full model need not exist."""
    preferences = preferences_of(config, emulated.base.adapter, emulated)
    clients = client_data(config, emulated.base.pad_id, data, secret, preferences)

    def make(penalty: Penalty | None, adjust: Adjust | None) -> ClientHalf:
        return fedbiot.client_half(
            emulated.base.adapter,
            emulated.bundle.plan,
            emulated.bundle.digest,
            clients,
            config.local,
            emulator_settings(config),
            config.aggregation.weights,
            rounds=config.rounds,
            penalty=penalty,
            adjust=adjust,
        )

    half = drift.corrected_client(
        correction_of(config), make, partial(group, prefix=fedbiot.ADAPTER), bound=largest_value(config)
    )
    return with_its_reference(accounted(half, lambda client: clients(client).private), preferences)


def corrected(config: RunConfig, half: ServerHalf, data: Callable[[str], ClientData], rows: ClientRows) -> ServerHalf:
    """The server's side of the method, with that of the correction of drift that the recipe asks for."""
    correction = correction_of(config)
    if correction is None:
        return half
    selection = config.scheduling.selection
    able = selection.clients if isinstance(selection, Named) else tuple(rows.clients)
    clients = [data(client) for client in able]
    weights = {
        "examples": sum(client.examples for client in clients),
        "tokens": sum(client.tokens for client in clients),
        "equal": len(clients),
    }
    return drift.corrected_server(correction, half, float(weights[config.aggregation.weights]))


def preferences_of(config: RunConfig, adapter: Adapter, emulated: Emulated | None = None) -> Preferences | None:
    """What clients need for preference tuning, if the recipe asks for it; of an emulator they train some factors."""
    if not isinstance(config.local.loss, Dpo):
        return None
    return Preferences(config.local.loss, adapter, trained_names(adapter, emulated))


def trained_names(adapter: Adapter, emulated: Emulated | None = None) -> list[str]:
    """The factors that clients train."""
    return [name for name in adapter.parameters if emulated is None or emulated.bundle.plan.in_adapter(name)]
