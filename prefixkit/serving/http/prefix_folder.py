"""A folder of prefix files, served under the names of the files, and looked at again while the server runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from prefixkit.errors import ConfigError, PrefixkitError
from prefixkit.format.manifest import parse
from prefixkit.format.stored import read_stored, refuse
from prefixkit.prefix import Prefix, load
from prefixkit.serving.delivery import EngineError
from prefixkit.serving.engine import Engine
from prefixkit.serving.http.catalogue import Catalogue, length_of
from prefixkit.serving.session import Session
from prefixkit.serving.worker import Worker

SECONDS = 1.0
"""Between two looks."""

_log = logging.getLogger(__name__)
_Stamp = tuple[int, int, int]


class PrefixFolder:
    """Keeps what is served equal to the `*.safetensors` in a folder; a file that is refused changes nothing."""

    def __init__(self, folder: Path, worker: Worker, catalogue: Catalogue) -> None:
        self._folder, self._worker, self._catalogue = folder, worker, catalogue
        self._seen: dict[str, _Stamp] = {}
        """Every file as it was last looked at, the refused ones too, so that each is told of once."""
        self._served: set[str] = set()
        self._missing = False

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Within, what is in the folder is served; at the beginning it already is."""
        await self._go_on()
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching

    async def look(self) -> None:
        """Take in what is new or has changed, and drop what has gone."""
        try:
            found = await asyncio.to_thread(_stamps, self._folder)
        except OSError as error:
            if not self._missing:
                _log.warning("%s cannot be read, and what it held stays: %s", self._folder, error)
            self._missing = True
            return
        self._missing = False
        for name in self._seen.keys() - found.keys():
            await self._drop(name)
        for name in sorted(name for name, stamp in found.items() if self._seen.get(name) != stamp):
            self._seen[name] = found[name]
            await self._take(name)

    async def _watch(self) -> None:
        going = True
        while going:
            await asyncio.sleep(SECONDS)
            going = await self._go_on()

    async def _go_on(self) -> bool:
        """Look, and survive it; gives whether to look again."""
        try:
            await self.look()
        except EngineError:
            return False
        except Exception:
            _log.exception("%s could not be looked at", self._folder)
        return True

    async def _take(self, name: str) -> None:
        path = self._folder / f"{name}.safetensors"
        known = name in self._served
        try:
            self._catalogue.check(name)
            session, slots = await self._worker.call(lambda engine: (engine.session, _slots(engine, name)))
            prefix = await asyncio.to_thread(_read, path, session, slots)
            await self._worker.call(lambda engine: engine.session.add_prefix(name, prefix))
        except EngineError:
            raise
        except (PrefixkitError, OSError) as error:
            _log.warning("%s is refused%s: %s", _shown(path.name), ", the one before stays" if known else "", error)
            return
        except Exception:
            # The other files are none the worse for it.
            _log.exception("%s is refused", _shown(path.name))
            return
        self._served.add(name)
        self._catalogue.add(name, prefix.manifest)
        _log.info("prefix %s %s", name, "replaced" if known else "added")

    async def _drop(self, name: str) -> None:
        del self._seen[name]
        if name in self._served:
            # What is being written keeps its prefix to the end.
            self._served.remove(name)
            self._catalogue.drop(name)
            await self._worker.call(lambda engine: engine.session.drop_prefix(name))
            _log.info("prefix %s dropped", name)


def _shown(name: str) -> str:
    """`name` as every log can hold it."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _slots(engine: Engine, name: str) -> int | None:
    """The slots of the rows that the prefix `name` is copied into; None for the shared one, which is in none."""
    return None if name == engine.shared else engine.capacity


def _read(path: Path, session: Session, slots: int | None) -> Prefix:
    """The prefix at `path`, which is not read to the end where its header says that it cannot be served.

    Raises:
        InputError: a damaged file, another backbone's prefix, or one that leaves no room in a row of `slots`.
    """
    stored = read_stored(path)
    refuse(path, stored.problems)
    manifest = parse(stored.document)
    session.check(manifest)
    if slots is not None and (length := length_of(manifest)) >= slots:
        expected, step = f"a prefix that leaves room in a row of {slots} slots", "start with a larger --capacity"
        raise ConfigError(path, expected=expected, found=f"one of {length}", next_step=step)
    return load(path)


def _stamps(folder: Path) -> dict[str, _Stamp]:
    """Change time, size and inode of each prefix file, by its name without the ending."""
    found = {}
    for path in folder.iterdir():
        if path.suffix == ".safetensors" and not path.name.startswith("."):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            except OSError:
                # Such as a link to itself: the one file is refused when it is read.
                found[path.stem] = 0, 0, 0
            else:
                found[path.stem] = status.st_mtime_ns, status.st_size, status.st_ino
    return found
