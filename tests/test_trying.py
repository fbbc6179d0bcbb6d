"""Trying a result by hand: two answers from one base model, the chat in the terminal, the page in a browser."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from browser import PHONE, WIDE, Opener, browser, open_page  # noqa: F401
from conftest import World
from flocktune import api
from flocktune.cli import talking
from flocktune.config.load import load_recipe
from flocktune.conversation import Settings, Side, answer, open_sides
from flocktune.data.examples import Message
from flocktune.errors import UserError
from flocktune.models.lora_module import LoraLinear
from flocktune.results import answer_stream, open_result

QUICK = ["rounds=1", "local.steps=4", "local.lr=0.02", "evaluation.generate=false"]
SHORT = Settings(max_new_tokens=6)


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two results on one base, with adapters of differing rank on differing modules."""
    folder = tmp_path_factory.mktemp("runs")
    api.run(load_recipe(world.recipe, QUICK), folder / "one")
    api.run(load_recipe(world.recipe, [*QUICK, "lora.rank=3", "lora.targets=[v_proj,up_proj]"]), folder / "two")
    return folder / "one", folder / "two"


def said(side: Side, instruction: str = "Which colour?", settings: Settings = SHORT) -> str:
    return "".join(answer(side, instruction, "", settings))


def alone(run: Path) -> str:
    """A result's answer when nothing else is open."""
    return "".join(answer_stream(open_result(run), "Which colour?", max_new_tokens=6))


# --- who answers ------------------------------------------------------------------------------------


def test_two_results_and_their_base_answer_as_they_do_alone_on_one_model(runs: tuple[Path, Path]) -> None:
    expected = [alone(run) for run in runs]
    one, two = open_sides(runs[0], str(runs[1]))
    assert one.tuned.base.model is two.tuned.base.model
    for _ in range(2):
        assert [said(one), said(two)] == expected
        assert [said(two), said(one)] == expected[::-1]
    again, base = open_sides(runs[0], "base")
    assert again.tuned is base.tuned
    plain = said(base)
    assert [said(again), said(base)] == [expected[0], plain]
    assert len({*expected, plain}) == 3, "three models that answer alike would prove nothing"
    wrapped = [module for module in two.tuned.base.model.modules() if isinstance(module, LoraLinear)]
    assert len(wrapped) == 4, "of two adapters one is attached"


def test_a_model_that_two_share_is_not_taken_for_one_alone(runs: tuple[Path, Path]) -> None:
    expected = alone(runs[0])
    _, two = open_sides(runs[0], str(runs[1]))
    said(two)
    assert alone(runs[0]) == expected


def test_an_answer_that_is_left_early_leaves_the_adapter_as_it_was(runs: tuple[Path, Path]) -> None:
    tuned, base = open_sides(runs[0], "base")
    expected = said(tuned)
    stream = answer(base, "Which colour?", "", SHORT)
    next(stream)
    stream.close()
    assert said(tuned) == expected


def test_sides_are_told_apart_and_what_is_none_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    assert [side.name for side in open_sides(runs[0], "base")] == ["one", "base model"]
    assert [side.name for side in open_sides(runs[0], str(runs[1]))] == ["one", "two"]
    assert len({side.name for side in open_sides(runs[0], str(runs[0] / "adapter"))}) == 2
    with pytest.raises(UserError, match="--against"):
        open_sides(runs[0], str(tmp_path / "nothing"))


# --- the terminal -----------------------------------------------------------------------------------


def test_a_conversation_by_pipe(cli, runs: tuple[Path, Path], monkeypatch) -> None:
    lines = ["Which colour?", "", "/help", "/context Red.", "Which?", "/context", "/temperature hot"]
    lines += ["/temperature 1.5", "/again", "/no", "/quit", "x"]
    script = "\n".join(lines)
    monkeypatch.setattr(sys, "stdin", io.StringIO(script))
    found = cli("chat", runs[0], "--max-new-tokens", "6")
    assert found.code == 0, found.all
    assert alone(runs[0]) in found.out
    for words in (
        "> Which colour?",
        "/follow",
        "Context set.",
        "No context.",
        "got 'hot'",
        "Temperature 1.5.",
        "/no is",
    ):
        assert words in found.out
    assert "> x" not in found.out, "after /quit nothing is read"


