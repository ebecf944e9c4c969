"""`expertmesh check`: everything that can be refused without GPUs and without a cluster, all of it at once.
The rules are those of `cluster.config`, `cluster.refusals` and Serve's schemas; here they are run over whole files, and
what this machine cannot tell is said.
"""
