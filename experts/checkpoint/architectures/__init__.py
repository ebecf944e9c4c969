"""What becomes of each MoE architecture that vLLM's registry knows: a table, and a verdict on a config.json by it. How
the experts of those that are served are stored is for `experts.checkpoint.families`.
"""
