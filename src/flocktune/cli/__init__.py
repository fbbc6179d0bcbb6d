"""The command line. Verbs are thin: they read arguments, call the library, show what came out.

Heavy libraries are imported inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flocktune.cli.common import app, escaped, problems

# In --help's order.
from flocktune.cli import preparing, running, evaluating, results, judging, trying, watching  # noqa: F401  # isort: skip
from flocktune.cli import federation, federating, joining, doctor  # noqa: F401  # isort: skip


@contextmanager
def _polite_errors() -> Iterator[None]:
    """A user's mistake: every problem on stderr, exit code 2, no traceback. A failed round: exit code 1."""
    import click

    from flocktune.errors import FlocktuneError, UserError, reason

    try:
        yield
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        raise SystemExit(2) from None
    except click.ClickException as error:
        from flocktune.cli.mistakes import in_our_voice

        text = escaped(str(in_our_voice(error)))
        problems.print(f"[red]error:[/] {text}", soft_wrap=True, highlight=False)
        raise SystemExit(error.exit_code) from None
    except click.Abort:
        raise SystemExit(130) from None
    except UserError as error:
        for problem in error.problems:
            problems.print(f"[red]error:[/] {escaped(str(problem))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None
    except FlocktuneError as error:
        problems.print(f"[red]failed:[/] {escaped(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    except OSError as error:
        where = error.filename or "disk"
        text = escaped(f"{where}: {reason(error)}. What was saved before stands.")
        problems.print(f"[red]failed:[/] {text}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None


def main() -> None:
    """Entry point of ``flocktune``."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # oneDNN keeps a compiled kernel, with buffers, per shape; batches have hundreds of shapes (1,024 kept by default).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    with _polite_errors():
        code = app(prog_name="flocktune", standalone_mode=False)  # errors come here, to be said in one voice
    if isinstance(code, int) and code:
        raise SystemExit(code)
