"""Measures several claims one after another, within one time limit: `python -m bench.claims [NAME …] [options]`."""

from __future__ import annotations

import time

from bench.claim import Runner, parser_for, say, verdict
from bench.claims import NAMES, claim_of


def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__ or "")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"claims, in this order; default: all of {', '.join(NAMES)}")
    a = parser.parse_args(arguments)
    begun = time.monotonic()
    limit = a.time_limit
    for name in a.names or NAMES:
        a.time_limit = limit - (time.monotonic() - begun)
        say(f"== {name}")
        for finding in Runner(claim_of(name), a).run():
            say(verdict(finding))


if __name__ == "__main__":
    main()
