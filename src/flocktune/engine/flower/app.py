"""The two objects that a Flower app must name. All that they do is elsewhere; owners run neither of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import HttpGrid

from flocktune.engine.flower.grid_link import GridLink
from flocktune.engine.remote import Link

Serve = Callable[[Callable[[Mapping[str, int]], Link], Mapping[str, Any]], None]
"""(connect, settings) -> None, where ``connect`` makes a link of clients' node ids."""


def server_app(serve: Serve) -> ServerApp:
    """``serve`` with Flower's grid."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(lambda nodes: GridLink(cast(HttpGrid, grid), nodes), context.run_config)

    return app


def client_app() -> ClientApp:
    """What a plain SuperNode would run, which no owner has: it says how to join."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(Error(0, "owners join by: flocktune join BUNDLE --data FILE"), reply_to=message)

    return app
