"""The site of docs/: built strictly, all pages in it, nothing from elsewhere, and a reference that misses no key."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from browser import PHONE, WIDE, Opener
from documented import ROOT
from flocktune.cli import app
from flocktune.config.load import to_tree
from flocktune.config.schema import RunConfig
from flocktune.owner.policy import Policy

pytest.importorskip("mkdocs", reason="the extra docs")

GENERATED = {"reference/recipe.md", "reference/commands.md"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make docs`` does."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def served(site: Path) -> Iterator[str]:
    """Its address, served as ``python -m http.server`` does."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def pages_in(nav: Any) -> list[str]:
    """The pages of a part of mkdocs' table of contents."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_in(part)]


def test_every_page_is_in_the_table_of_contents_once() -> None:
    named = pages_in(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(named) == sorted(there | GENERATED)


def test_the_site_asks_nothing_of_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    loaded = r'<(?:script|img|iframe)[^>]*src="https?:|<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="https?:'
    for page in pages:
        assert not re.search(loaded, page.read_text(encoding="utf-8")), page


def test_the_reference_has_every_key_with_a_meaning(site: Path) -> None:
    text = (site / "reference" / "recipe.html").read_text(encoding="utf-8")
    rows = re.findall(r"<td><code>([\w.]+)</code></td>\s*<td>.*?</td>\s*<td>.*?</td>\s*<td>(.*?)</td>", text, re.DOTALL)
    known = dict(rows)
    for key in paths(to_tree(RunConfig())):
        assert key in known, key
    assert [key for key, meaning in rows if not meaning.strip()] == []
    assert {"privacy.epsilon", "attack.trigger", "engine.deadline_s", "claims"} <= known.keys()


def paths(tree: Any, place: str = "") -> list[str]:
    """Dotted names of a recipe's keys, without the choices' ``kind``."""
    if not isinstance(tree, dict):
        return [place]
    return [path for key, value in tree.items() if key != "kind" for path in paths(value, f"{place}.{key}".lstrip("."))]


def test_the_reference_has_every_command_and_option(site: Path) -> None:
    text = (site / "reference" / "commands.html").read_text(encoding="utf-8")

    def check(name: str, command: Any) -> None:
        for verb, inner in getattr(command, "commands", {}).items():
            if not inner.hidden:
                check(f"{name} {verb}", inner)
        if hasattr(command, "commands"):
            return
        assert re.search(rf"<h2[^>]*>{name}<", text), name
        for parameter in command.params:
            if parameter.name != "help" and not parameter.hidden:
                assert parameter.help, f"{name} {parameter.name}: what --help says of it"
            for flag in parameter.opts if parameter.param_type_name == "option" else ():
                assert flag in text, f"{name} {flag}"

    check("flocktune", typer.main.get_command(app))


def test_the_python_reference_has_the_public_names(site: Path) -> None:
    import flocktune

    text = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert not re.search(r":\w+:<code>", text)
    for name in flocktune.__all__:
        assert re.search(rf'id="flocktune\.[\w.]*\b{name}"', text), name


def test_the_owners_tutorial_names_keys_of_a_policy() -> None:
    text = (ROOT / "docs/tutorials/data-owner.md").read_text()
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert block
    assert set(yaml.safe_load(block[1])) <= {key.name for key in fields(Policy)}


@pytest.mark.needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_site_as_it_is_served(served: str, open_page: Opener, scheme: str) -> None:
    """The palette that the system asks for, no page wider than a phone's, and the search."""
    page = open_page(f"{served}/index.html", WIDE, scheme)
    assert page.locator("body").get_attribute("data-md-color-scheme") == {"light": "default", "dark": "slate"}[scheme]
    phone = open_page(f"{served}/reference/recipe.html", PHONE, scheme)
    assert phone.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    page.keyboard.press("/")
    page.wait_for_function("document.activeElement.matches('[data-md-component=search-query]')")
    page.keyboard.type("proximal")
    page.wait_for_selector(".md-search-result__link")
    assert page.locator(".md-search-result__link").count() > 0
