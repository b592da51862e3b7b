"""Fine-tune on questions about charts from Python, and measure what it brought.

    python examples/finetune_charts.py --model Qwen/Qwen3-VL-4B-Instruct

The charts are drawn here, so nothing but the model is needed. With data of your own, begin at step 2.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

import finesight
from finesight.data.formats import read_source
from finesight.data_settings import DataSettings, SourceSettings
from finesight.evaluation.compare import compare
from finesight.evaluation.evaluate import evaluate
from finesight.sampling.forking_sampler import ForkingSampler
from finesight.sampling.types import SamplingSettings
from finesight.tasks.graders import get_grader
from finesight.tasks.task import Task

QUESTION = "What is the value of {label}? Answer with the number."


# Step 1: data. One JSON object a line; image paths are relative to the file. Two questions about each chart: the chart
# is computed once for both.
def draw_charts(folder: Path, name: str, count: int, seed: int) -> Path:
    """Draws bar charts and writes the questions about them; returns the data file."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    draw_from = random.Random(seed)
    rows = []
    for number in range(count):
        values = {label: draw_from.randint(1, 20) for label in "ABCD"}
        image = Image.new("RGB", (320, 240), "white")
        pen = ImageDraw.Draw(image)
        for place, (label, value) in enumerate(values.items()):
            left = 30 + 70 * place
            pen.rectangle((left, 210 - 9 * value, left + 40, 210), fill=("steelblue", "salmon", "seagreen", "goldenrod")[place])
            pen.text((left + 16, 216), label, fill="black")
            pen.text((left + 12, 196 - 9 * value), str(value), fill="black")
        image.save(folder / name / f"{number}.png")
        for label in draw_from.sample("ABCD", 2):
            user = [{"type": "image", "image": f"{name}/{number}.png"}, {"type": "text", "text": QUESTION.format(label=label)}]
            rows.append({"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": str(values[label])}]})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-VL-4B-Instruct")
    parser.add_argument("--output", type=Path, default=Path("runs/chart_example"))
    parser.add_argument("--charts", type=int, default=200)
    parser.add_argument("--max-steps", type=int, default=None)
    arguments = parser.parse_args()
    train_file = draw_charts(arguments.output / "data", "train", arguments.charts, seed=0)
    test_file = draw_charts(arguments.output / "data", "test", max(arguments.charts // 5, 2), seed=1)

    # Step 2: a model, and what it is judged by. The grader is the one of ChartQA: numbers may be off by 5%.
    loaded = finesight.load(arguments.model)
    rows = read_source(SourceSettings(path=str(test_file)), data=DataSettings(), base_dir=Path.cwd()).conversations
    task = Task("charts", tuple(rows), get_grader("relaxed_accuracy"), "relaxed_accuracy")
    answering = SamplingSettings(max_completion_length=8)
    before = evaluate(ForkingSampler(loaded.model, loaded.processor), [task], answering)

    # Step 3: training. Any setting of a recipe can be given by its name.
    trainer = finesight.SFTTrainer(
        loaded,
        train_dataset=train_file,
        eval_dataset=test_file,
        output_dir=arguments.output / "run",
        r=16,
        lora_alpha=16,
        learning_rate=1e-4,
        train_batch_size=16,
        max_steps=arguments.max_steps,
        eval_strategy="epoch",
    )
    result = trainer.train()

    # Step 4: the same judgement again. `verdict` says whether the change is more than chance.
    after = evaluate(ForkingSampler(trainer.model, trainer.processor), [task], answering)
    change = compare(before, after).task("charts")
    print(f"charts: {change.before:.1%} -> {change.after:.1%} of {change.num_pairs} questions, {change.verdict}")
    print(f"adapter: {result.adapter_dir}")


if __name__ == "__main__":
    main()
