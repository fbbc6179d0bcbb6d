"""``flocktune judge``: answers scored in pairs by a model behind an OpenAI-compatible address."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from flocktune.cli.common import app, console, escaped, needs_extra, problems

if TYPE_CHECKING:
    from flocktune.evaluation.judge.asking import Judge, Prices, Spent, Told
    from flocktune.judging.contest import Contest, Estimate

KEY_VARIABLE = "FLOCKTUNE_JUDGE_KEY"
_who = partial(typer.Option, rich_help_panel="Who and what")
_judge = partial(typer.Option, rich_help_panel="The judge")
_server = partial(typer.Option, rich_help_panel="The server")
_cost = partial(typer.Option, rich_help_panel="Cost")


@app.command()
def judge(
    ours: Annotated[Path, typer.Argument(help="A run's folder, a comparison's, or a file of answers.")],
    url: Annotated[str, _judge(help="The server, such as http://127.0.0.1:8000/v1.")],
    model: Annotated[str, _judge(help="The judge, as the server calls it.")],
    against: Annotated[
        list[str] | None,
        _who(
            help="A run beside it by name, base, a run's folder, or a file of answers. Default: all beside it, or base."
        ),
    ] = None,
    questions: Annotated[
        Path | None, _who(help="Questions to answer now. Default: held-out rows, as answered.")
    ] = None,
    method: Annotated[str | None, _who(help="Which run of a comparison; default: its main one.")] = None,
    max_questions: Annotated[int | None, _who(min=1, help="The most, spread over the categories.")] = None,
    max_new_tokens: Annotated[int | None, _who(min=1, help="The longest answer now; default: the recipe's.")] = None,
    to: Annotated[Path | None, _who(help="Where judge.json, .md and .jsonl go; default: the run's folder.")] = None,
    draws: Annotated[int, _judge(min=1, help="How often each question is judged, in both orders each time.")] = 1,
    temperature: Annotated[float, _judge(min=0.0, help="Of the judge; several draws need more than 0.")] = 0.0,
    max_tokens: Annotated[int, _judge(min=16, help="The longest reply of the judge.")] = 512,
    attempts: Annotated[int, _judge(min=1, help="How often to ask, in all, for a reply that is a verdict.")] = 2,
    parameter: Annotated[
        list[str] | None, _judge(help="Put into every request: name=value, as JSON; null takes one out.")
    ] = None,
    key_variable: Annotated[str, _server(help="The environment variable that holds the key.")] = KEY_VARIABLE,
    requests_per_minute: Annotated[float | None, _server(min=0.1, help="The most; default: no limit.")] = None,
    concurrency: Annotated[int, _server(min=1, help="Requests at a time.")] = 4,
    timeout_s: Annotated[float, _server(min=0.1, help="Seconds until a request is given up.")] = 120.0,
    tries: Annotated[int, _server(min=1, help="How often to send a request that gets no answer.")] = 6,
    cache: Annotated[Path | None, _server(help="Where replies are kept; default: flocktune's cache.")] = None,
    price_in: Annotated[float, _cost(min=0.0, help="Of a million tokens read.")] = 0.0,
    price_out: Annotated[float, _cost(min=0.0, help="Of a million tokens written.")] = 0.0,
    max_cost: Annotated[float | None, _cost(min=0.0, help="Stop before more than this is spent.")] = None,
    dry_run: Annotated[bool, _cost("--dry-run", help="Say what it would cost, and ask nothing.")] = False,
    yes: Annotated[bool, _cost("--yes", help="Do not ask before sending to another machine.")] = False,
) -> None:
    """Have a judge model score answers in pairs, 1 to 10, in both orders: the table of FedIT's paper."""
    needs_extra("openai", "judge")
    from flocktune.data.encoding import default_cache_folder
    from flocktune.errors import Problem, UserError
    from flocktune.evaluation.judge.asking import Judge, Prices
    from flocktune.evaluation.judge.client import Endpoint
    from flocktune.files import exclusive
    from flocktune.judging.contest import contest
    from flocktune.judging.contestants import line_up

    endpoint = Endpoint(
        _checked_url(url), model, os.environ.get(key_variable, "").strip(), timeout_s, tries,
        requests_per_minute=requests_per_minute, concurrency=concurrency,
    )  # fmt: skip
    asked = Judge(endpoint, temperature, max_tokens, attempts, _parameters(parameter or []))
    prices = Prices(price_in, price_out)
    _refuse(asked, draws, max_cost, prices)
    if max_new_tokens and questions is None:
        fix = "Give questions to answer now, too: --questions"
        raise UserError(Problem("--max-new-tokens", "--questions beside it", "answers that are there already", fix))
    place, folder = cache or default_cache_folder() / "judge", _folder(ours, to)
    place.mkdir(parents=True, exist_ok=True)
    with exclusive(place, "a cache that no other judge is using", "Wait for it, or name another: --cache"):
        lineup = line_up(
            ours, against or [], place, method=method, questions=questions, max_questions=max_questions,
            max_new_tokens=max_new_tokens, say=lambda line: console.print(escaped(line), style="dim"),
        )  # fmt: skip
        found = contest(lineup, draws)
        costs = _say_estimate(found, asked, prices, place / "replies")
        if dry_run:
            return
        if costs.duels and not yes:
            _ask_leave(asked, len(lineup.questions))
        _hold(found, asked, draws, prices, max_cost, place / "replies", folder)