@pytest.mark.parametrize("width", [79, 80])
def test_two_answers_stand_in_columns_where_there_is_room(runs: tuple[Path, Path], monkeypatch, width: int) -> None:
    sides = open_sides(runs[0], "base")
    text = converse(sides, ["Which colour?"], monkeypatch, width)
    [names] = [line for line in text.splitlines() if line.startswith("one ") and "help" not in line]
    assert ("base model" in names) == (width >= 80)
    for side in sides:
        assert said(side).split()[0] in text


def test_ctrl_c_stops_an_answer_and_not_the_program(runs: tuple[Path, Path], monkeypatch) -> None:
    sides = open_sides(runs[0], "base")
    real, calls = answer, []

    def interrupted(side, *arguments):
        calls.append(side.name)
        for piece in real(side, *arguments):
            yield piece
            if len(calls) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(talking, "answer", interrupted)
    text = converse(sides, ["Which colour?", KeyboardInterrupt, "And then?"], monkeypatch)
    assert "Stopped." in text
    assert "/quit or Ctrl-D ends." in text
    assert calls == ["one", "one", "base model"], "the second question was answered by both"


def test_answers_follow_what_was_said_only_when_asked_to(runs: tuple[Path, Path], monkeypatch) -> None:
    seen: list[Sequence[Message]] = []

    def heard(side, instruction, context, settings, before):
        seen.append(list(before))
        yield f"answer {settings.seed}"

    monkeypatch.setattr(talking, "answer", heard)
    lines = ["/again", "A", "B", "/follow", "C", "/again", "D", "/follow", "E"]
    text = converse(open_sides(runs[0]), lines, monkeypatch)
    assert "Nothing was asked yet." in text
    turns = [[message.content for message in before] for before in seen]
    first = ["A", "answer 0", "B", "answer 0"]
    assert turns == [[], [], first, first, [*first, "C", "answer 1"], []]


def test_an_error_in_one_answer_does_not_end_the_conversation(runs: tuple[Path, Path], monkeypatch) -> None:
    text = converse(open_sides(runs[0]), ["A", "/temperature 1"], monkeypatch, settings=Settings(max_new_tokens=999))
    assert "error:" in text
    assert "Temperature 1." in text


def test_what_a_model_writes_does_not_steer_the_terminal() -> None:
    assert talking.printable("a\x1b[2Jb\r\tc\nd\x07\u202e日") == "a[2Jb\tc\nd日"


def test_an_answer_without_a_word_is_said_to_be_one(runs: tuple[Path, Path], monkeypatch) -> None:
    monkeypatch.setattr(talking, "answer", lambda *_: (piece for piece in ()))
    assert "(nothing)" in converse(open_sides(runs[0]), ["Which colour?"], monkeypatch)


@pytest.mark.parametrize(("terminal", "seen"), [(True, "a[2Jb"), (False, "a\x1b[2Jb")])
def test_one_answer_steers_no_terminal_and_is_whole_in_a_script(
    runs: tuple[Path, Path], monkeypatch, terminal: bool, seen: str
) -> None:
    from flocktune.cli import results as verbs

    console = Console(file=io.StringIO(), force_terminal=terminal)
    monkeypatch.setattr(verbs, "console", console)
    monkeypatch.setattr("flocktune.results.answer_stream", lambda *_: iter(["a\x1b[2J", "b"]))
    verbs.generate(runs[0], prompt="x")
    assert console.file.getvalue().strip() == seen


def converse(sides, lines, monkeypatch, width: int = 80, settings: Settings = SHORT) -> str:
    """What a person at a terminal sees who types ``lines``, then Ctrl-D."""
    waiting = iter([*lines, EOFError])

    def typed(self, prompt: str) -> str:
        line = next(waiting)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr(Console, "input", typed)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    seen = io.StringIO()
    talking.converse(sides, settings, Console(file=seen, width=width))
    return seen.getvalue()


