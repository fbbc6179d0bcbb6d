"""The report in a real browser: nothing loaded or thrown, usable by keyboard, screen reader, on a phone, on paper."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser import PHONE, Opener, flaws
from flocktune.report.compare import write_comparison as write_compared
from flocktune.report.html import write_holdings, write_report
from test_report import write_comparison, write_plugged, write_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BROKEN = """[...new Set([...document.querySelectorAll("table.words :is(td, th)")].filter(cell => {
  const words = document.createRange(), text = cell.firstChild;
  return text?.data && [...text.data.matchAll(/\\S+/g)].some(({ 0: word, index }) => {
    words.setStart(text, index); words.setEnd(text, index + word.length);
    return new Set([...words.getClientRects()].map(one => one.top)).size > 1 && !/-/.test(word);
  });
}).map(cell => cell.closest("table").tHead?.rows[0].cells[cell.cellIndex].textContent ?? ""))]"""
"""Headings of the columns in which a word is broken, elsewhere than at a hyphen."""

pytestmark = pytest.mark.needs_chromium


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of every kind, written once."""
    folder = tmp_path_factory.mktemp("pages")
    write_comparison(folder / "methods", seeds=2)
    write_plugged(folder / "emulator")
    write_run(folder / "killed", done=7, checked=False)
    compared = folder / "compared.html"
    with (folder / "killed" / "recipe.yaml").open("a") as recipe:
        recipe.write(f"aggregation: {{rule: {'much to say ' * 20}}}\n")
    write_compared([folder / "methods", folder / "killed"], compared)
    held = {f"client-{n}": {"poem": n, "riddle": 40 - n} for n in range(40)}
    return {
        **{name: write_report(folder / name) for name in ("methods", "emulator", "killed")},
        "split": write_holdings(folder / "split.html", held, {"distance": 0.5}),
        "compared": compared,
    }


@pytest.mark.parametrize("name", ["methods", "emulator", "killed", "split", "compared"])
def test_a_page_has_no_flaws_light_or_dark_wide_or_narrow_folded_or_not(
    name: str, pages: dict[str, Path], open_page: Opener
) -> None:
    page = open_page(pages[name])
    assert flaws(page) == []
    page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
    assert flaws(page) == []
    page.emulate_media(color_scheme="dark")
    assert flaws(page) == []
    page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
    assert flaws(page) == []
    assert pages[name].stat().st_size < 350_000


def test_words_of_strangers_stay_words_and_in_the_window(tmp_path: Path, open_page: Opener) -> None:
    write_run(tmp_path / "run", rounds=2)
    log, evil = tmp_path / "run" / "metrics.jsonl", "<script> window.ran = true </script> <img src=x>"
    log.write_text(
        log.read_text()
        .replace("the connection was lost", f"{evil} {'x' * 300}")
        .replace('"failures": []', f'"failures": [{{"client": "client-1", "reason": "{evil} {"x" * 300}"}}]')
        .replace("client-1", f"client-1 {evil}")
        .replace("dolly, uneven", evil)
    )
    path = write_report(tmp_path / "run")
    path.write_text(re.sub("<meta http-equiv[^>]*>", "", path.read_text()))  # the policy alone would hide a mistake
    page = open_page(path, size=PHONE)
    page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
    assert flaws(page) == []
    assert page.evaluate("[window.ran ?? null, document.querySelectorAll('main script, img').length]") == [None, 0]
    assert page.evaluate(BROKEN) == ["Reason"], "only what has no end is broken within a word"


def test_settings_side_by_side_are_not_broken_within_a_word(pages: dict[str, Path], open_page: Opener) -> None:
    page = open_page(pages["compared"], size=PHONE)
    assert page.locator("table.settings td").count() >= 4
    assert page.evaluate(BROKEN) == []


def test_flaws_are_found(tmp_path: Path, open_page: Opener) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><title></title><h1 id=a>x</h1><h3 id=a>y</h3><p style='color:#999'>y</p>"
        "<svg role=img></svg><button></button>"
        "<table><tr><th>z</table><div style='width:2000px' aria-labelledby=none>w</div>"
        "<svg role=img aria-label=x><title>t</title><rect width=99 height=30 /><text y=20 id=t>dark</text></svg>"
        "<div style='overflow:auto;width:50px'><p style='width:90px'>w</div>"
    )
    found = flaws(open_page(bad))
    for what in ("no language", "no title", "not one main", "ids twice: a", "label none", "a level of headings",
                 "a picture without", "a table without", "a heading of nothing", "a control without", "scrolls, but",
                 "wider than", "contrast 2.85 < 4.5: <p", "contrast 1.00 < 4.5: <text"):  # fmt: skip
        assert [said for said in found if said.startswith(what)], f"{what} is not among {found}"


def test_the_page_is_used_by_keyboard_alone(pages: dict[str, Path], open_page: Opener) -> None:
    page = open_page(pages["methods"])
    page.keyboard.press("Tab")
    skip = page.locator(":focus")
    assert skip.inner_text() == "Skip to the content"
    assert skip.bounding_box()["x"] >= 0, "seen while it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    table = page.get_by_role("region", name="Scores on test; the best of a column is bold, table").get_by_role("table")
    table.get_by_role("button", name="Loss").focus()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    heading = table.get_by_role("columnheader", name="Loss")
    assert heading.get_attribute("aria-sort") == "descending"
    assert table.get_by_role("rowheader").all_inner_texts()[0] == "Base model"
    page.keyboard.press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert table.get_by_role("rowheader").all_inner_texts()[0] == "Centralised"
    table.get_by_role("button", name="Method").press("Enter")
    assert table.get_by_role("rowheader").all_inner_texts()[:2] == ["Base model", "Centralised"]


def test_light_and_dark_are_the_system_s_or_a_choice_and_paper_is_white(
    pages: dict[str, Path], open_page: Opener
) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page = open_page(pages["killed"], scheme="dark")
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Change between light and dark").press("Enter")
    light = page.evaluate(ground)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(21, 24, 28)")
    page.get_by_role("button", name="Change between light and dark").press("Enter")
    assert page.evaluate(ground) == dark
    page.emulate_media(media="print")
    assert page.evaluate(ground) == light
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 less its margins
    cut = "e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1"
    assert page.evaluate(f"[...document.querySelectorAll('.scroll, main')].filter({cut}).length") == 0


def test_a_script_that_was_smuggled_in_does_not_run(tmp_path: Path, browser: Browser) -> None:
    write_run(tmp_path / "run", rounds=2)
    path = write_report(tmp_path / "run")
    path.write_text(path.read_text().replace("</main>", "<script>window.ran = true</script></main>"))
    page = browser.new_page()
    page.goto(path.as_uri())
    ran = page.evaluate("window.ran")
    page.close()
    assert ran is None
