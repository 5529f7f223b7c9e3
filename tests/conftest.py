"""Settings for all tests."""

import pytest
import torch

# Small tensors on a busy machine: two threads wait for each other more than they compute.
torch.set_num_threads(1)
torch.manual_seed(0)  # for what modules draw when they are imported


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)
