"""The comparison of divisions: what is compared, and that a machine without a GPU says so."""

from __future__ import annotations

import pytest
import torch
from bench import few_rows, rows

from finesight.models.few_rows import tiles_for


def test_compares_what_is_in_use_with_others() -> None:
    found = list(few_rows.divisions((9728, 9728), 2560))
    assert found[0] == tiles_for((9728, 9728), 2560)
    assert len(found) == len(set(map(few_rows.label, found))) >= 5


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU")
def test_without_a_gpu_every_group_is_a_row_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    few_rows.main(["--model", "qwen3-vl-4b"])
    found = [row for line in capsys.readouterr().out.splitlines() if (row := rows.parse(line)) is not None]
    chains = [("chain", adapter, True) for adapter in (False, True) for _ in range(2)]
    groups = [("+".join(group), adapter, True) for group in few_rows.GROUPS for adapter in (False, True)]
    assert [(row["group"], row["adapter"], row["failed"]) for row in found] == chains + groups
