"""The network of the author's published notebook, rebuilt by the general operation."""
