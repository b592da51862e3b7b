"""Rewards: graders of the library and functions of the user, called for all completions of a step.

A function is called as TRL calls it, f(prompts, completions, completion_ids, **columns) -> list[float | None], but with
exactly those keywords that its signature has. Whatever goes wrong in one reward is a failure of that reward for those
completions: it is reported with the row, counts as not applicable, and the run goes on.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import inspect
import math
import time
import traceback
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any

from finesight.data.conversation import Conversation
from finesight.errors import EvaluationError
from finesight.grpo_settings import RewardSettings
from finesight.tasks.deadline import TimeLimitExceeded, await_within, call_within, in_thread, wait_for
from finesight.tasks.frames import Frames
from finesight.tasks.graders import get_grader
from finesight.tasks.reward_types import Earned, Reward, RewardCall, RewardFailure, RewardResult, RewardStatistics
from finesight.tasks.user_code import is_user_function, load_function
from finesight.wording import counted

SIGNATURE = "(completions, **columns)"
_GRACE_S = 5.0  # beyond the limit of the slowest coroutine, for cancelling
_TRL_EXTRAS = ("trainer_state", "log_metric", "log_extra")  # what TRL gives besides columns
_ALWAYS_THERE = ("prompts", "completions", "completion_ids", "images", "answer", *_TRL_EXTRAS)
Values = list[float | None]


def load_rewards(
    settings: Sequence[RewardSettings],
    *,
    base_dir: Path,
    frames: Frames | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> tuple[Reward, ...]:
    """The rewards of a recipe. Only here is code of the user loaded; no data file can name any.

    Args:
        base_dir: folder that modules and files of the user are looked up in first.
        frames: how the model writes coordinates, for graders of boxes.
        functions: by the names that settings give them: functions that are in memory, and are not looked up.

    Raises:
        EvaluationError: there is no such grader, option, module or function, or two rewards have one name.
    """
    rewards = tuple(_load(one, base_dir, frames, functions or {}) for one in settings)
    names = [reward.name for reward in rewards]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"The reward {twice[0]!r} is given twice; give it once, with the sum of the weights.")
    return rewards


def _load(settings: RewardSettings, base_dir: Path, frames: Frames | None, functions: Mapping[str, Callable[..., Any]]) -> Reward:
    function = functions.get(settings.name)
    if function is None and not is_user_function(settings.name):
        grader = get_grader(settings.name, settings.options, base_dir=base_dir, frames=frames)
        return Reward(settings.name, settings.weight, settings.timeout_s, grader)
    if function is None:
        function = load_function(settings.name, kind="Reward", signature=SIGNATURE, base_dir=base_dir)
    if settings.options:
        function = functools.partial(function, **settings.options)
    return function_reward(function, name=settings.name, weight=settings.weight, timeout_s=settings.timeout_s, given=settings.options)


def function_reward(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    weight: float = 1.0,
    timeout_s: float = 60.0,
    given: Mapping[str, Any] | None = None,
) -> Reward:
    """A function in TRL's shape as a reward.

    Args:
        given: keywords that are bound already.

    Raises:
        EvaluationError: its signature cannot be called with keywords alone.
    """
    label = name or str(getattr(function, "__name__", type(function).__name__))
    try:
        parameters = [p for key, p in inspect.signature(function).parameters.items() if key not in (given or {})]
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"Reward {label!r}: its signature cannot be read ({error}). Wrap it in a function of yours.") from None
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise EvaluationError(f"Reward {label!r} has parameters without a name to call them by. Define it as f{SIGNATURE}.")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Reward(
        name=label,
        weight=weight,
        timeout_s=timeout_s,
        function=function,
        takes=tuple(p.name for p in named if p.default is p.empty),
        may_take=None if takes_all else tuple(p.name for p in named if p.default is not p.empty),
        is_async=_is_async(function),
    )


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(type(function), "__call__", None))  # noqa: B004


def check_rewards(rewards: Sequence[Reward], conversations: Sequence[Conversation]) -> None:
    """Refuses, before a run, functions that ask for a column that the rows do not have, and rows that a grader cannot judge.

    Raises:
        EvaluationError: what is missing, and where.
    """
    columns = {name for conversation in conversations for name in conversation.extra}
    known = sorted(columns | set(_ALWAYS_THERE))
    for reward in rewards:
        if reward.grader is not None:
            for conversation in conversations:
                reward.grader.check(conversation)
        for wanted in reward.takes:
            if _column_for(wanted, known) is None:
                near = difflib.get_close_matches(wanted, [name for name in known if name not in reward.takes], n=1)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                hint += f"A column {wanted!r} of a table is handed over if it stands in columns.extra. "
                hint += f"The rows have: {', '.join(sorted(columns)) or 'no further columns'}; "
                hint += f"without a column there are: {', '.join(_ALWAYS_THERE)}."
                raise EvaluationError(f"Reward {reward.name!r} takes {wanted!r}, which is no column of the rows. {hint}")


def _column_for(wanted: str, names: Container[str]) -> str | None:
    """The column for a parameter: of this name, or of its singular, since a function is given a list (`ground_truths`)."""
    return next((name for name in (wanted, wanted.removesuffix("s")) if name in names), None)


@dataclass
class _Collected:
    """What comes of one reward for the completions of a call."""

    values: Values
    failures: list[RewardFailure] = field(default_factory=list)
    seconds: float = 0.0


class RewardSet:
    """The rewards of a run. Remembers the largest value that each has given.

    Args:
        rewards: in the order in which they are called and shown.
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = tuple(rewards)
        self._ceilings = {reward.name: -math.inf if reward.ceiling is None else reward.ceiling for reward in rewards}

    def __call__(self, call: RewardCall) -> RewardResult:
        """The rewards of all completions of a step, and their figures."""
        return self.result(self.earned(call), call.group)

    def earned(self, call: RewardCall) -> Earned:
        """What completions earn. Coroutines run side by side, and beside the other functions, which take turns."""
        if not len(call):
            return Earned(0, {r.name: [] for r in self.rewards}, (), {r.name: 0.0 for r in self.rewards})
        logged = _Logged(len(call))
        coroutines = _Coroutines([reward for reward in self.rewards if reward.is_async], call, logged)
        collected: dict[str, _Collected] = {}
        for reward in self.rewards:
            if not reward.is_async:
                collected[reward.name] = _collect(reward, call, functools.partial(_call_reward, reward, logged=logged))
        for reward in coroutines.rewards:
            collected[reward.name] = _collect(reward, call, functools.partial(coroutines.outcome, reward))
            collected[reward.name].seconds += coroutines.seconds.get(reward.name, 0.0)
        return Earned(
            count=len(call),
            values={reward.name: collected[reward.name].values for reward in self.rewards},
            failures=tuple(failure for reward in self.rewards for failure in collected[reward.name].failures),
            seconds={reward.name: collected[reward.name].seconds for reward in self.rewards},
            metrics=logged.metrics,
            extra=logged.extra,
        )

    def result(self, earned: Earned, group: Sequence[int]) -> RewardResult:
        """Totals and figures of what completions earned.

        Args:
            group: (B,) completions of one prompt share a number.
        """
        totals = tuple(_total([(r.weight, earned.values[r.name][i]) for r in self.rewards]) for i in range(earned.count))
        statistics = {}
        for reward in self.rewards:
            values = earned.values[reward.name]
            if reward.ceiling is None:
                self._ceilings[reward.name] = max([self._ceilings[reward.name], *(v for v in values if v is not None)])
            failed = sum(failure.reward == reward.name for failure in earned.failures)
            statistics[reward.name] = reward_statistics(
                values, group, ceiling=self._ceilings[reward.name], failed=failed, seconds=earned.seconds[reward.name]
            )
        known = [value for value in totals if value is not None]
        return RewardResult(
            values={name: tuple(values) for name, values in earned.values.items()},
            totals=totals,
            failures=earned.failures,
            statistics=statistics,
            total_statistics=reward_statistics(totals, group, ceiling=max(known, default=0.0)),
            metrics={name: tuple(values) for name, values in earned.metrics.items()},
            extra={name: tuple(values) for name, values in earned.extra.items()},
        )


