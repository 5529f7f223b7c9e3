"""Checkpoints: files in, files out; and models from specs.

    in, one source a kind    read -> source; safetensors_file, shards, torch_file, dcp_folder,
                             exported_file; zip_check
    what is where in it      nesting, names; outline, without torch; inspect
    the model of it          models, torchvision_ops; skeleton, without weights; loading; open;
                             known
    the operation            transform (files) -> operated (tensor by tensor); optimizer, moments,
                             parameter_order
    out, by the suffix       write -> safetensors_out, shards_out, layout_out + torch_out,
                             exported_out; metadata; atomic
    the way back             write.load; back

Nothing is imported here: what only looks at files (`aim_surgery.checkpoint.inspect`) works without
torch, which takes more than a second to import.
"""
