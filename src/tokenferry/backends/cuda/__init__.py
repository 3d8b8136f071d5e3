"""The CUDA backend: dispatch, combine and decode by kernels that store into the memory of peers."""
