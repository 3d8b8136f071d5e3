"""`tokenferry bench transformers` with the version of transformers that is found first, on two small CPU ranks."""

import sys

from tokenferry.cli.main import main

SIZES = "--hidden 128 --top-k 2 --experts 8 --tokens 12 --layers 1 --intermediate 32 --batch 2 --new-tokens 2"

if __name__ == "__main__":
    sys.exit(main(["bench", "transformers", "--device", "cpu", "--iterations", "1", *SIZES.split()]))
