"""Prefix algebra: new prefixes out of others, with NumPy alone, each of which says what it was made of."""

from __future__ import annotations

from prefixkit.algebra.average import average as average
from prefixkit.algebra.cast import cast as cast
from prefixkit.algebra.compose import compose as compose
from prefixkit.algebra.derived import Derived as Derived
from prefixkit.algebra.difference import Apart as Apart
from prefixkit.algebra.difference import apart as apart
from prefixkit.algebra.rotation import Rotation as Rotation
from prefixkit.algebra.slice import cut as cut
