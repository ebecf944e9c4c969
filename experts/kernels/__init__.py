"""Grouped expert MLPs behind one interface: the fastest that a measurement on the machine finds."""

from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.pick import KERNELS, pick_kernel

__all__ = ["KERNELS", "ExpertKernel", "KernelShape", "pick_kernel"]
