"""What the installed vLLM says in its source files: its options and their types, the models that it registers. Whoever
needs no more of vLLM than that reads it here, since importing vllm takes ten seconds and hundreds of megabytes.
"""
