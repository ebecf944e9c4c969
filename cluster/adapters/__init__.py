"""LoRA adapters in a router: where they are, which ones its engine holds, and which one a request names. What an
adapter may change is told in `experts.checkpoint.adapters`; vLLM's side of it is in `cluster.http.vllm_joints`."""
