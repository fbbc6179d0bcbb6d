"""The dashboard in a real browser, beside real runs that go on, are killed, go on again and fail."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser import PATIENCE_MS, flaws
from conftest import World
from fake_runs import as_lines, fake_run, round_event
from forked_runs import ForkedRuns

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.needs_chromium

ROUNDS = ("rounds=400", "evaluation.every=0", "evaluation.max_rows=1")


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRuns]:
    with ForkedRuns(tmp_path_factory.mktemp("forked"), {"CUDA_VISIBLE_DEVICES": ""}) as runs:
        yield runs


@contextmanager
def dashboard(folder: Path, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``flocktune dashboard FOLDER``: its address and process, until it is killed."""
    command = [sys.executable, "-m", "flocktune", "dashboard", str(folder), "--port", str(port)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        try:
            assert process.stdout
            first = process.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+/", first)
            assert found, first + process.stdout.read()
            yield found[0], process
        finally:
            process.kill()


@pytest.fixture
def follow() -> Iterator[Callable[[Path], str]]:
    """``follow(folder)`` -> the address of a dashboard. Ask for it before ``open_page``: it must outlive the pages."""
    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(dashboard(folder))[0]


def until(page: Page, what: str, *given: object) -> None:
    """Wait until a JavaScript expression of the page is true."""
    page.wait_for_function(what, arg=list(given) or None, timeout=PATIENCE_MS)


def has(page: Page, selector: str, text: str) -> None:
    until(page, "([at, text]) => document.querySelector(at)?.textContent.includes(text)", selector, text)


def never_loaded_again(page: Page) -> Callable[[], bool]:
    page.evaluate("window.sameAsEver = true")
    return lambda: page.evaluate("window.sameAsEver === true")


def test_a_run_is_followed_through_its_life(
    forked: ForkedRuns, world: World, tmp_path: Path, follow: Callable[[Path], str], open_page: Callable[..., Page]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    url = follow(runs)
    page = open_page(url)
    same = never_loaded_again(page)
    has(page, "#runs", "No runs below")

    child = forked.start("run", world.recipe, *ROUNDS, "--out", runs / "long")
    has(page, "#runs", "running")
    page.click("text=long")
    until(page, "() => window.sameAsEver !== true")
    same = never_loaded_again(page)
    round_done = "() => Number(/round (\\d+) of/.exec(document.querySelector('.now').textContent)[1])"
    has(page, "#state", "left")
    first = page.evaluate(round_done)
    until(page, f"([first]) => ({round_done})() > first + 3", first)
    has(page, "title", "/400")
    assert page.locator("#learning svg").count() >= 1

    child.kill(signal.SIGKILL)
    child.wait()
    has(page, "#state", "stopped")
    has(page, "#state", "its process was killed")
    has(page, "#state", f"flocktune resume {runs / 'long'}")

    child = forked.start("resume", runs / "long")
    has(page, "#state", "running")
    child.kill(signal.SIGINT)
    assert child.wait().code == 130
    has(page, "#state", "stopped")

    assert same(), "nobody had to load it again"


def test_the_end_and_the_reason_of_a_failure(
    forked: ForkedRuns, world: World, tmp_path: Path, follow: Callable[[Path], str], open_page: Callable[..., Page]
) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    url = follow(runs)
    page = open_page(url)
    same = never_loaded_again(page)
    short = forked.start("run", world.recipe, "--out", runs / "short")
    failing = forked.start("run", world.recipe, "local.lr=1e30", "--out", runs / "failing")
    has(page, "#runs", "1 finished")
    has(page, "#runs", "1 failed")
    has(page, "#runs", "round 1: expected updates of at least 1 client, got 0.")
    assert (short.wait().code, failing.wait().code) == (0, 1)
    assert same()
    page.click("text=failing")
    has(page, "#state", "NaN or infinite values")
    page.goto(f"{url}run/short")
    page.click("#to-report")
    until(page, "() => document.title.startsWith('tiny')")


def test_a_lost_connection_is_said_and_healed(tmp_path: Path, browser: Browser) -> None:
    folder = fake_run(tmp_path / "runs" / "one")
    with dashboard(tmp_path / "runs") as (url, process):
        page = browser.new_page()
        page.goto(f"{url}run/one")
        same = never_loaded_again(page)
        process.kill()
        process.wait()
        has(page, "#link", "connection lost at")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(as_lines([round_event(3)]))
    with dashboard(tmp_path / "runs", int(url.rsplit(":", 1)[1].strip("/"))):
        has(page, "#link", "live")
        has(page, ".now", "round 4 of 10")
        shutil.rmtree(folder)
        has(page, "#link", "its folder is gone")
        assert same()
    page.close()


def test_what_a_reader_does_outlives_news(
    tmp_path: Path, follow: Callable[[Path], str], open_page: Callable[..., Page]
) -> None:
    folder = fake_run(tmp_path / "runs" / "one")
    fake_run(tmp_path / "runs" / "two", finished=True)
    url = follow(tmp_path / "runs")
    page = open_page(f"{url}run/one")
    page.click("text=Client by client")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.ariaLabel").startswith("What each client did so far")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(as_lines([round_event(3)]))
    has(page, "#clients table", "4 of 4")
    assert page.locator("#clients details").get_attribute("open") is not None
    assert page.evaluate("document.activeElement.ariaLabel").startswith("What each client did so far")

    page.goto(url)
    for _ in range(3):  # past the skip link
        page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "filter"
    page.keyboard.type("finished")
    assert page.locator("tbody tr:visible").all_inner_texts()[0].startswith("two")
    assert page.locator("tbody tr:visible").count() == 1
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(as_lines([round_event(4)]))
    has(page, "#runs", "5/10")
    assert page.locator("tbody tr:visible").count() == 1, "what was asked for still holds"
    page.fill("#filter", "no such thing")
    assert page.locator("#none").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_can_be_read(
    tmp_path: Path, follow: Callable[[Path], str], open_page: Callable[..., Page], scheme: str
) -> None:
    runs = tmp_path / "runs"
    fake_run(runs / "one")
    fake_run(runs / "a-name-that-is-rather-long-and-knows-no-blanks-at-all-but-goes-on-and-on", finished=True)
    url = follow(runs)
    for address in (url, f"{url}run/one"):
        for size in ((1280, 900), (390, 844)):
            page = open_page(address, size=size, scheme=scheme)
            assert flaws(page) == []
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
                "rgb(255, 255, 255)" if scheme == "light" else "rgb(21, 24, 28)"
            )


def test_ctrl_c_ends_it(tmp_path: Path) -> None:
    with dashboard(tmp_path) as (url, process):
        with urllib.request.urlopen(url) as answer:
            assert b"No runs below" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stdout
        assert process.stdout.read().endswith("Ended.\n")
