"""The formats of numbers on their way between ranks: FP8 and logfmt10."""
