"""What the links and the memory do, with nothing in the way."""
