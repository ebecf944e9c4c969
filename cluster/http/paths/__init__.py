"""Paths of vLLM's app: which ones clients may use, by what the engine does, and why others are not there. What is
behind a path, and who may ask how much of it, is told beside this folder.
"""
