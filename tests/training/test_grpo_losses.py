"""Policy losses against formulas written out over padded tensors, and against values worked by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from finesight.training.grpo_losses import (
    PolicyRecords,
    StepTotals,
    group_advantages,
    k3_divergence,
    overlong_penalty,
    policy_loss,
    truncated_importance_weights,
)  # fmt: skip

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo")
LENGTHS = (3, 5, 1, 4)
MAX_LENGTH = 6


def padded_loss(kind, logprobs, mask, advantages, *, old=None, reference=None, sampler=None, epsilon=0.2, high=None, beta=0.0, cap=2.0):
    """The papers' formulas with loops over completions and tokens; (B, L) tensors and a mask."""
    completions = len(advantages)
    old = logprobs.detach() if old is None else old
    total = logprobs.new_zeros(())
    tokens = mask.sum()
    for i in range(completions):
        chosen = mask[i].bool()
        length = int(chosen.sum())
        if not length:
            continue
        lp, old_lp = logprobs[i][chosen], old[i][chosen]
        ratios = torch.exp(lp - old_lp)
        if kind == "gspo":
            ratios = torch.exp(((lp - old_lp).sum()) / length).repeat(length)
        for t in range(length):
            if kind == "cispo":
                bound = 5.0 if high is None else high
                objective = min(ratios[t].item(), bound) * advantages[i] * lp[t]
            else:
                upper = 1 + (epsilon if high is None else high)
                clipped = min(max(ratios[t], torch.tensor(1 - epsilon, dtype=lp.dtype)), torch.tensor(upper, dtype=lp.dtype))
                objective = min(ratios[t] * advantages[i], clipped * advantages[i])
            term = -objective
            if sampler is not None:
                term = term * min(math.exp(old_lp[t] - sampler[i][chosen][t]), cap)
            if reference is not None and beta:
                r = reference[i][chosen][t] - lp[t]
                term = term + beta * (torch.exp(r) - r - 1)
            total = total + term / {"grpo": completions * length, "gspo": completions * length, "dr_grpo": completions * MAX_LENGTH}.get(
                kind, tokens
            )
    return total


class Case:
    """The same random completions as padded tensors and as records in a mixed order."""

    def __init__(self, seed: int = 0, lengths=LENGTHS):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        rows, columns = len(lengths), MAX_LENGTH
        self.mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).double()
        self.logprobs = (-draw(rows, columns).abs()).requires_grad_()
        self.old, self.reference, self.sampler = (self.logprobs.detach() + 0.3 * draw(rows, columns) for _ in range(3))
        self.advantages = draw(rows)
        places = self.mask.bool().nonzero()
        self.places = places[torch.randperm(len(places), generator=generator)]
        self.totals = StepTotals(rows, sum(lengths), MAX_LENGTH)

    def flat(self, values):
        return values[self.places[:, 0], self.places[:, 1]]

    def records(self, *, old=True, reference=True, sampler=True) -> PolicyRecords:
        return PolicyRecords(
            sequence=self.places[:, 0],
            weight=torch.ones(len(self.places), dtype=torch.float64),
            advantages=self.advantages,
            old_logprobs=self.flat(self.old) if old else None,
            reference_logprobs=self.flat(self.reference) if reference else None,
            sampler_logprobs=self.flat(self.sampler) if sampler else None,
        )


