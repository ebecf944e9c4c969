"""Where a checkpoint comes from (a folder, the Hugging Face hub, an object store), and fetching the files that a process
needs. What stands in those files, and which tensors belong to experts, is for the rest of `experts.checkpoint`.
"""
