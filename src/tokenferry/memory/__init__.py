"""GPU memory that all ranks of a node address (`window`), and blocks of it with the lifetime of tensors (`heap`)."""