def gradient(loss, logprobs):
    return torch.autograd.grad(loss, logprobs, retain_graph=True)[0]


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize(
    ("old", "reference", "sampler"),
    [(False, False, False), (True, False, False), (True, True, False), (True, True, True), (False, True, True)],
)
@pytest.mark.parametrize(("epsilon", "high"), [(0.2, None), (0.1, 0.28)])
def test_equals_the_formula_over_padded_tensors(kind, old, reference, sampler, epsilon, high):
    case = Case()
    options = dict(epsilon=epsilon, beta=0.04)
    expected = padded_loss(
        kind, case.logprobs, case.mask, case.advantages, old=case.old if old else None, reference=case.reference if reference else None,
        sampler=case.sampler if sampler else None, high=high, cap=1.1, **options,
    )  # fmt: skip
    records = case.records(old=old, reference=reference, sampler=sampler)
    found = policy_loss(
        case.flat(case.logprobs), records, case.totals, loss_type=kind, epsilon_high=high, importance_cap=1.1, **options
    ).loss
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient(found, case.logprobs), gradient(expected, case.logprobs), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_in_parts_has_the_same_gradient(kind):
    """Completions of one group in several packs, each pack numbering its own."""
    case = Case(seed=1)
    records = case.records()
    whole = policy_loss(case.flat(case.logprobs), records, case.totals, loss_type=kind, beta=0.1)
    parts = []
    for members in ([0], [1, 3], [2]):
        rows = torch.isin(records.sequence, torch.tensor(members))
        renumber = torch.full((len(LENGTHS),), -1)
        renumber[members] = torch.arange(len(members))
        part = PolicyRecords(
            renumber[records.sequence[rows]], records.weight[rows], records.advantages[members],
            records.old_logprobs[rows], records.reference_logprobs[rows], records.sampler_logprobs[rows],
        )  # fmt: skip
        parts.append(policy_loss(case.flat(case.logprobs)[rows], part, case.totals, loss_type=kind, beta=0.1))
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(gradient(sum(part.loss for part in parts), case.logprobs), gradient(whole.loss, case.logprobs))
    for name in ("tokens", "clipped_low", "clipped_high", "kl", "ratio", "importance"):
        torch.testing.assert_close(sum(getattr(part, name) for part in parts), getattr(whole, name))


@pytest.mark.parametrize("kind", LOSSES)
def test_what_does_not_count_does_not_matter(kind):
    """Filling and masked completions, even with log-probabilities that are not finite."""
    case = Case(seed=2)
    records, logprobs = case.records(), case.flat(case.logprobs)
    masked = records.sequence == 1
    alone = policy_loss(
        logprobs[~masked], replace(records, sequence=records.sequence[~masked], weight=records.weight[~masked], old_logprobs=records.old_logprobs[~masked],
        reference_logprobs=records.reference_logprobs[~masked], sampler_logprobs=records.sampler_logprobs[~masked]),
        case.totals, loss_type=kind, beta=0.1,
    ).loss  # fmt: skip
    broken = {
        name: torch.where(masked, float("-inf"), getattr(records, name))
        for name in ("old_logprobs", "reference_logprobs", "sampler_logprobs")
    }
    found = policy_loss(
        torch.where(masked, float("-inf"), logprobs),
        replace(records, weight=(~masked).double(), **broken),
        case.totals,
        loss_type=kind,
        beta=0.1,
    )
    torch.testing.assert_close(found.loss, alone)
    assert found.tokens == sum(LENGTHS) - LENGTHS[1]
    torch.testing.assert_close(gradient(found.loss, case.logprobs), gradient(alone, case.logprobs))


def one_completion(logprobs, advantage, **others):
    records = PolicyRecords(
        torch.zeros(len(logprobs), dtype=torch.int64), torch.ones(len(logprobs), dtype=torch.float64), torch.tensor([advantage]), **others
    )
    return torch.tensor(logprobs, dtype=torch.float64, requires_grad=True), records


