"""Checkpoints: files in, files out; and models from specs.

Nothing is imported here: what only looks at files (`aim_surgery.checkpoint.inspect`) works without
torch, which takes more than a second to import.
"""
