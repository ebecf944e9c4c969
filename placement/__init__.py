"""Planning where experts stand: what a placement is, how it is judged, found and changed; pure, without ray, vllm or
torch. Whatever moves weights, opens a socket or watches a clock for the service belongs to `experts` or `cluster`.
"""
