"""The playground: an instruction, and one answer or two side by side as they are written.

The page is served on this machine alone. It loads nothing from elsewhere: system fonts, no analytics, no public tunnel.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from flocktune.config.names import EMBEDDED, EMBEDDED_PUBLIC
from flocktune.conversation import Settings, Side, answer
from flocktune.data.sources import read_examples
from flocktune.errors import Problem, UserError

HOST = "127.0.0.1"
GENERAL = (
    "Name three fruits.",
    "Explain in one sentence why the sky is blue.",
    "Write a polite note that a meeting is moved to Friday.",
    "Give three tips for sleeping well.",
)
WAITING = 8
"""Questions that may wait for their turn: one is answered at a time."""

_LAYOUT = "footer {display: none !important} .gradio-container {max-width: 70rem !important; margin: auto}"


def read_prompts(path: Path | None) -> list[str] | None:
    """Example instructions, one a line of a text file; None without a file. Raises UserError."""
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(Problem("--prompts", "a text file, an instruction a line", str(error))) from None
    return [line.strip() for line in lines if line.strip()]


def serve(
    sides: Sequence[Side], settings: Settings, prompts: Sequence[str] | None, port: int, tell: Callable[[str], None]
) -> None:
    """Serve the page until Ctrl-C; ``tell`` gets its address. Raises UserError when the port is taken."""
    with serving(sides, settings, prompts, port) as address:
        tell(address)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            return


@contextmanager
def serving(
    sides: Sequence[Side], settings: Settings, prompts: Sequence[str] | None = None, port: int = 0
) -> Iterator[str]:
    """Inside, the page is at the address given. ``port`` 0 is any free one. Raises UserError when it is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    import gradio
    from fastapi.middleware import Middleware
    from fastapi.middleware.trustedhost import TrustedHostMiddleware

    page = _page(gradio, sides, settings, _own_prompts(sides) if prompts is None else prompts)
    try:
        page.queue(max_size=WAITING, api_open=False).launch(
            server_name=HOST,
            server_port=_free(port),
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            run_history=False,
            mcp_server=False,
            footer_links=[],
            theme=gradio.themes.Base(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            css=_LAYOUT,
            # Else a page from elsewhere, whose name its owner lets point here, could ask in its reader's browser.
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])]},
        )
        yield f"http://{HOST}:{page.server_port}/"
    finally:
        page.close(verbose=False)


def _free(port: int) -> int:
    """``port``, or any free one for 0. Raises UserError when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise UserError(Problem("--port", "a free port", f"{port}: {error}", "Choose another, or 0.")) from None
        return int(probe.getsockname()[1])


def _own_prompts(sides: Sequence[Side]) -> list[str]:
    """Public instructions of the embedded world for its own model, else general ones. Never a client's."""
    if sides[0].tuned.config.model.path != EMBEDDED:
        return list(GENERAL)
    found: dict[str, str] = {}
    for row in read_examples(EMBEDDED_PUBLIC, sides[0].tuned.config.data.columns):
        if not row.context:
            found.setdefault(row.category, row.instruction)
    return list(found.values())[:6]


def _page(gradio: Any, sides: Sequence[Side], settings: Settings, prompts: Sequence[str]) -> Any:
    """Every field of the page, and what happens on its buttons."""
    turns = _Turns(sides)

    def ask(instruction: str, context: str, temperature: float, seed: float) -> Iterator[Any]:
        if not (instruction or "").strip():
            raise gradio.Error("Write an instruction first.", print_exception=False)
        drawn = Settings(settings.max_new_tokens, temperature, int(seed or 0))
        try:
            for texts in turns.answers(instruction.strip(), (context or "").strip(), drawn):
                yield texts[0] if len(texts) == 1 else texts
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    with gradio.Blocks(title="flocktune playground", analytics_enabled=False) as page:
        gradio.Markdown("# " + " and ".join(_escaped(side.name) for side in sides))
        instruction = gradio.Textbox(label="Instruction (Shift+Enter answers it)", value="", lines=2, autofocus=True)
        with gradio.Accordion("Context and settings", open=False):
            context = gradio.Textbox(label="Context: text the instruction is about", value="", lines=3)
            temperature = gradio.Slider(0, 2, value=settings.temperature, step=0.1, label="Temperature (0 is greedy)")
            seed = gradio.Number(label="Seed", value=settings.seed, precision=0, minimum=0)
        with gradio.Row():
            go = gradio.Button("Answer", variant="primary")
            halt = gradio.Button("Stop")
        with gradio.Row():
            answers = [gradio.Textbox(label=side.name, lines=8, interactive=False, min_width=280) for side in sides]
        if prompts:
            gradio.Examples([[prompt] for prompt in prompts], [instruction], label="Examples", cache_examples=False)
        asked = {"fn": ask, "inputs": [instruction, context, temperature, seed], "outputs": answers}
        for happens in (go.click, instruction.submit):
            happens(**asked, api_visibility="private", concurrency_limit=1, concurrency_id="model")
        halt.click(turns.stop, api_visibility="private", queue=False)
    return page


class _Turns:
    """One question is answered at a time. A new one, or Stop, ends the one before, whose reader may have left."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides
        self._lock = threading.Lock()
        self._current: Any = None

    def answers(self, instruction: str, context: str, settings: Settings) -> Iterator[list[str]]:
        """The texts of all sides so far, again and again, until they are whole or it is stopped."""
        mine = self._streamed(instruction, context, settings)
        self._turn_to(mine)
        while True:
            with self._lock:
                texts = next(mine, None) if self._current is mine else None
            if texts is None:
                return
            yield texts

    def stop(self) -> None:
        """End what is being answered."""
        self._turn_to(None)

    def _turn_to(self, stream: Any) -> None:
        with self._lock:
            if self._current is not None:
                self._current.close()  # its adapter is as it was
            self._current = stream

    def _streamed(self, instruction: str, context: str, settings: Settings) -> Iterator[list[str]]:
        texts = ["" for _ in self._sides]
        yield list(texts)
        for place, side in enumerate(self._sides):
            with closing(answer(side, instruction, context, settings)) as pieces:
                for piece in pieces:
                    texts[place] += piece
                    yield list(texts)


def _escaped(name: str) -> str:
    """A folder's name in Markdown, letter by letter."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>()#+-.!|" else letter for letter in name)
