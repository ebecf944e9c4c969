"""Dispatch on the device: Triton programs that plan, pack and combine, and what drives them."""
