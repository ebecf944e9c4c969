"""All that a router says to vLLM: the replaced layer, the loader, the worker's calls, refusals, engine options, joints.
Nothing else in `experts` imports vllm but the kernels that say so; dispatch itself knows no engine."""
