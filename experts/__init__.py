"""The data plane: vLLM plug-in, dispatch and combine, transports, shard runtime, kernels, checkpoint reader. It knows
no Ray; who runs where and in which epoch is `cluster`.
"""
