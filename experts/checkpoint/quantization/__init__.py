"""How checkpoints store quantized matrices: one file for each family of formats, which names the tensors of a matrix,
their shapes, and what their values are; `from_config.py` finds the one that config.json describes. What kernels take is
for `experts.checkpoint.weight_format`, where in files the tensors are for `experts.checkpoint.storage`.
"""
