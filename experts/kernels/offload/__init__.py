"""A kernel that has memory for some of its slots only: the others wait in host memory or in a file, and come
when they are asked for, or a little earlier. How an expert is packed, and the arithmetic, stay the kernels' own.
"""

from experts.kernels.offload.backing import FileBacking, PinnedBacking
from experts.kernels.offload.kernel import OffloadedKernel
from experts.kernels.offload.link import Link
from experts.kernels.offload.prefetch import Prefetcher

__all__ = ["FileBacking", "Link", "OffloadedKernel", "PinnedBacking", "Prefetcher"]
