"""Targets that are near what shards hold already: another set of ranks, or ranks that may change names. numpy alone, since
the controller imports it; searches that may move everything are in the folder above.
"""
