"""Grouped expert MLPs behind one interface: the fastest that a measurement on the machine finds. Reading weights from
files is `experts.checkpoint`; which rows a kernel gets is the business of `experts.shard`.
"""

from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.pick import KERNELS, QUANTIZED_KERNELS, keep_quantized, pick_kernel

__all__ = ["KERNELS", "QUANTIZED_KERNELS", "ExpertKernel", "KernelShape", "keep_quantized", "pick_kernel"]
