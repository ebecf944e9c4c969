"""What a model takes, read from config.json and the headers of its files without a byte of weights, and a table of
models known by name. How many GPUs that makes is for `placement.sizing`.
"""
