"""Expert MLPs made of torch operations, on any device. Kernels that need another library have their own folders."""
