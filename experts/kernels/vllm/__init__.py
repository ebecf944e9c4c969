"""Expert MLPs that vLLM brings: its CPU, Triton and quantized kernels behind our interface. The plug-in of routers is
`experts.vllm_plugin`, and shards run without vllm when these kernels are not picked."""
