"""Tests of the whole service: on one Ray cluster in `serve`, on several hosts in `hosts`. What can be tested without
Ray or vllm belongs in the folder of its source.
"""
