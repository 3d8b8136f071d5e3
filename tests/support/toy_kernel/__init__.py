"""A kernel of a few lines, with headers of its own, for the tests of the compiler."""
