"""Routing decisions: recorded, read from other engines' files, profiled from a running server. What a placement makes
of them is `placement.rule`."""
