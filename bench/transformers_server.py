"""`transformers serve`, with the arguments that it takes; started by bench.serving."""

from __future__ import annotations

import sys

from bench.torchvision_on_cpu import stand_in


def main() -> None:
    stand_in()
    from transformers.cli.transformers import app

    app(["serve", *sys.argv[1:]])


if __name__ == "__main__":
    main()
