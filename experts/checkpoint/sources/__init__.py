"""Where a checkpoint comes from (a folder, the Hugging Face hub, an object store), and how files of it get here.
What stands in them, and which tensors belong to experts, is for the rest of `experts.checkpoint`.
"""
