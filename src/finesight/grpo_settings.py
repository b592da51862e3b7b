"""Settings of reinforcement: the loss, and the rewards. Imports no torch. Names are those of TRL where it has them."""

from __future__ import annotations

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from finesight.settings import Settings


class RewardSettings(Settings):
    """One reward: a grader of the library, or a function of the user. A name alone stands for it with weight 1."""

    name: str = Field(
        description="A grader (`finesight eval --graders` lists them), or code of yours: module:function, file.py:function, or a file "
        "with one public function, called as f(prompts, completions, completion_ids, **columns)."
    )
    weight: float = Field(1.0, allow_inf_nan=False, description="What it counts in the sum of all rewards.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the grader, by name; for code of yours, keywords.")
    timeout_s: float = Field(
        60.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds that one call for all completions of a step may take; then it gives no rewards.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class GRPOSettings(Settings):
    """How rewards become a loss."""

    num_generations: int = Field(8, ge=2, description="Completions of a prompt: the size of a group.")
    num_iterations: int = Field(1, ge=1, description="Passes over the completions of a rollout.")
    steps_per_generation: int = Field(
        1, ge=1, description="Optimizer steps that the completions of one rollout are divided over; from the second on they are off-policy."
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"] = Field(
        "dapo", description="How terms are averaged and clipped; dapo: over all tokens of a step; gspo: one ratio for a completion."
    )
    epsilon: float = Field(
        0.2, gt=0, lt=1, description="How far below 1 a ratio is clipped; above 1 too, without epsilon_high. For gspo about 3e-4."
    )
    epsilon_high: float | None = Field(
        None,
        gt=0,
        description="How far above 1 a ratio is clipped (DAPO: 0.28; gspo: 4e-4); in cispo the largest ratio itself (without it 5).",
    )
    beta: float = Field(0.0, ge=0, description="Weight of the divergence from the base (KL, k3); 0: no reference is computed.")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group",
        description="What advantages are divided by: the standard deviation of their group, of all completions of a step, or nothing.",
    )
    mask_truncated_completions: bool = Field(False, description="Leave completions that reached the length limit out of the loss.")
    overlong_buffer: int = Field(
        0, ge=0, description="Last tokens before the length limit over which a penalty grows from 0 to overlong_penalty (DAPO); 0: none."
    )
    overlong_penalty: float = Field(1.0, ge=0, description="What is taken from the reward of a completion of full length.")
    importance_cap: float = Field(
        2.0, gt=0, description="Largest weight that corrects the log-probabilities of another engine (truncated importance sampling)."
    )
    max_resampling_rounds: int = Field(
        0, ge=0, description="Times that prompts whose completions all earn the same are replaced by others in a step (dynamic sampling)."
    )
    image_ablation_steps: int = Field(
        50,
        ge=0,
        description="Optimizer steps between checks that answer a rollout's prompts with their images blanked, to see how much reward is earned "
        "without looking; 0: never.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> GRPOSettings:
        if self.loss_type == "gspo" and self.epsilon > 0.05:
            raise ValueError(
                f"epsilon ({self.epsilon}) hardly ever clips the ratio of a whole completion, which is a mean: "
                "with loss_type: gspo set epsilon: 3e-4 and epsilon_high: 4e-4"
            )
        if self.loss_type == "cispo" and self.epsilon_high is not None and self.epsilon_high < 1:
            raise ValueError(
                f"epsilon_high ({self.epsilon_high}) is the largest ratio itself with loss_type: cispo; set it to 1 or more, for example 5"
            )
        return self


class RolloutSettings(Settings):
    """How completions are sampled."""

    max_completion_length: int = Field(256, ge=1, description="Most tokens of a completion, the end-of-turn token included.")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="Of sampling; log-probabilities are those under it.")
    stop: list[str] = Field(
        default_factory=list, description="Texts before the first of which a completion ends; its rewards do not see them."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Only the most likely tokens that together have this probability.")
    top_k: int = Field(0, ge=0, description="Only this many most likely tokens; 0: all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Only tokens at least this share as likely as the likeliest.")
    batch_size: int = Field(64, ge=1, description="Completions sampled side by side; a matter of memory and speed only.")
    engine: Literal["builtin", "vllm"] = Field(
        "builtin",
        description="What samples: the model in training itself, or a vLLM server, which is given each new adapter (docs/reinforcement.md).",
    )
    url: str | None = Field(
        None, description="Address of the engine's server, for example http://127.0.0.1:8000; nothing else is ever contacted."
    )
    model: str | None = Field(None, description="Name of the base at the engine's server, where it is another than model.name_or_path.")
    api_key_env: str = Field(
        "VLLM_API_KEY", min_length=1, description="Environment variable with the API key of the engine's server; not set: none is sent."
    )
    timeout_s: float = Field(
        600.0, gt=0, allow_inf_nan=False, description="Seconds that the engine's server may take for the completions of one prompt."
    )

    @model_validator(mode="after")
    def _engine_has_an_address(self) -> RolloutSettings:
        if self.engine == "builtin":
            if given := [name for name in ("url", "model") if getattr(self, name) is not None]:
                raise ValueError(f"{' and '.join(given)} are for an engine of its own: set engine: vllm, or remove them")
            return self
        if self.stop:
            raise ValueError("stop is for the built-in engine: texts are cut there token by token; remove it, or set engine: builtin")
        if self.url is None:
            raise ValueError("engine: vllm needs url, the address of a running server, for example http://127.0.0.1:8000")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"url ({self.url}) is no address of a server; write it as http://host:port")
        if parts.username or parts.password:
            raise ValueError("url holds a password, which would be kept with the run; set the environment variable that api_key_env names")
        return self

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_texts(cls, value: Any) -> Any:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and "" in texts:
            raise ValueError("an empty text would end every completion before its first token; remove it")
        return texts
