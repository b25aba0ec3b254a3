"""The page of examples/web in headless Chromium: `python -m tests.bench.page SITE [--json FILE] [--screenshot FILE]`.

SITE is what `python -m examples.web.build` wrote. Times are taken outside the page's own code: from the click on a
prefix to the frame that shows its card, and from the end of loading to the first letter of the first text.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import median
from typing import Any

from tests.web.browser import Page, chromium, served

ROUNDS = 5
_FROM_THE_START = """
window.moments = {};
const look = () => {
  const loading = document.getElementById('loading');
  if (loading?.hidden) moments.loaded ??= performance.now();
  if (document.getElementById('text')?.textContent) return moments.written = performance.now();
  requestAnimationFrame(look);
};
requestAnimationFrame(look);
"""
_SWITCH = """
const title = document.getElementById('title');
const input = document.querySelector(`#choices input[value='${arguments[0]}']`);
const began = performance.now();
new MutationObserver((_, observer) => {
  observer.disconnect();
  requestAnimationFrame(() => { window.switched = performance.now() - began; });
}).observe(title, { childList: true });
input.click();
"""


def measure(page: Page) -> dict[str, Any]:
    """Milliseconds to load, to the first token and to switch, and tokens a second; page and model are open."""
    moments = page.driver.execute_script("return window.moments")
    files = page.driver.execute_script(
        "return [...document.querySelectorAll('#choices input')].map((one) => one.value)"
    )
    switched, speeds = [], []
    # The first is chosen already.
    for file in (files[1:] + files[:1]) * ROUNDS:
        page.watch(_SWITCH, file)
        switched.append(page.driver.execute_script("return window.switched"))
        speeds.append(float(page.figures()["written"].split()[2]))
    return {
        "loaded_ms": round(moments["loaded"]),
        "first_token_after_load_ms": round(moments["written"] - moments["loaded"]),
        "switch_ms": {"median": round(median(switched), 1), "most": round(max(switched), 1), "switches": len(switched)},
        "tokens_per_second": {"median": median(speeds), "least": min(speeds)},
        "cores": os.cpu_count(),
        "browser": page.driver.capabilities["browserVersion"],
    }


def picture(page: Page, path: Path) -> None:
    """Save what a visitor sees of a verse."""
    page.resize(1120, 904)
    page.choose("questions.safetensors")
    page.choose("verse.safetensors")
    page.driver.save_screenshot(str(path))


def main() -> None:
    """Open the page once, measure, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--screenshot", type=Path)
    asked = parser.parse_args()
    with served(asked.site) as (address, requests), chromium() as driver:
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": _FROM_THE_START})
        page = Page.open(driver, address, requests)
        if asked.screenshot:
            picture(page, asked.screenshot)
        else:
            figures = json.dumps(measure(page), indent=1)
            print(figures)
            if asked.json:
                asked.json.write_text(figures + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
