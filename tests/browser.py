"""Pages in a real browser: the system's Chromium, headless, which takes note of whatever a page does wrong."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

WIDE = (1280, 900)
PHONE = (390, 844)
HERE = ("", "127.0.0.1", "localhost", "::1")
PATIENCE_MS = 120_000
"""No test fails for a slow machine."""

Opener = Callable[..., "Page"]


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome, or None."""
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


def flaws(page: Page) -> list[str]:
    """What of a page, as it is shown now, is hard to use: names, headings, captions, contrast, width; as sentences."""
    found: list[str] = page.evaluate((Path(__file__).parent / "accessibility.js").read_text())
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium for one module: while it is open, asyncio.run fails in this thread."""
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_chromium(), args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
    """``open_page(path or url, size=WIDE, scheme="light")`` -> the page, loaded. The test fails at its end if a page
    said an error on its console, threw, failed to load something, or asked for anything outside this machine."""
    contexts: list[BrowserContext] = []
    wrong: list[str] = []

    def load(address: Path | str, size: tuple[int, int] = WIDE, scheme: str = "light") -> Page:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        context.route(lambda url: urlparse(url).hostname not in (None, *HERE), lambda route: route.abort())
        page = context.new_page()
        page.on("console", lambda said: wrong.append(f"{said.type}: {said.text}") if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(f"thrown: {error}"))
        page.on(
            "requestfailed",
            lambda request: (
                wrong.append(f"failed: {request.url} ({request.failure})")
                if request.failure != "net::ERR_ABORTED"
                else None
            ),
        )  # fmt: skip  - a page may end a stream of its own
        page.goto(address.resolve().as_uri() if isinstance(address, Path) else address)
        return page

    yield load
    seen = list(wrong)  # before closing: what is on its way then is not the page's fault
    for context in contexts:
        context.close()
    if seen:
        pytest.fail("The browser noted:\n" + "\n".join(seen))
