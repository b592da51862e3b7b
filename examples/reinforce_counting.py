"""Reinforcement from Python: a model learns to count dots from rewards alone, without being shown an answer.

    python examples/reinforce_counting.py --model Qwen/Qwen3-VL-4B-Instruct

The pictures are drawn here, so nothing but the model is needed.
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig
from PIL import Image, ImageDraw

import finesight

QUESTION = "How many dots are there? Think briefly, then end with: Answer: <number>"


# Step 1: prompts. A picture, a question, and whatever the rewards read; here the right number.
def draw_dots(count: int, seed: int) -> list[dict[str, Any]]:
    """Pictures of 1 to 9 dots, as rows in TRL's shape."""
    draw_from = random.Random(seed)
    rows = []
    for _ in range(count):
        dots = draw_from.randint(1, 9)
        image = Image.new("RGB", (192, 192), "white")
        pen = ImageDraw.Draw(image)
        for place in draw_from.sample(range(16), dots):
            left, top = 12 + 44 * (place % 4), 12 + 44 * (place // 4)
            pen.ellipse((left, top, left + 30, top + 30), fill=draw_from.choice(["crimson", "royalblue", "seagreen"]))
        content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
        rows.append({"prompt": [{"role": "user", "content": content}], "images": [image], "dots": dots})
    return rows


# Step 2: rewards. Each is called with all completions of a step and the columns that it names.
def right_number(completions: list[Any], dots: list[int], **kwargs: Any) -> list[float]:
    """1 for the right number, less the further off it is."""
    rewards = []
    for completion, wanted in zip(completions, dots, strict=True):
        found = re.findall(r"Answer: (\d+)", completion[0]["content"])
        rewards.append(max(0.0, 1.0 - abs(int(found[-1][:3]) - wanted) / 3) if found else 0.0)
    return rewards


def ends_with_answer(completions: list[Any], **kwargs: Any) -> list[float]:
    """1 for a completion that ends as asked."""
    return [float(re.search(r"Answer: \d+\s*$", completion[0]["content"]) is not None) for completion in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen3-VL-4B-Instruct")
    parser.add_argument("--output", type=Path, default=Path("runs/counting"))
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--max-steps", type=int, default=60)
    arguments = parser.parse_args()

    # Step 3: training. `args` may be TRL's GRPOConfig too; any setting of a recipe can be given by its name.
    trainer = finesight.GRPOTrainer(
        model=arguments.model,
        reward_funcs=[right_number, ends_with_answer],
        args={"reward_weights": [1.0, 0.2], "num_generations": 8, "max_completion_length": 128, "learning_rate": 1e-5},
        train_dataset=draw_dots(arguments.pictures, seed=0),
        eval_dataset=draw_dots(max(arguments.pictures // 8, 2), seed=1),
        peft_config=LoraConfig(r=32, lora_alpha=32),
        output_dir=arguments.output,
        train_batch_size=32,  # completions of an optimizer step: 4 pictures
        max_steps=arguments.max_steps,
        num_train_epochs=100,
        eval_strategy="steps",
        eval_steps=max(arguments.max_steps // 6, 1),
        image_ablation_steps=max(arguments.max_steps // 6, 1),
    )
    result = trainer.train()

    # Step 4: what became of it. The report shows completions with their pictures, and what is earned without looking.
    measured = [line["eval_reward"] for line in result.history if "eval_reward" in line]
    print(f"held-out reward: {', '.join(f'{value:.2f}' for value in measured)}")
    print(f"adapter: {result.adapter_dir}")
    print(f"report: {arguments.output / 'report.html'}")


if __name__ == "__main__":
    main()