def reward_statistics(
    values: Sequence[float | None], group: Sequence[int], *, ceiling: float, failed: int = 0, seconds: float = 0.0
) -> RewardStatistics:
    """Figures of one reward.

    Args:
        values: (B,) None where it does not apply.
        group: (B,) completions of one prompt share a number.
        ceiling: its largest possible value.
    """
    known = [value for value in values if value is not None]
    groups: dict[int, list[float]] = {}
    for value, number in zip(values, group, strict=True):
        if value is not None:
            groups.setdefault(number, []).append(value)
    several = [members for members in groups.values() if len(members) > 1]
    mean = math.fsum(known) / len(known) if known else math.nan
    return RewardStatistics(
        count=len(known),
        failed=failed,
        mean=mean,
        spread=math.sqrt(math.fsum((value - mean) ** 2 for value in known) / max(len(known) - 1, 1)) if known else math.nan,
        minimum=min(known, default=math.nan),
        maximum=max(known, default=math.nan),
        saturation=sum(value >= ceiling for value in known) / len(known) if known else math.nan,
        constant_groups=sum(min(members) == max(members) for members in several) / len(several) if several else math.nan,
        seconds=seconds,
    )


class _Logged:
    """What functions log through TRL's `log_metric(name, value)` and `log_extra(column, values)`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) == self.count:  # a call for one completion alone has no column for all
            self.extra[column] = list(values)


def _total(parts: Sequence[tuple[float, float | None]]) -> float | None:
    known = [weight * value for weight, value in parts if value is not None]
    return math.fsum(known) if known else None


def _collect(reward: Reward, call: RewardCall, outcome: Callable[[RewardCall], Any]) -> _Collected:
    """Values of one reward: from one call for all; if that raises, from a call for each completion, to find whose fault it is.

    A call that overran its time is not repeated.
    """
    started = time.perf_counter()
    collected = _Collected([None] * len(call))
    if len(call):
        try:
            _take(collected, reward, call, outcome(call), range(len(call)))
        except TimeLimitExceeded as error:
            _fail(collected, reward, call, range(len(call)), "timeout", str(error))
        except (Exception, SystemExit) as error:
            if len(call) == 1:
                _fail(collected, reward, call, [0], "error", _raised(reward, error))
            else:
                _one_by_one(collected, reward, call, outcome, time.perf_counter() + reward.timeout_s)
    collected.seconds = time.perf_counter() - started
    return collected


def _one_by_one(collected: _Collected, reward: Reward, call: RewardCall, outcome: Callable[[RewardCall], Any], until: float) -> None:
    for index in range(len(call)):
        if time.perf_counter() > until:
            left = range(index, len(call))
            _fail(
                collected,
                reward,
                call,
                left,
                "timeout",
                f"the calls one by one, after one for all failed, took longer than {reward.timeout_s:g} s",
            )
            return
        try:
            _take(collected, reward, call, outcome(call.only(index)), [index])
        except TimeLimitExceeded as error:
            _fail(collected, reward, call, [index], "timeout", str(error))
        except (Exception, SystemExit) as error:
            _fail(collected, reward, call, [index], "error", _raised(reward, error))


def _take(collected: _Collected, reward: Reward, call: RewardCall, given: Any, places: Sequence[int]) -> None:
    """Checks what a function returned: as many numbers or None as it was given completions."""
    if hasattr(given, "tolist"):  # an array or tensor
        given = given.tolist()
    if not isinstance(given, (list, tuple)) or len(given) != len(places):
        shown = f"{len(given)} values" if isinstance(given, (list, tuple)) else repr(given)[:80]
        _fail(
            collected,
            reward,
            call,
            places,
            "value",
            f"it gave {shown} for {counted(len(places), 'completion')}; it must give a list of one number or None for each, as "
            f"f{SIGNATURE} -> list[float | None]",
        )
        return
    for place, value in zip(places, given, strict=True):
        if value is None:
            continue
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            collected.values[place] = number
        else:
            _fail(
                collected,
                reward,
                call,
                [place],
                "value",
                f"it gave {repr(value)[:80]}, which is no finite number; give None where it does not apply",
            )


def _fail(collected: _Collected, reward: Reward, call: RewardCall, places: Sequence[int], kind: Any, message: str) -> None:
    collected.failures += [RewardFailure(reward.name, place, call.conversations[place].source, kind, message) for place in places]


def _raised(reward: Reward, error: BaseException) -> str:
    """What a reward raised and, of a function of the user, the last of its file's lines that led there."""
    function: Any = reward.function
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    frames = [] if code is None else [f for f in traceback.extract_tb(error.__traceback__) if f.filename == code.co_filename]
    place = f" (line {frames[-1].lineno} of {PurePath(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _call_reward(reward: Reward, call: RewardCall, *, logged: _Logged) -> Any:
    def give() -> Any:
        if reward.grader is not None:
            return [reward.grader(text, conversation) for text, conversation in zip(call.texts, call.conversations, strict=True)]
        return _called(reward, call, logged)

    return call_within(reward.timeout_s, give)


