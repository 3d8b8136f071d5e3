"""GPU memory that all ranks of a node address (`window`), and blocks in it that live as long as tensors (`heap`)."""
