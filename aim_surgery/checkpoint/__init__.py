"""Checkpoints: files in, files out; and models from specs."""

from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.write import load, save

__all__ = ["build", "load", "save"]
