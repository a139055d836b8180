"""A headless Chromium for the tests of pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
APPLICATIONS = (
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
)
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def browser_path() -> str:
    """Where the browser is: `CHROMIUM` in the environment, or one on the path.

    Raises:
        RuntimeError: there is none.
    """
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    found = found or next(filter(os.path.exists, APPLICATIONS), None)
    if found is None:
        raise RuntimeError(
            "expected Chromium or Chrome for the tests of pages, found none; install one (Debian: apt-get install "
            "chromium), or set CHROMIUM to its path"
        )
    return found


@contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser that ends with the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A page that is open in the browser, with what it did besides being shown.

    Attributes:
        page: the page.
        requests: addresses that it asked for, its own left out.
        errors: what its scripts raised or wrote to the console, refusals of its security policy among them.
    """

    def __init__(self, page: Page, address: str) -> None:
        """Open `address` in `page`."""
        self.page, self.requests, self.errors = page, list[str](), list[str]()
        page.on("request", lambda one: self.requests.append(one.url) if one.url != address else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on(
            "console", lambda one: self.errors.append(one.text) if one.type in ("error", "warning") else None
        )
        page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(address)
