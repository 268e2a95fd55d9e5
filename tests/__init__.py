"""Tests. `typecheck` is the runtime type checker of test runs (``--jaxtyping-packages``)."""

from beartype import BeartypeConf, beartype

typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
"""Beartype that lets an int stand for a float, as PEP 484 does and callers do."""
