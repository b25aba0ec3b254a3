"""The page in headless Chromium: a server of static files, the browser, and what a visitor does.

Selenium speaks WebDriver to Debian's chromedriver, which is built with the Chromium that it drives.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.wait import WebDriverWait

SECONDS = 60
"""For a model to load or a text to be written, on a machine that does much else."""
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
# Calls back when a text is finished that was not when the script began, with every state of it on the way.
_WATCH = """
const done = arguments[arguments.length - 1], text = document.getElementById('text'), states = [];
new MutationObserver((records, observer) => {
  if (text.textContent !== states.at(-1)) states.push(text.textContent);
  if (text.getAttribute('aria-busy') === 'true' || !records.some((record) => record.type === 'attributes')) return;
  observer.disconnect();
  done(states);
}).observe(text, { attributes: true, childList: true, characterData: true, subtree: true });
"""
# Calls back when a problem is told.
_WATCH_PROBLEM = """
const done = arguments[arguments.length - 1], problem = document.getElementById('problem');
new MutationObserver((_, observer) => {
  if (problem.hidden) return;
  observer.disconnect();
  done(problem.textContent);
}).observe(problem, { attributes: true, childList: true });
"""
_FILL = "document.getElementById('prompt').value = arguments[0]; document.getElementById('write').click();"
_CHOOSE = """
const input = document.querySelector(`#choices input[value='${arguments[0]}']`);
(input.checked ? document.getElementById('write') : input).click();
"""
_DROP = """
const bytes = Uint8Array.from(atob(arguments[1]), (character) => character.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], arguments[0]));
document.body.dispatchEvent(new DragEvent('drop', { dataTransfer, bubbles: true, cancelable: true }));
"""


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of the files in `folder`, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A headless Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in _FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    driver.set_script_timeout(SECONDS)
    try:
        yield driver
    finally:
        driver.quit()


@dataclass(frozen=True)
class Page:
    """The page, opened, with its first text written."""

    driver: webdriver.Chrome
    asked: list[str]

    @staticmethod
    def open(driver: webdriver.Chrome, address: str, asked: list[str]) -> Page:
        page = Page(driver, asked)
        page.resize(1200)
        driver.get(address)
        page.watch("if (text.getAttribute('aria-busy') === 'false') done([]);")
        return page

    def watch(self, act: str, *arguments: object) -> list[str]:
        """Run the script `act` and return the states of the text until it is finished."""
        states: list[str] = self.driver.execute_async_script(_WATCH + act, *arguments)
        return states

    def choose(self, file: str) -> list[str]:
        """Click a prefix of the menu, or Write where it is chosen already, and wait for its text."""
        return self.watch(_CHOOSE, file)

    def write(self, prompt: str) -> list[str]:
        """Type `prompt` in the place of the input, press Write and wait for the text."""
        return self.watch(_FILL, prompt)

    def drop(self, name: str, data: bytes) -> list[str]:
        """Drop a file that is taken, and wait for its text."""
        return self.watch(_DROP, name, base64.b64encode(data).decode())

    def drop_at_once(self, name: str, data: bytes, address: str) -> None:
        """Open the page, drop a file when its code has run and nothing is loaded yet, and wait until it has written."""
        drop = _DROP.replace("arguments[0]", json.dumps(name))
        drop = drop.replace("arguments[1]", json.dumps(base64.b64encode(data).decode()))
        source = f"document.addEventListener('DOMContentLoaded', () => {{ {drop} }});"
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
        self.driver.get(address)
        wait = WebDriverWait(self.driver, SECONDS)
        wait.until(lambda _: self.text("says") == name or self.text("problem") != "")

    def drop_refused(self, name: str, data: bytes) -> str:
        """Drop a file that is refused; gives the sentence that says why."""
        return self._problem(_DROP, name, base64.b64encode(data).decode())

    def told(self, prompt: str) -> str:
        """Press Write for an input that is refused; gives the sentence that says why."""
        return self._problem(_FILL, prompt)

    def _problem(self, act: str, *arguments: object) -> str:
        sentence: str = self.driver.execute_async_script(_WATCH_PROBLEM + act, *arguments)
        return sentence

    def title_becomes(self, title: str) -> bool:
        """Wait for the card of the prefix with that title, and for its text."""
        wait = WebDriverWait(self.driver, SECONDS)
        wait.until(lambda _: self.text("title") == title)
        return bool(wait.until(lambda driver: driver.find_element("id", "text").get_attribute("aria-busy") == "false"))

    def resize(self, width: int, height: int = 900) -> None:
        """Give the window that size, in CSS pixels."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def text(self, element: str) -> str:
        """What the element of that id says."""
        said: str = self.driver.execute_script("return document.getElementById(arguments[0]).innerText", element)
        return said

    def figures(self) -> dict[str, str]:
        """The small print below the text."""
        return dict(row.text.rsplit("\n", 1) for row in self.driver.find_elements("css selector", "#figures div"))
