"""Grouped expert MLPs behind one interface; a trial on the machine picks the fastest. Reading weights from files is in
`experts.checkpoint`, choosing a kernel's rows in `experts.shard`. docs/gpu-results.md says what has run on GPUs.
"""

from experts.kernels.base import ExpertKernel, KernelShape
from experts.kernels.pick import KERNELS, QUANTIZED_KERNELS, keep_quantized, pick_kernel

__all__ = ["KERNELS", "QUANTIZED_KERNELS", "ExpertKernel", "KernelShape", "keep_quantized", "pick_kernel"]
