"""Prefill and decode routers: a decode router has another one compute the prompts of its requests. How their KV cache
travels is in `experts.kv_transfer`, and what the section `pools` says in `cluster.config`.
"""
