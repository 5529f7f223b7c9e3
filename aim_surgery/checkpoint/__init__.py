"""Checkpoints: files in, files out; and models from specs.

    reading      files in, one source a kind; where the weights are, and what they are called
    models       the model that they belong to
    open         both: a model with its weights; a plan from its file
    operated     the operation, tensor by tensor
    transform    the operation, file by file
    optimizer    the optimizer's state through it
    writing      files out, one writer a kind
    metadata     what a file tells besides its weights: the plan
    save, load   a model into a file and back
    back         restored or folded files
    inspect      what is in a file

Nothing is imported here: what only looks at files (`aim_surgery.checkpoint.inspect`) works without
torch, which takes more than a second to import.
"""