class _Coroutines:
    """Rewards that are coroutines, begun at once, side by side.

    They run in a thread, where an event loop can be had even if this one has one already, as notebooks have.
    """

    def __init__(self, rewards: Sequence[Reward], call: RewardCall, logged: _Logged) -> None:
        self.rewards, self.call, self.logged = tuple(rewards), call, logged
        self.seconds: dict[str, float] = {}
        self._found: dict[str, Any] | TimeLimitExceeded | None = None
        try:
            self._future = in_thread(lambda: asyncio.run(self._all())) if rewards else None
        except TimeLimitExceeded as error:
            self._found = error

    def outcome(self, reward: Reward, call: RewardCall) -> Any:
        """What it gave for these completions. Raises what it raised, or TimeLimitExceeded."""
        if call is not self.call:  # one completion alone, after the call for all failed
            return wait_for(in_thread(lambda: asyncio.run(self._await(reward, call))), reward.timeout_s + _GRACE_S)
        if self._found is None and self._future is not None:
            try:
                self._found = wait_for(self._future, max(other.timeout_s for other in self.rewards) + _GRACE_S)
            except TimeLimitExceeded as error:  # one of them keeps the loop from going on
                self._found = error
        found = self._found[reward.name] if isinstance(self._found, dict) else self._found
        if isinstance(found, BaseException):
            raise found
        return found

    async def _all(self) -> dict[str, Any]:
        found = await asyncio.gather(*(self._settled(reward) for reward in self.rewards))
        return dict(zip((reward.name for reward in self.rewards), found, strict=True))

    async def _settled(self, reward: Reward) -> Any:
        """What it gave or raised: a failure of one must not end the others."""
        started = time.perf_counter()
        try:
            return await self._await(reward, self.call)
        except (Exception, SystemExit) as error:
            return error
        finally:
            self.seconds[reward.name] = time.perf_counter() - started

    async def _await(self, reward: Reward, call: RewardCall) -> Any:
        return await await_within(reward.timeout_s, lambda: _called(reward, call, self.logged))


def _called(reward: Reward, call: RewardCall, logged: _Logged) -> Any:
    if reward.function is None:
        raise EvaluationError(f"Reward {reward.name!r} has neither a grader nor a function.")
    return reward.function(**_arguments(reward, call, logged))


def _arguments(reward: Reward, call: RewardCall, logged: _Logged) -> dict[str, Any]:
    """Exactly what its signature takes."""
    known = call.keywords()
    state = SimpleNamespace(global_step=call.step, max_steps=call.max_steps)
    known |= {"trainer_state": state, "log_metric": logged.log_metric, "log_extra": logged.log_extra}
    wanted = [*reward.takes, *(known if reward.may_take is None else reward.may_take)]
    columns = {name: _column_for(name, known) for name in wanted}
    if missing := [name for name in reward.takes if columns[name] is None]:
        raise EvaluationError(
            f"it takes {missing[0]!r}, which is no column of the rows; they have: {', '.join(sorted(call.conversations[0].extra))}"
        )
    return {name: known[column] for name, column in columns.items() if column is not None}
