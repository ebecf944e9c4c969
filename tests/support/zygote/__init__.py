"""Processes forked from one that has already imported vllm, and the jobs that they run. Assertions belong in the tests
that read what a job reports.
"""
