"""The data plane: vLLM plug-in, dispatch and combine, transports, shard runtime, kernels, checkpoint reader."""
