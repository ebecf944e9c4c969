"""How many routers and shards on which GPUs serve a model at a given load: memory, speed, price, and plain expert
parallelism beside it. What reads a checkpoint's files is in `experts.checkpoint.sizes`, what prints is in
`cluster.sizing_command`.
"""
