"""Settings for all tests."""

import gc

import pytest
import torch

from aim_surgery.checkpoint.models.torchvision_ops import import_torchvision

# Small tensors on a busy machine: two threads wait for each other more than they compute.
torch.set_num_threads(1)
# Libraries that import it by themselves fail where its compiled extension does not load, if they
# come first; which test comes first in a process is chance.
import_torchvision()
torch.manual_seed(0)  # for what modules draw when they are imported


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Leave what libraries and test files made at import out of every later garbage collection.

    Graphs are many small objects, so collections are frequent: it makes the tests 10 % faster.
    """
    gc.collect()
    gc.freeze()
