"""Names of what files of operated models tell besides their weights: text by name.

It stands in the metadata of safetensors files, and in `state_dict._metadata` of PyTorch's.
"""

FILE_FORMAT = "1"

FORMAT_KEY = "aim_surgery.format"  # which every such file has
VERSION_KEY = "aim_surgery.version"  # of this package
PLAN_KEY = "aim_surgery.plan"
FORM_KEY = "aim_surgery.form"
MODEL_KEY = "aim_surgery.model"
ALIASES_KEY = "aim_surgery.aliases"
VERSIONS_KEY = "aim_surgery.versions"
CRC_KEY = "aim_surgery.crc32"
