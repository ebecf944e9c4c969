"""Targets near what shards hold already: for another set of ranks, or with ranks that may change names. The controller
imports it, so it needs numpy alone; searches that may move everything are in the folder above.
"""
