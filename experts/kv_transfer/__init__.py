"""KV cache of prompts from one router to another: files in a folder, and vLLM's connector for them.

`files` and `handover` know nothing of vLLM; every touch of its internals is in `vllm_connector`. Who asks whom for a
prompt is no business of this folder (`cluster/pools`).
"""
