"""An estimate for the terminal."""

from __future__ import annotations

from rich.table import Table

from flocktune.estimate import Estimate
from flocktune.report.tables import format_bytes


def estimate_table(costs: Estimate) -> Table:
    """The estimate for a terminal."""
    smallest, middle, largest = costs.rows_per_client
    most = "at most " if costs.up_at_most else ""
    rows = {
        "base model": f"{costs.base_parameters:,} parameters, frozen",
        "trained": f"{costs.trainable_parameters:,} parameters "
        f"({100 * costs.trainable_parameters / costs.base_parameters:.2f} %)"
        + (", in each round one of an adapter's two factors" if costs.alternating else ""),
        "clients": f"{costs.clients}, {costs.cohort} a round"
        + (f", {costs.at_once} trained at once" if costs.at_once > 1 else ""),
        "rows": f"{costs.train_rows:,} to train on, {costs.test_rows:,} held out"
        + (f", {costs.untrainable_rows:,} with nothing to learn from" if costs.untrainable_rows else ""),
        "rows a client": f"{smallest:,} to {largest:,}, median {middle:,.0f}",
        "a round, down": f"{format_bytes(costs.round_bytes_down)} "
        f"({format_bytes(costs.round_bytes_down / costs.cohort)} a client)",
        "a round, up": most + format_bytes(costs.round_bytes_up),
        "in all": f"{costs.steps_total:,} optimiser steps, {'at most' if costs.assumed else 'about'} "
        f"{costs.tokens_total:,} tokens, {most}{format_bytes(costs.bytes_in_all)} both ways",
        "a client": f"about {format_bytes(costs.client_memory_bytes)} of memory beside libraries, "
        f"{format_bytes(costs.client_weight_bytes)} of it weights",
        "memory": f"about {format_bytes(costs.memory_bytes)} beside libraries (an estimate)"
        + (", layers computed again in the backward pass" if costs.recompute else ""),
    }
    if costs.emulator:
        one = costs.emulator
        share = 100 * one.parameters / costs.base_parameters
        rows["emulator"] = (
            f"{one.held_layers} of {one.full_layers} layers, {share:.0f} % of the parameters; "
            f"{format_bytes(one.bytes)} once to each client"
        )
    if costs.privacy:
        rows["privacy"] = costs.privacy
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in rows.items():
        table.add_row(name, text)
    return table
