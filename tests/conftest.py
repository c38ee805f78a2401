"""Shared by all tests: shape checks on the mathematics, two threads, reproducible randomness."""

import gc
import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

with install_import_hook("scalora.algebra", "beartype.beartype"):
    # Imported here so that the hook checks every shape; tests/algebra/test_shapes.py holds that it does.
    import scalora.algebra.balancing
    import scalora.algebra.compressed_state
    import scalora.algebra.directions
    import scalora.algebra.gram
    import scalora.algebra.landing
    import scalora.algebra.loft
    import scalora.algebra.loftq
    import scalora.algebra.lora_pro
    import scalora.algebra.lora_rite
    import scalora.algebra.lowrank
    import scalora.algebra.nf4
    import scalora.algebra.reference
    import scalora.algebra.scaling
    import scalora.algebra.solvers
    import scalora.algebra.spectral
    import scalora.algebra.unmagnified
    import scalora.algebra.whitening  # noqa: F401

import pytest
import torch
from hypothesis import settings

# A shell without job control starts background jobs with Ctrl-C ignored, and children inherit that: here it must work.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")


def pytest_collection_finish() -> None:
    """Every run of Trainer ends in a collection, which walked all that is imported: most of a small test's time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
