"""Benchmarks: results go to stdout, progress and errors to stderr.

Exit codes: 0; 1 if a kernel failed or there is nothing to report; 2 for arguments, files or
machines that cannot be used; 130 after Ctrl-C.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

# Each is a module of this package with add_arguments(parser) and run(args) -> int, imported only on
# demand.
COMMANDS = {
    "kernels": "time our kernels beside cuDNN, Inductor and FlagGems, on a GPU",
    "train": "time training steps of whole networks beside PyTorch's own, on a GPU",
    "plan": "show what the planner chooses for each layer, without a GPU",
    "compiled": "read the machine code of the planner's choices, without a GPU",
    "counted": "execute some programs of the planner's choices and count, without a GPU",
    "campaign": "check every kernel and measure the device in the first minutes on a GPU",
    "hazards": "check the machine code of all binaries for hazards, without a GPU",
    "cpu": "time networks on a CPU beside PyTorch's own layers",
    "launch": "time the Python side of a call, without a GPU",
    "report": "draw charts and write the README's table from bench/results",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Besides its own arguments a command gets ``args.command``, the line that repeats it, and
    ``args.started``, its start by ``time.monotonic()``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    started = time.monotonic()
    known = {name: text for name, text in COMMANDS.items() if find_spec(f"bench.{name}")}
    top = Parser(
        prog="python -m bench",
        description="Benchmarks; COMMAND --help describes a command's options.",
        epilog="commands:\n" + "\n".join(f"  {name:9} {text}" for name, text in known.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("name", metavar="COMMAND", choices=known, help="one of those below")
    name = top.parse_args(argv[:1]).name
    # Triton warns unless this is set; the kernels may fuse a product and a sum.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    module = import_module(f"bench.{name}")
    parser = Parser(
        prog=f"python -m bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    command = shlex.join(["python", "-m", "bench", *argv])
    parser.set_defaults(command=command, started=started)
    try:
        return module.run(parser.parse_args(argv[1:]))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the final flush
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