class TestByHand:
    """Two tokens of one completion, ratios 1.5 and 0.5, in a step of two completions and five tokens; most 10 tokens each."""

    TOTALS = StepTotals(sequences=2, tokens=5, max_completion_length=10)
    OLD = torch.tensor([math.log(0.2), math.log(0.4)], dtype=torch.float64)
    NEW = (math.log(0.3), math.log(0.2))

    @pytest.mark.parametrize(
        ("kind", "advantage", "expected"),
        [
            # Clipped from above: min(1.5, 1.2) + min(0.5, 0.8) = 1.7.
            ("grpo", 1.0, -1.7 / 4), ("dr_grpo", 1.0, -1.7 / 20), ("dapo", 1.0, -1.7 / 5), ("bnpo", 1.0, -1.7 / 5),
            # With A = -2 the larger product counts: max(1.5, 1.2) + max(0.5, 0.8) = 2.3.
            ("grpo", -2.0, 4.6 / 4), ("dapo", -2.0, 4.6 / 5),
            # √(1.5 · 0.5) = 0.866 for both: not clipped at 0.8.
            ("gspo", 1.0, -math.sqrt(0.75) / 2),
            # 1.5 · log 0.3 + 0.5 · log 0.2.
            ("cispo", 1.0, -(1.5 * math.log(0.3) + 0.5 * math.log(0.2)) / 5),
        ],
    )  # fmt: skip
    def test_values(self, kind, advantage, expected):
        logprobs, records = one_completion(self.NEW, advantage, old_logprobs=self.OLD)
        assert policy_loss(logprobs, records, self.TOTALS, loss_type=kind).loss.item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(
        ("kind", "advantage", "expected"),
        [
            ("dapo", 1.0, [0, -0.5 / 5]),  # the first is clipped: no gradient; d ratio / d log π = ratio
            ("dapo", -2.0, [2 * 1.5 / 5, 0]),
            ("gspo", 1.0, [-math.sqrt(0.75) / 4] * 2),  # half of the completion's each
            ("cispo", 1.0, [-1.5 / 5, -0.5 / 5]),
        ],
    )
    def test_gradients(self, kind, advantage, expected):
        logprobs, records = one_completion(self.NEW, advantage, old_logprobs=self.OLD)
        assert gradient(policy_loss(logprobs, records, self.TOTALS, loss_type=kind).loss, logprobs).tolist() == pytest.approx(
            expected, rel=1e-12
        )

    def test_cispo_bounds_the_ratio_and_keeps_the_gradient(self):
        logprobs, records = one_completion(self.NEW, 1.0, old_logprobs=self.OLD)
        loss = policy_loss(logprobs, records, self.TOTALS, loss_type="cispo", epsilon_high=1.2)
        assert gradient(loss.loss, logprobs).tolist() == pytest.approx([-1.2 / 5, -0.5 / 5])
        assert (loss.clipped_high.item(), loss.clipped_low.item()) == (1, 0)

    def test_on_policy_the_gradient_is_that_of_the_log_probability(self):
        logprobs, records = one_completion(self.NEW, 3.0)
        for kind in ("dapo", "cispo"):
            loss = policy_loss(logprobs, records, self.TOTALS, loss_type=kind)
            assert gradient(loss.loss, logprobs).tolist() == pytest.approx([-3 / 5] * 2)
            assert loss.ratio.item() == 2

    def test_figures(self):
        for advantage, low, high in ((1.0, 0, 1), (-1.0, 1, 0)):
            logprobs, records = one_completion(self.NEW, advantage, old_logprobs=self.OLD, reference_logprobs=torch.tensor(self.NEW))
            found = policy_loss(logprobs, records, self.TOTALS)
            assert [value.item() for value in (found.tokens, found.clipped_low, found.clipped_high, found.ratio)] == pytest.approx(
                [2, low, high, 2.0]
            )
            assert found.kl.item() == pytest.approx(0, abs=1e-12)
            assert found.importance.item() == 2
            assert not found.kl.requires_grad and not found.ratio.requires_grad

    def test_importance_weights(self):
        sampler = torch.tensor([math.log(0.1), math.log(0.5)], dtype=torch.float64)
        weights = truncated_importance_weights(self.OLD, sampler, 1.5)
        assert weights.tolist() == pytest.approx([1.5, 0.8])  # 2 truncated, 0.4 / 0.5
        logprobs, records = one_completion(self.NEW, 1.0, old_logprobs=self.OLD, sampler_logprobs=sampler)
        found = policy_loss(logprobs, records, self.TOTALS, importance_cap=1.5)
        assert found.loss.item() == pytest.approx(-(1.2 * 1.5 + 0.5 * 0.8) / 5)
        assert (found.importance.item(), found.truncated.item()) == (pytest.approx(2.3), 1)
        # The weight is a constant: the gradient is that of the terms alone, each times its weight.
        assert gradient(found.loss, logprobs).tolist() == pytest.approx([0, -0.5 * 0.8 / 5])  # the first ratio is clipped

    def test_token_means_of_several_processes(self):
        logprobs, records = one_completion(self.NEW, 1.0, old_logprobs=self.OLD)
        totals = replace(self.TOTALS, process_tokens=2, num_processes=3)
        assert policy_loss(logprobs, records, totals, loss_type="bnpo").loss.item() == pytest.approx(-1.7 / 2 / 3)
        assert policy_loss(logprobs, records, totals, loss_type="dapo").loss.item() == pytest.approx(-1.7 / 5)


