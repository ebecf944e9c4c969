"""C++ of the data plane, how C++ is compiled for this machine, and the structs that Python and C++ share.

Each function here has a Python form elsewhere, for machines without a C++ compiler. Expert kernels are in `kernels`.
"""