# --- the page ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_address(runs: tuple[Path, Path]) -> Iterator[tuple[str, tuple[Side, ...]]]:
    from flocktune.playground.page import serving

    sides = open_sides(runs[0], "base")
    with serving(sides, SHORT, ["Which colour?", "<b>Which</b> size?"]) as address:
        yield address, sides


@pytest.mark.needs_chromium
@pytest.mark.parametrize(("scheme", "size"), [("light", WIDE), ("dark", PHONE)])
def test_the_page_answers_twice_and_asks_nothing_of_the_outside(page_address, open_page: Opener, scheme, size) -> None:  # noqa: F811
    address, sides = page_address
    expected = {side.name: said(side) for side in sides}  # before the page asks: both have one model
    page = open_page(address, size, scheme)
    page.get_by_label("Instruction").fill("Which colour?")
    page.get_by_role("button", name="Answer", exact=True).click()
    for name, text in expected.items():
        page.wait_for_function(
            "([name, text]) => [...document.querySelectorAll('label')].some("
            "label => label.innerText.trim() == name && label.querySelector('textarea')?.value == text)",
            arg=[name, text],
        )
    fonts = page.evaluate("[...document.fonts].filter(font => font.status != 'unloaded').length")
    assert fonts == 0, "system fonts alone"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.get_by_text("<b>Which</b> size?").click()
    page.wait_for_function("document.querySelector('textarea').value == '<b>Which</b> size?'")


def test_the_page_is_this_machines_alone_and_shows_no_files(page_address) -> None:
    import socket
    from urllib.error import HTTPError
    from urllib.parse import urlsplit
    from urllib.request import Request, urlopen

    address, _ = page_address
    assert urlsplit(address).hostname == "127.0.0.1"
    with socket.socket() as outside:
        outside.settimeout(2)
        # Every address in 127/8 is this machine's; a server on all interfaces would answer on this one too.
        assert outside.connect_ex(("127.0.0.2", urlsplit(address).port)) != 0
    for path in ("/etc/hostname", "pyproject.toml", "../README.md"):
        with pytest.raises(HTTPError, match=r"40[34]"):
            urlopen(f"{address}gradio_api/file={path}")
    with pytest.raises(HTTPError, match="400"):  # a name that its owner lets point here
        urlopen(Request(address, headers={"Host": "evil.example"}))
    told = urlopen(f"{address}config").read().decode()
    assert '"analytics_enabled":false' in told.replace(" ", "")
    assert '"share_url":null' in told.replace(" ", "") or "share_url" not in told


def test_a_question_ends_the_one_before_and_stop_ends_it_too(runs: tuple[Path, Path]) -> None:
    from flocktune.playground.page import _Turns

    sides = open_sides(runs[0], "base")
    expected = [said(side) for side in sides]
    turns = _Turns(sides)
    left = turns.answers("Which colour?", "", SHORT)
    while not next(left)[1]:  # until the second, whose adapter is off, has begun
        pass
    assert list(turns.answers("Which colour?", "", SHORT))[-1] == expected
    assert list(left) == [], "its reader gets no more"
    again = turns.answers("Which colour?", "", SHORT)
    while not next(again)[1]:
        pass
    turns.stop()
    assert list(again) == []
    assert [said(side) for side in sides] == expected, "the adapter is on again"


def test_a_port_that_is_taken_and_a_missing_extra_are_said(
    cli, runs, page_address, tmp_path: Path, monkeypatch
) -> None:
    port = page_address[0].rstrip("/").rpartition(":")[2]
    taken = cli("playground", runs[0], "--port", port)
    assert taken.code == 2
    assert "--port" in taken.err
    assert cli("playground", runs[0], "--prompts", tmp_path / "none.txt").code == 2
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    missing = cli("playground", runs[0])
    assert missing.code == 2
    assert "flocktune[playground]" in missing.err.replace("\n", "")
