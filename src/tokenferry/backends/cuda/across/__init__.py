"""The CUDA backend across nodes: rails between nodes, and around the kernels of one node what crosses them."""
