"""The old file or the new one, never a broken one: full disks, missing rights, errors, `kill -9` at every step."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixkit.errors import InputError
from prefixkit.format.atomic import replacing, replacing_folder, write_bytes, write_stream


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_writes_and_replaces(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"old")
    write_stream(tmp_path / "x", iter([b"ne", b"w"]))
    assert (tmp_path / "x").read_bytes() == b"new"
    assert names(tmp_path) == ["x"]


def test_the_mode_is_that_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_bytes(tmp_path / "x", b"")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_name_as_long_as_allowed(tmp_path: Path) -> None:
    write_bytes(tmp_path / ("é" * 127), b"new")
    assert names(tmp_path) == ["é" * 127]


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_file(raised: type[BaseException], tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"old")

    def chunks() -> Iterator[bytes]:
        yield b"half of the ne"
        raise raised

    with pytest.raises(raised):
        write_stream(tmp_path / "x", chunks())
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def failing(code: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_is_told_in_one_line(
    step: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes(tmp_path / "x", b"old")
    with monkeypatch.context() as patched:
        patched.setattr(os, step, failing(code))
        with pytest.raises(InputError) as caught:
            write_bytes(tmp_path / "x", b"new")
    told = f"{tmp_path}/x: expected a place that can be written; found {os.strerror(code).lower()}; "
    assert str(caught.value).startswith(told)
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_an_error_of_another_file_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), replacing(tmp_path / "x"):
        (tmp_path / "elsewhere").read_bytes()
    assert names(tmp_path) == []


def test_a_full_disk(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x", b"old")
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from prefixkit.errors import InputError
from prefixkit.format.atomic import write_stream
try:
    write_stream({str(tmp_path / "x")!r}, (bytes(1000) for _ in range(1000)))
except InputError as error:
    print(error)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout.startswith(f"{tmp_path}/x: expected a place that can be written; found file too large; ")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize(
    ("path", "told"),
    [("missing/x", "expected an existing folder"), (".", "expected the path of a file; found a folder")],
)
def test_places_where_no_file_can_be(path: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        write_bytes(tmp_path / path, b"new")
    assert names(tmp_path) == []


def test_a_device_is_never_replaced() -> None:
    with pytest.raises(InputError, match="found a device"):
        write_bytes(os.devnull, b"new")
    assert not Path(os.devnull).is_file()


# Every step of a save, one after the other, is the last one of a process.
KILLED = """
import os, signal, sys
from prefixkit.format import atomic
from tests.prefixes import small_prefix
from prefixkit.prefix import save

path, last = sys.argv[1], int(sys.argv[2])
steps = 0

def counted(function):
    def step(*arguments, **options):
        global steps
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        steps += 1
        return function(*arguments, **options)
    return step

class Unbuffered:
    def __init__(self, file):
        self.file = file
        self.flush, self.fileno = counted(file.flush), file.fileno
    def write(self, data):
        for start in range(0, len(data), 256):
            counted(self.file.write)(data[start:start + 256])
            self.file.flush()
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()

opened = os.fdopen
os.fdopen = lambda *arguments: Unbuffered(opened(*arguments))
for name in ("open", "fsync", "replace"):
    setattr(os, name, counted(getattr(os, name)))
save(small_prefix(seed=2), path)
print(steps)
"""


def test_kill_9_at_every_step_of_a_save(tmp_path: Path) -> None:
    from prefixkit.prefix import save
    from tests.prefixes import small_prefix

    path = tmp_path / "x.safetensors"
    save(small_prefix(seed=2), path)
    new = path.read_bytes()
    save(small_prefix(seed=1), path)
    old = path.read_bytes()
    steps = int(killed_at(path, 10**9).stdout)
    assert (path.read_bytes(), steps > 8) == (new, True)
    seen = []
    for last in range(steps):
        path.write_bytes(old)
        assert killed_at(path, last).returncode == -signal.SIGKILL
        seen.append({old: "old", new: "new"}[path.read_bytes()])
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {"old", "new"}


def killed_at(path: Path, last: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(path), str(last)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "out") as folder:
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(b"new")
        assert names(tmp_path) == [folder.name]
    assert (tmp_path / "out" / "onnx" / "model.onnx").read_bytes() == b"new"
    assert names(tmp_path) == ["out"]


def test_a_folder_of_ours_is_replaced(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        with replacing_folder(tmp_path / "out", marker="export.json") as folder:
            (folder / "export.json").write_bytes(content)
            (folder / content.decode()).touch()
    assert names(tmp_path / "out") == ["export.json", "new"]
    assert names(tmp_path) == ["out"]


def test_a_folder_of_somebody_else_is_not(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"one with export\.json; found other files"):
        replacing_folder(tmp_path / "out", marker="export.json").__enter__()
    assert names(tmp_path / "out") == ["thesis.tex"]


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "out") as folder:
        (folder / "x").write_bytes((tmp_path / "missing").read_bytes())
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == []


def test_a_full_disk_under_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSPC))
    with pytest.raises(InputError, match="no space left"), replacing_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert names(tmp_path) == []


def test_a_full_disk_that_a_copy_meets(tmp_path: Path) -> None:
    def copy(folder: Path) -> None:
        # As shutil.copyfile raises it: both files, the source first.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/backbone/weights", None, str(folder / "weights"))

    with pytest.raises(InputError, match="no space left"), replacing_folder(tmp_path / "out") as folder:
        copy(folder)
    assert names(tmp_path) == []


def test_the_old_folder_comes_back_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "export.json").write_bytes(b"old")
    real, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(InputError, match="no space left"), replacing_folder(tmp_path / "out", marker="export.json"):
        pass
    assert (tmp_path / "out" / "export.json").read_bytes() == b"old"
    assert names(tmp_path) == ["out"]
