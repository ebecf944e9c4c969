"""Engines that pool (embeddings, scores, classes of prompts) instead of generating: how to tell one, what does not go
along with it, and how its steps end. What both kinds of engine have in common is beside this folder.
"""
