"""`python -m moe_train.demo [--tokens N | --more N]`: corpora from this machine, a small JetMoE trained on
them, a report."""

from __future__ import annotations

import argparse
import sys

from data_pipeline.units import parse_count
from moe_train.demo.run import run_demo


def _count(text: str) -> int:
    try:
        return parse_count(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main() -> int:
    """Run the demo and return its exit status (that of `moe-train`)."""
    parser = argparse.ArgumentParser(prog="python -m moe_train.demo", description=__doc__.partition(": ")[2])
    how_far = parser.add_mutually_exclusive_group()
    how_far.add_argument(
        "--tokens", type=_count, metavar="N", help="length of the whole run, e.g. 1M (default: the preset's)"
    )
    how_far.add_argument("--more", type=_count, metavar="N", help="go on for so many tokens, e.g. 500K")
    options = parser.parse_args()
    try:
        return run_demo(options.tokens, options.more)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        code = getattr(error, "exit_code", None)
        if not isinstance(code, int):
            raise  # a bug: its traceback, status 1
        print(f"error: {error}", file=sys.stderr)
        return code


if __name__ == "__main__":
    raise SystemExit(main())
