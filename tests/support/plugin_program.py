"""A program like vLLM: it calls the plug-ins of an entry point, and prints where its processes find deep_ep."""

import multiprocessing
import sys
from importlib.metadata import entry_points


def print_file(who: str) -> None:
    import deep_ep

    print(who, deep_ep.__file__, flush=True)  # noqa: T201


if __name__ == "__main__":
    for point in entry_points(group=sys.argv[1]):
        point.load()()
    print_file("front end")
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=print_file, args=(method,))
        process.start()
        process.join()
        assert process.exitcode == 0
