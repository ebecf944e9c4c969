"""Helpers for tests of the Ray side: the running service, shipped configs, made-up statuses. Helpers that work without
Ray belong in `tests.support`.
"""
