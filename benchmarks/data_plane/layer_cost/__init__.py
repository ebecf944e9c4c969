"""Predicted against measured layers; `python -m benchmarks.data_plane.layer_cost` says how."""
