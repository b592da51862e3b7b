"""Drawing on a GPU: compiled or not, captured or not, the tokens of one running sum on the host."""

from __future__ import annotations

import pytest
import torch

from finesight.models.compilation import CompiledFunction
from finesight.sampling.drawing import RowSettings, draw, kept_tokens, scores_of
from finesight.sampling.types import SamplingSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("vocabulary", [151_936, 1_001])
def test_a_captured_draw_is_that_of_one_running_sum(compiled: bool, truncates: bool, vocabulary: int) -> None:
    torch.manual_seed(0)
    told: list[str] = []
    draw_tokens = CompiledFunction(draw, told.append, what="Draws") if compiled else draw
    rows = 64
    settings = RowSettings.empty(rows, torch.device("cuda"))
    for row in range(1, rows):
        settings.write(row, SamplingSettings(temperature=1.0 + row % 2, top_p=0.9 if truncates and row % 3 == 0 else 1.0))
    logits = (torch.randn(rows, vocabulary, device="cuda") * 3).bfloat16()
    logits[:, ::5] = -torch.inf
    scores = scores_of(logits, settings, None)
    kept = kept_tokens(scores, settings) if truncates else None
    uniform = torch.rand(rows, dtype=torch.float64, device="cuda")

    def step() -> torch.Tensor:
        return draw_tokens(logits, uniform, settings, None, kept).token

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = step()
    for _ in range(5):
        uniform.uniform_()
        graph.replay()
        drawable = scores if kept is None else scores.masked_fill(~kept, -torch.inf)
        running = drawable.cpu().double().softmax(-1).cumsum(-1)
        wanted = uniform.cpu()
        expected = torch.searchsorted(running, wanted[:, None] * running[:, -1:], right=True).squeeze(1)
        assert token[0] == logits[0].argmax()
        assert drawable.gather(1, token[:, None]).isfinite().all()
        for row in (token.cpu() != expected).nonzero().squeeze(1).tolist():
            if row:  # at the border of the two tokens, closer than probabilities round
                assert abs(wanted[row] - running[row, min(int(token[row]), int(expected[row]))]) < 1e-6
    assert not told
