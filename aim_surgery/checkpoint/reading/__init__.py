"""Files in: what is in a checkpoint of any kind, and its tensors one by one.

    kinds             what kind a path is; opens the source for it
    source            what all sources have in common
    safetensors_file, torch_file, exported_file, shards, dcp_folder
                      the sources, one a kind of container
    zip_check         the checksums of PyTorch's zips; no bombs
    nesting, names    where in it the weights are; which tensor is which of the model
    plain_data        what may stand beside the weights without trust
    outline           what a PyTorch file holds, without torch
    known_models      which known model it may be of

Only `torch_file`, `exported_file` and `dcp_folder` import torch before a tensor is asked for.
"""
