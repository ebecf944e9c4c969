"""`expertmesh size`: what it prints, and the config that it writes. What it computes is in `placement.sizing`, what it
reads of a model in `experts.checkpoint.sizes`.
"""
