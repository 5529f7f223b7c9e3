"""Whole model libraries: each model built, transformed with defaults, verified; one row each.

    python -m benchmarks.zoo --library torchvision|timm|transformers|others
        [--shard i/n] [--resume | --missing | --failed] [--only GLOB] [--jobs 2]
        [--meta] [--limit SECONDS] [--memory GiB] [--output benchmarks/results/zoo]

Each model runs in a process of its own, which may take so much time and memory and no more. Its row
is appended to `LIBRARY.jsonl` at once (a shard's to `LIBRARY-i-of-n.jsonl`; shards deal the models
out like cards). At the end the newest row of each model, from all files of the library, makes
`LIBRARY.json` and `LIBRARY.md`.
"""
