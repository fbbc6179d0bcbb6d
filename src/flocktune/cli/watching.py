"""The verb that follows runs in a browser."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from flocktune.cli.common import app, console, needs_extra, problems


@app.command()
def dashboard(
    folder: Annotated[
        Path, typer.Argument(metavar="RUNS", help="A folder with runs below it, or a single run's.")
    ] = Path("runs"),
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Default: 8780, or a free one; 0: a free one.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to answer at.")] = "127.0.0.1",
    expose: Annotated[
        bool, typer.Option("--expose", help="Let other machines read it too: there is no password.")
    ] = False,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Follow runs in the browser, live: a local page that only reads. Ctrl-C ends it; runs go on."""
    import webbrowser

    from flocktune.errors import Problem, UserError

    for module in ("starlette", "uvicorn"):
        needs_extra(module, "dashboard")
    from flocktune.dashboard.serving import is_loopback, listen, serve, url_of
    from flocktune.dashboard.watching import Watch

    if not folder.is_dir():
        got = "a file" if folder.exists() else "nothing there"
        fix = "Runs are below runs/ where `flocktune run` was started, unless --out said otherwise."
        raise UserError(Problem(str(folder), "a folder with runs", got, fix))
    with listen(host, port) as opened:
        if not is_loopback(opened) and not expose:
            fix = (
                "There is no password: everyone who reaches this machine could read it. If that is meant, add --expose."
            )
            raise UserError(Problem("--host", "an address of this machine alone", host, fix))
        if not is_loopback(opened):
            problems.print(
                "[yellow]warning:[/] everyone who reaches this machine can read these pages.", soft_wrap=True
            )
        url = url_of(opened)
        console.print(f"Following {folder} at {url}", soft_wrap=True, highlight=False)
        console.print("It only reads. Ctrl-C ends it; runs go on.", style="dim")
        if open_browser:
            webbrowser.open(url)
        with suppress(KeyboardInterrupt):  # where a shell ignores it, as in its background, the server just returns
            serve(Watch(folder.resolve(), str(folder)), opened, host)
        console.print("Ended.", style="dim")
