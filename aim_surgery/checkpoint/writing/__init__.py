"""Files out, by the suffix: each appears whole or not at all.

safetensors_file, torch_file, dcp_folder, exported_file, shards
                  the writers, one a kind of container, tensor by tensor
layout            what goes into a PyTorch file: the layout that came in
relaid            the same, with other things in the places of the old ones
atomic            temporary names, locks, renames
"""
