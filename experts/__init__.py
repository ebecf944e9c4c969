"""The data plane: vLLM plug-in, dispatch and combine, transports, shard runtime, kernels, checkpoint reader. It never
uses Ray; what runs where, and in which epoch, is decided in `cluster`.
"""
