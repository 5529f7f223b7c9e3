"""Settings for all tests."""

import torch

# Small tensors on a busy machine: two threads wait for each other more than they compute.
torch.set_num_threads(1)
