"""Where a router meets vLLM: the replaced layer, the loader, the worker's calls, refusals, engine options, joints.
Elsewhere in `experts` only kernels named after vllm import it; `experts.dispatch` knows no engine."""
