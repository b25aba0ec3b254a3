"""What a test needs that compiles a model: `pytestmark = COMPILING`."""

from __future__ import annotations

import pytest

COMPILING = [
    # The compiler asks every input for its gradient, and hides what torch says to that from everybody but pytest.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.usefixtures("compiled_anew"),
]
