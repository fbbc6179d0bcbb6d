"""An aggregation rule and a selection of your own, in flocktune's round loop: the median, of the clients at hand."""

from dataclasses import replace
from pathlib import Path

import torch

import flocktune
from flocktune.assemble import federation
from flocktune.engine.in_process import InProcess
from flocktune.scheduling import Cohort


def median(updates, message):
    """Updates, and the message that they are changes of -> one update."""
    held = list(updates)
    delta = {name: torch.stack([one.delta[name] for one in held]).median(dim=0).values for name in held[0].delta}
    return flocktune.Update(delta, weight=1.0, clients=len(held))


def three_in_turn(round):
    """The clients that are asked, how many of their updates count, and how many there must be."""
    return Cohort(asked=clients[3 * round : 3 * round + 3], wanted=3, quorum=2)


config = flocktune.parse_recipe("local: {steps: 2}\nallocation: {kind: iid, clients: 6}\ndata: {template: short}")
fed = federation(config)
clients = tuple(fed.data.clients)
server = replace(fed.server, combine=median)
state = server.init(fed.start)
state = flocktune.run_rounds(server, InProcess(fed.client), three_in_turn, state, rounds=2, kind=fed.kind, seed=0)
flocktune.export_peft(server.result(state), config.lora, fed.base.model, Path("median-adapter"), "embedded")
