"""Tokens a second of our server and of `transformers serve`, at several numbers of streams."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, Run, main
from bench.rows import Row, significant

_PINNED = ("model", "image_tokens", "text_tokens", "answer_tokens")
STREAMS = (1, 16, 64)
# Beside torch and what transformers needs; the rest of the peers' archive stays out of reach.
_SERVER = ("fastapi", "starlette", "uvicorn", "opentelemetry", "opentelemetry_api")
_OPENAI = ("openai", "distro", "jiter", "sniffio", "pydantic", "pydantic_core", "annotated_types", "typing_inspection")


def _run(label: str, system: str, packages: tuple[str, ...], *arguments: str) -> Run:
    given = (system, "{checkpoint}", "--model", "{model}", "--streams", *map(str, STREAMS), *arguments)
    return Run(label, "bench.serving", given, packages=packages)


def judge(rows: Rows) -> list[Finding]:
    return [faster(rows, streams, 3.0 if streams == 16 else 1.0) for streams in STREAMS]


def faster(rows: Rows, streams: int, reach: float, where: str = "") -> Finding:
    """Our tokens a second over those of `transformers serve` at its best setting."""
    what = f"tokens/s of our server over transformers serve, {streams} {'stream' if streams == 1 else 'streams'}{where}"
    row, other = _best(rows, "ours", streams), _best(rows, "transformers", streams)
    if row is None or other is None:
        return Finding(what, reach, None, reason="no row of ours" if row is None else "no row to compare with")
    if any(row[name] != other[name] for name in _PINNED) or row["machine"]["boot"] != other["machine"]["boot"]:
        return Finding(what, reach, None, reason="the work or the machine differs")
    return Finding(what, reach, significant(row["tokens_s"] / other["tokens_s"], 3), compared=(row["label"], other["label"]))


def _best(rows: Rows, system: str, streams: int) -> Row | None:
    fitting = [row for own in rows.values() for row in own if row["system"] == system and row["streams"] == streams]
    return max(fitting, key=lambda row: row["tokens_s"], default=None)


CLAIM = Claim(
    "serve",
    "Answers over HTTP: our server and transformers serve",
    (
        _run("ours", "ours", _SERVER, "--requests", "3"),
        _run("transformers", "transformers", (*_SERVER, *_OPENAI)),
        _run("transformers-compiled", "transformers", (*_SERVER, *_OPENAI), "--compile"),
    ),
    judge,
    note=(
        "Each stream asks about an image of its own (1,024 visual tokens, 100 tokens of text) and gets answers of 128 tokens, none of which can "
        "end before (neither server draws special tokens); tokens are those that a server itself counts. `transformers serve` takes up one request about an image at a time; its "
        "continuous batching is for text alone."
    ),
    model="qwen3-vl-4b",
)

if __name__ == "__main__":
    main(CLAIM)
