"""vLLM's expert MLPs (CPU, Triton, quantized) behind our interface. The routers' plug-in is `experts.vllm_plugin`; a
shard needs vllm only if one of these kernels is picked."""