def test_the_divergence():
    logprobs = torch.tensor([math.log(0.5), math.log(0.5)], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([math.log(0.5), math.log(0.25)], dtype=torch.float64)
    assert k3_divergence(logprobs, reference).tolist() == pytest.approx([0, 0.5 + math.log(2) - 1])
    # d/d log π = 1 - π_ref / π
    assert gradient(k3_divergence(logprobs, reference).sum(), logprobs).tolist() == pytest.approx([0, 0.5])


def test_a_batch_without_records():
    records = PolicyRecords(torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0))
    for kind in LOSSES:
        assert policy_loss(torch.zeros(0), records, StepTotals(0, 0, 4), loss_type=kind).loss.item() == 0


class TestAdvantages:
    REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    GROUP = torch.tensor([0, 0, 0, 0, 1, 1])

    def test_by_hand(self):
        std = math.sqrt(1 / 3)  # four values half a unit from their mean, over 3
        for scale, expected in (
            ("none", [0.5, -0.5, -0.5, 0.5, 0, 0]),
            ("group", [x / (std + 1e-4) for x in (0.5, -0.5, -0.5, 0.5, 0, 0)]),
        ):
            advantages, deviations = group_advantages(self.REWARDS, self.GROUP, 2, scale)
            assert advantages.tolist() == pytest.approx(expected)
            assert deviations.tolist() == pytest.approx([std, 0])

    def test_over_the_deviation_of_all(self):
        advantages, _ = group_advantages(self.REWARDS, self.GROUP, 2, "batch")
        assert advantages.tolist() == pytest.approx([x / (self.REWARDS.std().item() + 1e-4) for x in (0.5, -0.5, -0.5, 0.5, 0, 0)])

    def test_groups_may_lie_in_any_order(self):
        order = torch.tensor([4, 0, 5, 2, 1, 3])
        for scale in ("group", "batch", "none"):
            plain, _ = group_advantages(self.REWARDS, self.GROUP, 2, scale)
            mixed, _ = group_advantages(self.REWARDS[order], self.GROUP[order], 2, scale)
            torch.testing.assert_close(mixed, plain[order])

    def test_completions_without_a_reward_are_left_out(self):
        rewards = torch.tensor([1.0, float("nan"), 0.0, float("nan"), float("nan"), 2.0], dtype=torch.float64)
        group = torch.tensor([0, 0, 0, 1, 1, 2])
        advantages, deviations = group_advantages(rewards, group, 3, "none")
        assert advantages.tolist() == [0.5, 0, -0.5, 0, 0, 0]
        assert deviations.tolist() == pytest.approx([math.sqrt(0.5), 0, 0])
        assert all(group_advantages(rewards, group, 3, scale)[0].isfinite().all() for scale in ("group", "batch"))


def test_the_overlong_penalty():
    lengths = torch.tensor([10, 80, 90, 100, 120])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -1, -1])
