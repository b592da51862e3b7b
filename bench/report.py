"""Writes the tables of docs/performance.md from bench/results, misses and failures among them.

    python -m bench.report            # write
    python -m bench.report --check    # fail if the document is not what the results say

Everything between `<!-- bench:NAME -->` and `<!-- end -->` is generated; the rest of the document is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import steps_report
from bench.claim import DEFAULT_MODEL, RESULTS, Claim, Finding, say
from bench.claims import NAMES, claim_of
from bench.machine import CHECKOUT
from bench.planned import error_percent, planned
from bench.rows import Row

DOCUMENT = CHECKOUT / "docs" / "performance.md"
_BLOCK = re.compile(r"(<!-- bench:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "not measured"


class Results:
    """All results in a folder, by model and claim."""

    def __init__(self, folder: Path) -> None:
        contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
        # Measurements of memory are no claims: bench.memory_report reads them.
        claims = [content for content in contents if "claim" in content]
        self.rows: dict[tuple[str, str], list[Row]] = {(content["model"], content["claim"]): content["rows"] for content in claims}

    @property
    def models(self) -> list[str]:
        """The default one first, measured or not."""
        others = {model for model, _ in self.rows} | {claim_of(name).model for name in NAMES}
        return [DEFAULT_MODEL, *sorted(others - {DEFAULT_MODEL})]

    def of(self, model: str, claim: str) -> list[Row]:
        return self.rows.get((model, claim), [])

    def findings(self, model: str) -> list[tuple[Claim, Finding]]:
        """What is to be reached, with what was measured; of models that a claim is not about only if it was measured."""
        claims = [claim for name in NAMES if (claim := claim_of(name)).model == model or (model, name) in self.rows]
        found = []
        for claim in claims:
            rows = self.of(model, claim.name)
            # Without any row there is no more to be said than that.
            found += [(claim, finding if rows else replace(finding, reason="")) for finding in claim.findings(rows)]
        return found


def reach(results: Results) -> str:
    """What is to be reached, what was measured, and when."""
    parts = []
    for model in results.models:
        lines = []
        for claim, finding in results.findings(model):
            sign = "at most" if finding.at_most else "at least"
            dates = _dates(row for row in results.of(model, claim.name) if row["label"] in finding.compared)
            lines.append([finding.what, f"{sign} {finding.reach:g}{finding.unit}", _measured(finding), _outcome(finding), dates])
        parts.append(f"{model}:\n\n" + table(["what", "reach", "measured", "", "date"], lines))
    return "\n".join(parts)


def _measured(finding: Finding) -> str:
    if finding.value is None:
        return f"{NOT_MEASURED}: {finding.reason}" if finding.reason else NOT_MEASURED
    return f"{finding.value:g}{finding.unit}"


def _outcome(finding: Finding) -> str:
    return {True: "reached", False: "missed", None: ""}[finding.reached]


def machines(results: Results) -> str:
    """Each combination of machine, versions and code that something was measured with."""
    seen: dict[str, list[str]] = {}
    for rows in results.rows.values():
        for row in rows:
            machine, code = row["machine"], row["code"]
            what = f"{machine['gpus']} × {machine['gpu']}, {machine['gpu_memory_gib']} GiB" if machine["gpu"] else "no GPU"
            where = f"{what}, driver {machine['driver']}, {machine['processors']} processor cores, start {machine['boot']}"
            versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
            key = f"{where} | {versions} | {code['commit'] or '–'} ({code['sources']})"
            seen.setdefault(key, []).append(row["measured_at"])
    if not seen:
        return "Nothing has been measured yet.\n"
    lines = [[*key.split(" | "), f"{min(times)[:10]} to {max(times)[:10]}"] for key, times in seen.items()]
    return table(["machine", "versions", "commit (hash of the sources)", "measured"], lines)


def rows(results: Results) -> str:
    """Every row of every claim."""
    parts = []
    for model in results.models:
        for name in NAMES:
            measured = results.of(model, name)
            if not measured or name == "profile":
                continue
            claim = claim_of(name)
            parts.append(f"### {claim.title} ({model})\n")
            if claim.note:
                parts.append(f"{claim.note}\n")
            for kind in dict.fromkeys(row.get("row", "sft") for row in measured):
                parts.append(_TABLES[kind]([row for row in measured if row.get("row", "sft") == kind]))
    return "\n".join(parts) if parts else "Nothing has been measured yet.\n"


def _training(measured: Sequence[Row]) -> str:
    head = [
        "system", "setting", "samples/s, median step", "samples/s, all steady steps", "peak GiB", "tokens a sample", "supervised",
        "patches", "tokens/s", "with padding", "waiting for data",
    ]  # fmt: skip
    lines = []
    for row in measured:
        if row.get("failed"):
            lines.append([_system(row), _setting(row), f"failed: {row['reason']}", *[""] * 8])
            continue
        keys = ("samples_s", "samples_s_wall", "peak_gib", "tokens_per_sample", "supervised_tokens_per_sample", "patches_per_sample")
        tokens = row.get("sample_tokens_s", row.get("tokens_s"))
        rates = [_number(row, key) for key in keys] + [f"{tokens:,.0f}", f"{row['padded_tokens_s']:,.0f}"]
        lines.append([_system(row), _setting(row), *rates, f"{100 * row['wait_share']:.2g}%"])
    return table(head, lines)


def _system(row: Row) -> str:
    if "system" not in row:
        return row["label"]
    version = f" {row['system_version']}" if row.get("system_version") else ""
    return f"{ {'finesight': 'ours', 'unsloth': 'Unsloth', 'trl': 'TRL'}[row['system']] }{version}"


def _setting(row: Row) -> str:
    if "precision" not in row:
        return row["label"]
    parts = [
        row["precision"],
        {"none": "nothing recomputed", "unsloth": "its checkpointing"}.get(row["recompute"], f"{row['recompute']} checkpointing"),
    ]
    parts.append(f"packs of {row['token_budget']:,} tokens" if "token_budget" in row else f"batch {row['batch']} × {row['accumulation']}")
    told = {
        "all_quantized": "vocabulary and tower quantised", "compiled": "compiled", "grouped": "grouped by length", "cached": "features kept",
    }  # fmt: skip
    parts += [text for key, text in told.items() if row.get(key)]
    parts += [f"{row['per_image']} questions an image"] if row["per_image"] > 1 else []
    parts += ["nothing shared"] if row.get("shared") is False else []
    parts += ["PNG files"] if row.get("images") == "png" else []
    return ", ".join(parts)


def _rooflines(measured: Sequence[Row]) -> str:
    lines = [[row["precision"], _number(row, "square_tflop_s"), _number(row, "mix_tflop_s"), row.get("reason", "")] for row in measured]
    return table(["precision", "square products, TFLOP/s", "a layer's own products, TFLOP/s", ""], lines)


def _copies(measured: Sequence[Row]) -> str:
    return table(["copy on the GPU, bytes", "GB/s, read and written"], [[f"{row['bytes']:,}", _number(row, "gb_s")] for row in measured])


def _exactness(measured: Sequence[Row]) -> str:
    lines = []
    for row in measured:
        if row.get("failed"):
            lines.append([row["label"], f"failed: {row['reason']}", "", "", ""])
            continue
        for path, loss in row["losses"].items():
            error, cosine = row["gradient_errors"].get(path), row["worst_cosines"].get(path, [None])[0]
            lines.append(
                [
                    row["label"],
                    path.replace("_", " "),
                    f"{loss:g}",
                    "" if error is None else f"{error:g}",
                    "" if cosine is None else f"{cosine:.6f}",
                ]
            )
    return table(["samples", "path", "loss", "gradients' relative error", "least cosine of a matrix's gradient"], lines)


def _adapter_costs(measured: Sequence[Row]) -> str:
    lines = []
    for row in measured:
        if row.get("failed"):
            lines.append([row["what"], f"failed: {row['reason']}"])
        elif row["what"] == "survival":
            lines += [
                [f"share of an update of {row['update']:g} that survives, {name.replace('_', ' ')}", f"{share:g}"]
                for name, share in row["shares"].items()
            ]
        else:
            lines.append([f"{row['what'].replace('_', ' ')}: forward and backward, {row['tokens']:,.0f} tokens", f"{row['median_s']:g} s"])
    return table(["what", "measured"], lines)


def _memory(measured: Sequence[Row]) -> str:
    head = [
        "model", "setting", "packs of a step", "largest: tokens, patches", "weights", "while made", "after a backward pass", "peak", "reserved", "planned", "plan off by",
    ]  # fmt: skip
    lines = []
    for row in measured:
        if row.get("failed"):
            lines.append([row.get("model", ""), _memory_setting(row), f"failed: {row['reason']}", *[""] * 8])
            continue
        pack, plan, error = row["pack"], planned(row), error_percent(row)
        keys = ("weights_gib", "build_peak_gib", "between_steps_gib", "peak_allocated_gib", "peak_reserved_gib")
        lines.append(
            [
                row["model"], _memory_setting(row), len(row["packs"]), f"{pack['tokens']:,}, {sum(pack['patches']):,}",
                *(_number(row, key) for key in keys), _number(plan, "peak_allocated_gib"),
                "–" if error is None else f"{error:+.1f}%",
            ]
        )  # fmt: skip
    return "Memory in GiB.\n\n" + table(head, lines)


def _memory_setting(row: Row) -> str:
    if "method" not in row:
        return row["label"]
    parts = [row["method"], f"policy {row['recompute']}", f"packs of {row['token_budget']:,} tokens"]
    parts += [f"GRPO, groups of {row['group']['generations']}"] if row.get("group") else []
    parts += [f"at most {row['max_pixels']:,} pixels"] if row["max_pixels"] else []
    parts += [setting.partition(".")[2] for setting in row["further"] if not setting.startswith(("tuning.", "training.optim=adamw"))]
    parts += ["compiled"] if row["compiled"] else []
    parts += [f"cap of {row['cap_gib']:g} GiB"] if row["cap_gib"] else []
    parts += [f"out of memory {row['out_of_memory']} times"] if row.get("out_of_memory") else []
    return ", ".join(parts)


def _decoding(measured: Sequence[Row]) -> str:
    """Steps of decoding, and what the profiles name."""
    head = ["model", "form", "what", "ms a step", "tokens/s", "weights GB", "keys and values GB", "bound, ms", "share of the bound"]
    lines, profiles = [], []
    for row in measured:
        what = [row.get("model", ""), _form(row), row.get("what", row["label"])]
        if row.get("failed"):
            lines.append([*what, f"failed: {row['reason']}", *[""] * 5])
        elif row["what"] == "profile":
            profiles.append(row)
        elif row["what"] != "copy":
            keys = ("step_ms", "tokens_s", "weights_gb", "keys_values_gb", "bound_ms", "share_percent")
            lines.append([*what, *(_number(row, key) for key in keys)])
    copies = [
        f"Copy on the GPU: {row['gb_s']:g} GB/s, read and written ({row['model']})."
        for row in measured
        if row.get("what") == "copy" and "gb_s" in row
    ]
    return "\n".join(["\n".join(copies) + "\n", table(head, lines), *(_kernels_of_a_step(row, _form(row)) for row in profiles)])


def _form(row: Row) -> str:
    if "adapter" not in row:
        return "–"
    return f"{'with an adapter' if row['adapter'] else 'base alone'}, {'compiled' if row['compiled'] else 'not compiled'}"


def _kernels_of_a_step(row: Row, form: str) -> str:
    largest = [
        [f"`{cost['name']}`", cost["group"], f"{1e3 * cost['seconds']:.3g}", f"{100 * cost['share']:.1f}%", f"{cost['calls']:,}"]
        for cost in row["largest"]
    ]
    title = f"Kernels of one step, {row['model']}, {form} ({row['launches']:,} launches, {1e3 * row['step_s']:.3g} ms):"
    return f"{title}\n\n" + table(["kernel", "what", "ms", "share of the step", "launches"], largest)


def _updates(measured: Sequence[Row]) -> str:
    """Updates of groups: seconds, and memory beyond what is there before."""
    head = ["model", "form", "completions", "packs", "tokens computed", "s a step", "activations, GiB", "completions' own share, GiB"]
    lines = []
    for row in measured:
        if row.get("failed"):
            lines.append([row.get("model", ""), _update_form(row), row.get("generations", ""), f"failed: {row['reason']}", *[""] * 4])
            continue
        figures = [
            row["generations"],
            row["packs"],
            f"{row['tokens']:,}",
            *(_number(row, key) for key in ("step_s", "activations_gib", "own_share_gib")),
        ]
        lines.append([row["model"], _update_form(row), *figures])
    return table(head, lines)


def _update_form(row: Row) -> str:
    if "shared" not in row:
        return row["label"]
    compiled = "compiled" if row["compiled"] else "not compiled"
    features = ", images' features kept" if row.get("kept_features") else ""
    shared = "prompt shared" if row["shared"] else "nothing shared"
    return f"{shared}{features}, policy {row['policy']}, packs of {row['token_budget']:,} tokens, {compiled}"


def _update_profiles(measured: Sequence[Row]) -> str:
    """Parts of updates, each waited for by itself, and kernels of one."""
    done = [row for row in measured if not row.get("failed")]
    lines = [[row["model"], _update_form(row), f"failed: {row['reason']}", ""] for row in measured if row.get("failed")]
    lines += [[row["model"], _update_form(row), part, f"{1e3 * seconds:.3g}"] for row in done for part, seconds in row["parts_s"].items()]
    return "\n".join(
        [table(["model", "form", "part of an update", "ms"], lines), *(_kernels_of_a_step(row, _update_form(row)) for row in done)]
    )


def _update_comparisons(measured: Sequence[Row]) -> str:
    head = ["model", "loss, nothing shared", "loss, prompt shared", "gradients' norm", "gradients apart, relative"]
    keys = ("loss_unshared", "loss_shared", "gradient_norm", "gradients_apart")
    lines = [
        [
            row.get("model", row["label"]),
            *([f"failed: {row['reason']}", "", "", ""] if row.get("failed") else (_number(row, key) for key in keys)),
        ]
        for row in measured
    ]
    return table(head, lines)


_TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "sft": _training,
    "roofline": _rooflines,
    "copy": _copies,
    "exactness": _exactness,
    "adapter_cost": _adapter_costs,
    "memory": _memory,
    "decode": _decoding,
    "grpo_update": _updates,
    "grpo_memory": _updates,
    "grpo_compared": _update_comparisons,
    "grpo_profile": _update_profiles,
    "grpo_step": lambda measured: table(*steps_report.grpo_steps(measured)),
    "serve": lambda measured: table(*steps_report.serving(measured)),
}


def profile(results: Results) -> str:
    """Where a steady step spends its time."""
    parts = []
    for model in results.models:
        for row in results.of(model, "profile"):
            parts.append(f"### {model}, {_setting(row)}\n")
            if row.get("failed"):
                parts.append(f"failed: {row['reason']}\n")
                continue
            lines = [
                [group, f"{cost['seconds']:g}", f"{100 * cost['share']:.1f}%", f"{cost['calls']:,}"]
                for group, cost in row["groups"].items()
            ]
            lines.append(["gaps", f"{row['gaps']['seconds']:g}", f"{100 * row['gaps']['share']:.1f}%", ""])
            parts.append(f"One step of {row['step_s']:g} s.\n")
            parts.append(table(["what", "seconds", "share of the step", "launches"], lines))
            largest = [[f"`{cost['name']}`", cost["group"], f"{100 * cost['share']:.1f}%", f"{cost['calls']:,}"] for cost in row["largest"]]
            parts.append(table(["five largest costs", "what", "share of the step", "launches"], largest))
    return "\n".join(parts) if parts else "Nothing has been measured yet.\n"


def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; text in it cannot break it."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in (head, *lines)]
    rule = ["---"] * len(head)
    return "".join(f"| {' | '.join(line)} |\n" for line in (cells[0], rule, *cells[1:]))


def _number(row: Row, key: str) -> str:
    return f"{row[key]:g}" if row.get(key) is not None else "–"


def _dates(measured: Iterable[Row]) -> str:
    return ", ".join(sorted({row["measured_at"][:10] for row in measured}))


BLOCKS: dict[str, Callable[[Results], str]] = {"reach": reach, "machines": machines, "rows": rows, "profile": profile}


def rendered(text: str, folder: Path) -> str:
    """The document with its generated blocks renewed.

    Raises:
        ValueError: it has a block that nothing generates, or lacks one.
    """
    found = [match.group(2) for match in _BLOCK.finditer(text)]
    if sorted(found) != sorted(BLOCKS):
        raise ValueError(f"the document must have each of the blocks {', '.join(BLOCKS)} once; it has {', '.join(found) or 'none'}")
    results = Results(folder)
    return _BLOCK.sub(lambda match: f"{match.group(1)}\n{BLOCKS[match.group(2)](results)}\n{match.group(3)}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the document is not up to date")
    a = parser.parse_args(arguments)
    before = a.document.read_text(encoding="utf-8")
    after = rendered(before, a.results)
    if a.check:
        if after != before:
            say(f"{a.document} is not what the results say; run python -m bench.report")
        return int(after != before)
    a.document.write_text(after, encoding="utf-8")
    say(f"wrote {a.document}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
