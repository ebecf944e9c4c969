"""Tests of the files in configs/ that no program of the project reads: images, Kubernetes, Anyscale.

What the Serve configs themselves say is tested in tests/cluster/config.
"""
