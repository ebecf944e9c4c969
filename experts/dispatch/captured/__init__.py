"""Dispatch of fixed capacity that a CUDA graph can capture. Whatever may fail over or change its size between steps
belongs to `experts.dispatch`."""
