"""What an expert is: its shapes and activation, and the reference MLP. Kernels, file formats and processes belong
elsewhere."""
