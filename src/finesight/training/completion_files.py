"""What a run of reinforcement keeps of its rollouts: every completion with what it earned, as Parquet, and rewards that failed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from finesight.data.conversation import Conversation
from finesight.data.media import describe
from finesight.errors import CheckpointError, MediaError
from finesight.evaluation.pictures import thumbnail_of
from finesight.evaluation.reinforcement import PICTURED_GROUPS, gave_no_reward
from finesight.tasks.reward_types import RewardFailure, RewardTally
from finesight.training.rollouts import Position, Rollout
from finesight.training.run_report import COMPLETIONS
from finesight.training.telemetry import Telemetry
from finesight.wording import counted

_SHOWN_FAILURES = 5  # reasons
_SHOWN_ROWS = 5  # of each


class RolloutLog:
    """Writes `completions/step-N.parquet` for each rollout, N its first optimizer step, and tells of failed rewards.

    Args:
        output_dir: of the run.
        conversations: the rows that prompts come from.
        telemetry: is told of failures.
    """

    def __init__(self, output_dir: Path, conversations: Sequence[Conversation], telemetry: Telemetry) -> None:
        self.folder, self.conversations, self.telemetry = output_dir / COMPLETIONS, conversations, telemetry
        self.tallies: dict[str, RewardTally] = {}  # by reward, of all rollouts so far
        self._first_step: int | None = None  # of the first rollout: not 1 in a run that goes on

    def __call__(self, at: Position, rollout: Rollout, advantages: Sequence[Sequence[float]]) -> None:
        """Keeps one rollout.

        Raises:
            CheckpointError: the disk refuses.
        """
        step = at.step + 1
        tell_failures(self.telemetry, step, rollout.failures)
        tell_failures(self.telemetry, step, rollout.blind_failures, where="of completions with images blanked")
        if self._first_step is None:
            self._first_step = step
            self._warn(rollout)
        self.tallies = {name: tally + self.tallies.get(name, RewardTally()) for name, tally in rollout.tallies.items()}
        _tell_ablation(self.telemetry, step, rollout.figures)
        path = self.folder / f"step-{step:06d}.parquet"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}")  # a run that is ended half-way leaves no half file under the name of a whole one
            parquet.write_table(self._table(step, rollout, advantages), beside)
            beside.replace(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be written: {error.strerror or error}. Free space there, or choose another output_dir."
            ) from error

    def _warn(self, first: Rollout) -> None:
        """Of rewards that failed in the whole first rollout, which is a mistake in them more often than bad luck."""
        for name, tally in first.tallies.items():
            if tally.always_failed:
                reason = next(failure.message for failure in first.failures if failure.reward == name)
                self.telemetry.warning(
                    f"WARNING: the reward {name} gave no number for any of the {counted(tally.asked, 'completion')} of the first rollout: {reason}. "
                    "The run goes on without what it should have given. If that is not meant, stop the run (Ctrl-C), correct the reward and start again."
                )

    def closing_lines(self) -> list[str]:
        """For the end of a run: for how many completions each reward failed, and whether there was any reward at all."""
        since = "" if self._first_step in (None, 1) else f" since step {self._first_step}"
        lines = [
            f"The reward {name} failed for {tally.failed:,} of {counted(tally.asked, 'completion')}{since}."
            for name, tally in self.tallies.items()
            if tally.failed
        ]
        if gave_no_reward(self.telemetry.history):
            lines.append(
                "No reward was given in any step: there was nothing to learn from. A reward that fails is told of above; one that gives None for "
                "every completion applies to none of these rows."
            )
        return lines

    def _table(self, step: int, rollout: Rollout, advantages: Sequence[Sequence[float]]) -> pyarrow.Table:
        table = pyarrow.Table.from_pylist(self._records(step, rollout, advantages))
        # A column that holds nothing in one rollout must have the type that it has in the others.
        kinds = {"images": pyarrow.list_(pyarrow.string()), "thumbnails": pyarrow.list_(pyarrow.binary()), "failures": pyarrow.string()}
        kinds |= {name: pyarrow.string() for name in table.column_names if name.startswith("extra_")}
        kinds |= {name: pyarrow.float64() for name in table.column_names if name.startswith("reward")}
        for name, kind in kinds.items():
            table = table.set_column(table.schema.get_field_index(name), name, table[name].cast(kind))
        return table

    def _records(self, step: int, rollout: Rollout, advantages: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
        records = []
        extra = dict.fromkeys(name for group in rollout.groups for name in group.extra)
        for number, (group, values) in enumerate(zip(rollout.groups, advantages, strict=True)):
            conversation = self.conversations[group.row]
            prompt = conversation.prompt()
            # Of a few groups, so that a report needs no data; the same bytes in each row of a group are stored once.
            thumbnails = _thumbnails(prompt) if number < PICTURED_GROUPS else None
            for place, (completion, advantage) in enumerate(zip(group.completions, values, strict=True)):
                records.append(
                    {
                        "step": step,
                        "group": number,
                        "file": conversation.source.file,
                        "row": conversation.source.row,
                        "prompt": "\n".join(f"{turn.role}: {turn.text}" for turn in prompt.turns),
                        "images": [describe(part.media) for part in prompt.media if part.media is not None],
                        "thumbnails": thumbnails,
                        "completion": completion.text,
                        "tokens": len(completion.token_ids),
                        "finish_reason": completion.finish_reason,
                        **{f"reward_{name}": _number(rewards[place]) for name, rewards in group.values.items()},
                        "reward": _number(group.totals[place]),
                        "advantage": advantage,
                        "failures": group.failures.get(place),
                        **{f"extra_{name}": _text(group.extra[name][place]) if name in group.extra else None for name in extra},
                    }
                )
        return records


def tell_failures(telemetry: Telemetry, step: int, failures: Sequence[RewardFailure], *, where: str = "") -> None:
    """Tells of rewards that failed, by reward and reason, with the first rows of each; nothing where none did.

    Args:
        where: other than in training, for people: "of held-out prompts".
    """
    if not failures:
        return
    alike: dict[tuple[str, str], list[RewardFailure]] = {}
    for failure in failures:
        alike.setdefault((failure.reward, failure.message), []).append(failure)
    first = [_described(members, len(failures)) for members in list(alike.values())[:_SHOWN_FAILURES]]
    more = f"; and for {counted(len(alike) - len(first), 'further reason')}" if len(alike) > len(first) else ""
    telemetry.event(
        step,
        "reward_failed",
        {"count": len(failures), "failures": first},
        f"{counted(len(failures), 'reward')} {where}{' ' if where else ''}failed and count as not given: {'; '.join(first)}{more}",
    )


def _described(alike: Sequence[RewardFailure], total: int) -> str:
    """Failures of one reward for one reason: the rows, each once, and how many they are where they are not all of the total."""
    rows = sorted({(failure.source.file, failure.source.row) for failure in alike})
    files: dict[str, list[int]] = {}
    for file, row in rows[:_SHOWN_ROWS]:
        files.setdefault(file, []).append(row)
    shown = ", ".join(f"{file}, {'row' if len(of) == 1 else 'rows'} {', '.join(map(str, of))}" for file, of in files.items())
    if len(rows) > _SHOWN_ROWS:
        shown += f" and {counted(len(rows) - _SHOWN_ROWS, 'further row')}"
    times = f" ({len(alike)} times)" if 1 < len(alike) < total else ""
    return f"{alike[0].reward}, {shown}: {alike[0].message}{times}"


def _tell_ablation(telemetry: Telemetry, step: int, figures: Mapping[str, float]) -> None:
    """Says what is earned without looking, where that was measured."""
    seen, blind = (figures.get(f"image_ablation/reward/{side}") for side in ("with_image", "without_image"))
    if seen is not None and blind is not None:
        telemetry.message(f"step {step}: {ablation_words(seen, blind)}")


def ablation_words(seen: float, blind: float) -> str:
    """What two mean rewards say of looking.

    Args:
        seen: with images; blind: of the same prompts with images blanked.
    """
    seen, blind = round(seen, 3), round(blind, 3)  # as they are shown
    if blind > seen:
        meaning = "looking earns nothing so far, and less is earned with it"
    elif blind == seen:
        meaning = "looking earns nothing so far"
    elif blind > 0:
        meaning = "that much is earned without looking"
    else:
        meaning = "nothing is earned without looking"
    return f"reward {seen:.3f} with images, {blind:.3f} with images blanked: {meaning}"


def _thumbnails(prompt: Conversation) -> list[bytes | None]:
    """Small pictures of a prompt's images and videos, None where one cannot be opened any more."""
    found: list[bytes | None] = []
    for part in prompt.media:
        try:
            found.append(thumbnail_of(part))
        except MediaError:
            found.append(None)
    return found


def _text(value: Any) -> str | None:
    """What a function logged may be anything, and of another kind each time."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _number(value: float | None) -> float | None:
    """A whole-numbered reward must not make a column of integers in one file and of floats in another."""
    return None if value is None else float(value)