def _hold(
    found: Contest, asked: Judge, draws: int, prices: Prices, max_cost: float | None, replies: Path, folder: Path
) -> None:
    """Ask, show, write. Leaves with 130 when it was stopped, and with 1 when the price's limit was reached."""
    from flocktune.errors import FlocktuneError
    from flocktune.evaluation.judge.asking import Spent, ask_all
    from flocktune.interrupts import stop_on_signals
    from flocktune.judging.contest import result, write_result
    from flocktune.report.judged import judged_notes, judged_table

    spent = Spent(prices, max_cost)
    text = "Stopping after the requests that are out. Press Ctrl-C again to stop now; no verdict is lost."
    again = f"flocktune {shlex.join(sys.argv[1:])}"
    duels = found.duels
    try:
        with _progress() as told, stop_on_signals(lambda line: problems.print(line), text) as stop:
            outcomes = ask_all(asked, duels, replies, spent, stop, told)
    except KeyboardInterrupt:
        outcomes = {}
        stop.set()
    left = len(set(duels)) - len(outcomes)
    if stop.is_set() and left:
        problems.print(f"Stopped. Go on with: {escaped(again)}", soft_wrap=True)
        raise typer.Exit(130)
    if left:
        raise FlocktuneError(
            f"--max-cost: {spent.cost:.4f} of {max_cost:g} is spent, and the next request might go beyond it; {left} of"
            f" {len(set(duels))} verdicts are still to come. What was paid for is kept: the same command with a higher"
            " limit goes on."
        )
    data = result(found, outcomes, asked, draws, spent)
    write_result(found, outcomes, data, folder)
    console.print(judged_table(data))
    console.print()
    for note in judged_notes(data):
        console.print(f"- {note}", markup=False, highlight=False)
    console.print(f"Wrote {folder / 'judge.json'}; beside it judge.md and judge.jsonl", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Told]:
    """A bar on the terminal's other stream; nothing where there is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=problems, transient=True, disable=not problems.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def told(done: int, total: int, spent: Spent) -> None:
            cost = f", {spent.cost:.2f}" if spent.prices.tokens_in or spent.prices.tokens_out else ""
            now = f"{spent.tokens_in:,} + {spent.tokens_out:,} tokens{cost}"
            bar.update(task, completed=done, total=total, description=escaped(spent.waiting or now))

        yield told


def _say_estimate(found: Contest, asked: Judge, prices: Prices, replies: Path) -> Estimate:
    from flocktune.evaluation.judge.asking import BYTES_A_TOKEN
    from flocktune.judging.contest import estimate

    costs = estimate(found, asked, replies)
    pairs = ", ".join(f"{pairing.baseline} ({len(pairing.meetings)})" for pairing in found.pairings)
    console.print(escaped(f"{found.ours} against {pairs}; questions in brackets."), soft_wrap=True)
    price = f", {prices.cost(costs.tokens_in, costs.tokens_out):.2f}" if prices != type(prices)() else ""
    if not costs.duels:
        console.print(f"All {costs.cached} verdicts are in the cache: nothing is asked.", highlight=False)
        return costs
    cached = f" {costs.cached} are in the cache." if costs.cached else ""
    console.print(
        f"{costs.duels} verdicts to ask for: about {costs.tokens_in:,} tokens read (a token for {BYTES_A_TOKEN} bytes),"
        f" at most {costs.tokens_out:,} written{price}, before second attempts.{cached}",
        soft_wrap=True,
        highlight=False,
    )
    return costs


def _ask_leave(asked: Judge, questions: int) -> None:
    """Questions and answers may be somebody's data: to another machine they go with leave only."""
    from flocktune.errors import Problem, UserError
    from flocktune.evaluation.judge.client import LOOPBACK

    endpoint = asked.endpoint
    if endpoint.host in LOOPBACK:
        return
    if endpoint.key and endpoint.url.startswith("http:"):
        problems.print("The key travels in the clear: the address is http, not https.", style="yellow")
    if not sys.stdin.isatty():
        fix = f"{questions} questions with all answers would be sent to {endpoint.host}. If they may: --yes"
        raise UserError(Problem("flocktune judge", "leave to send", "nobody to ask", fix))
    if not typer.confirm(f"Send {questions} questions, with their texts and all answers, to {endpoint.host}?"):
        raise typer.Exit(1)


def _checked_url(url: str) -> str:
    from flocktune.errors import Problem, UserError

    parts = urlsplit(url)
    expected = "an address such as http://127.0.0.1:8000/v1"
    if parts.username or parts.password:
        fix = f"A key comes from the environment: {KEY_VARIABLE}, or the variable that --key-variable names."
        raise UserError(Problem("--url", expected, "one with a name or password in it", fix))
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UserError(Problem("--url", expected, repr(url)))
    return url.rstrip("/").removesuffix("/chat/completions")


def _parameters(given: list[str]) -> dict[str, Any]:
    from flocktune.errors import Problem, UserError

    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name in ("", "model", "messages", "stream", "n"):
            raise UserError(Problem("--parameter", "name=value, of a name that is not the judge's own", repr(text)))
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _refuse(asked: Judge, draws: int, max_cost: float | None, prices: Prices) -> None:
    from flocktune.errors import Problem, UserError

    wrong = []
    if draws > 1 and asked.parameters.get("temperature", asked.temperature) == 0:
        got = f"{draws} at temperature 0, which are the same reply {draws} times"
        wrong.append(Problem("--draws", "1, or a temperature above 0", got, "Add: --temperature 0.7"))
    if max_cost is not None and not (prices.tokens_in or prices.tokens_out):
        wrong.append(Problem("--max-cost", "prices beside it", "none", "Add: --price-in and --price-out"))
    UserError.raise_all(wrong)


def _folder(ours: Path, to: Path | None) -> Path:
    from flocktune.errors import Problem, UserError

    if to is None and ours.is_file():
        raise UserError(Problem("--to", "a folder for the table", "none, beside a file of answers", "Add: --to FOLDER"))
    return to or ours
