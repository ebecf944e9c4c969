"""Routing decisions: recorded, read from other engines' files, profiled from a running server. How a placement serves
them is `placement.rule`.
"""
