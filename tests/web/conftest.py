"""The page, assembled and opened once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.web.build import assemble
from tests.web.browser import Page, chromium, served


@pytest.fixture(scope="session")
def node_modules() -> Path:
    """Where tests/install_runtimes puts npm's packages."""
    return Path(__file__).parents[1] / "javascript" / "node_modules"


@pytest.fixture(scope="session")
def site(node_modules: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page as a folder of static files."""
    return assemble(node_modules, tmp_path_factory.mktemp("page") / "site")


@pytest.fixture(scope="session")
def page(site: Path) -> Iterator[Page]:
    """The page in Chromium, its model loaded and its first text written."""
    with served(site) as (address, asked), chromium() as driver:
        yield Page.open(driver, address, asked)
