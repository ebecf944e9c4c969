"""Planning which rank holds which expert: placements, how to judge, find and change them; without ray, vllm or torch.
Whatever moves weights, serves requests or decides when to plan belongs to `experts` or `cluster`.
"""
