"""The expert MLP in C++ for CPUs, compiled once for each machine. Kernels in other languages have their own folders."""
