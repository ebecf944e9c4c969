"""The state of a mesh as its controller knows it: ranks, holdings, target, migration, and the messages about them.
Nothing here knows Ray or has a clock; what takes calls and tells the time is `cluster.controller`.
"""
