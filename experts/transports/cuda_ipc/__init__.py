"""Pairs between GPUs that can map each other's memory: headers in shared memory, rows where both ends read and write
them. NCCL, which copies between GPUs, does not belong here.
"""
