"""Dispatch of fixed capacity that a CUDA graph can capture. What fails over, or changes its size between steps, belongs
to `experts.dispatch`."""
