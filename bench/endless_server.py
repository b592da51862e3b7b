"""The project's own server, which draws no special token: answers cannot end before the length that is asked for.

Nothing else differs from `finesight serve`; started by bench.serving.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench.prompts import special_ids
from bench.torchvision_on_cpu import stand_in


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="answers drawn side by side")
    parser.add_argument("--device", required=True)
    a = parser.parse_args(arguments)
    stand_in()
    serve_endless(a)


def serve_endless(a: argparse.Namespace) -> None:
    """Serves until it is told to end."""
    from finesight.recipe import ModelSettings
    from finesight.sampling.engine import DecodingEngine
    from finesight.serve.app import serve
    from finesight.serve.models import ModelShelf
    from finesight.serve.settings import ServeSettings

    class EndlessShelf(ModelShelf):
        """Models that never draw a special token, those that end an answer among them."""

        def engine(self, settings: ServeSettings) -> DecodingEngine:
            engine = super().engine(settings)
            engine.forbidden = special_ids(self.loaded.processor)
            return engine

    shelf = EndlessShelf(ModelSettings(name_or_path=str(a.checkpoint)), {}, name="measured", device=a.device)
    limits: dict[str, Any] = {"port": a.port, "batch_size": a.rows, "max_length_tokens": 2048, "max_completion_length": 512}
    serve(shelf, ServeSettings(**limits))


if __name__ == "__main__":
    main()
