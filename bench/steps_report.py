"""Tables of whole steps of reinforcement and of servers: heads and lines for :mod:`bench.report`."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import Row

Table = tuple[list[str], list[list[str]]]
_NAMES = {"finesight": "ours", "ours": "ours", "trl": "TRL", "unsloth": "Unsloth", "transformers": "transformers serve"}


def grpo_steps(measured: Sequence[Row]) -> Table:
    """Whole steps: how long, how much memory, and how far sampler and update are apart."""
    head = [
        "system",
        "setting",
        "seconds a step",
        "completions/s",
        "of it sampling, s",
        "peak GiB",
        "sampler off update, mean",
        "trainable",
    ]
    lines = []
    for row in measured:
        if row.get("failed"):
            lines.append([_system(row), _setting(row), f"failed: {row['reason']}", *[""] * 5])
            continue
        seconds = row["prompts_per_step"] * row["generations"] / row["samples_s_wall"]
        figures = row["figures"]
        lines.append(
            [
                _system(row), _setting(row), f"{seconds:.3g}", f"{row['samples_s_wall']:g}", _given(figures.get("rollout_s")),
                _given(row.get("peak_gib")), _given(figures.get("sampling/sampling_logp_difference/mean")), f"{row['trainable']:,}",
            ]
        )  # fmt: skip
    return head, lines


def serving(measured: Sequence[Row]) -> Table:
    """Servers: tokens a second by number of streams."""
    head = ["server", "streams", "tokens/s", "first text, s", "whole answer, s", "answers of those asked for"]
    lines = []
    for row in measured:
        if row.get("failed"):
            lines.append([_system(row), "", f"failed: {row['reason']}", *[""] * 3])
            continue
        name = _system(row) + (", compiled" if row.get("compiled") else "")
        answers = f"{row['answers']} of {row['asked']}"
        lines.append([name, str(row["streams"]), f"{row['tokens_s']:g}", f"{row['first_token_s']:g}", f"{row['answer_s']:g}", answers])
    return head, lines


def _system(row: Row) -> str:
    name = _NAMES.get(row.get("system", ""), row["label"])
    return f"{name} {row['system_version']}" if row.get("system_version") else name


def _setting(row: Row) -> str:
    if "precision" not in row:
        return row["label"]
    recomputed = {"none": "nothing recomputed", "unsloth": "its checkpointing"}.get(row["recompute"], f"{row['recompute']} checkpointing")
    size = f"packs of {row['token_budget']:,} tokens" if "token_budget" in row else f"batch {row['batch']} × {row['accumulation']}"
    return ", ".join([row["precision"], recomputed, size, *(["compiled"] if row.get("compiled") else [])])


def _given(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
