"""The public surface: what `import prefixkit` offers, and what it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import prefixkit


def test_dir_is_all_and_everything_in_it_can_be_had() -> None:
    assert dir(prefixkit) == sorted(prefixkit.__all__)
    for name in prefixkit.__all__:
        assert getattr(prefixkit, name).__doc__, name


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = prefixkit.trian


def test_import_brings_nothing_heavy() -> None:
    code = "import prefixkit, sys; print(*{'torch', 'transformers', 'numpy', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
