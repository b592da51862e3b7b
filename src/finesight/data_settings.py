"""Settings of the data: sources, columns of tables, pixel limits. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, field_validator

from finesight.settings import Settings


class ColumnSettings(Settings):
    """Which column of a plain table is what."""

    image: str | list[str] | None = Field(None, description="Column(s) with an image or a list of images.")
    video: str | None = Field(None, description="Column with a video.")
    question: str | None = Field(None, description="Column with the question; may be left out when `prompt` names columns itself.")
    answer: str | None = Field(None, description="Column with the answer; a list: its first entry is trained on, all count as right.")
    answers: str | None = Field(None, description="Column with all accepted answers, for graders.")
    ground_truth: str | None = Field(None, description="Column handed to rewards and graders as ground_truth.")
    weight: str | None = Field(None, description="Column with the weight of the sample.")
    system: str | None = Field(None, description="Column with the system prompt.")
    extra: list[str] = Field(default_factory=list, description="Further columns handed to rewards and graders.")


class SourceSettings(Settings):
    """One source of rows."""

    path: str = Field(description="File (.json, .jsonl, .parquet, .arrow, .csv), folder (save_to_disk, dataset_info.json) or hub name.")
    hub: Literal["huggingface", "modelscope"] = Field("huggingface", description="Where a hub name is looked up.")
    format: Literal["auto", "messages", "prompt_completion", "conversations", "llamafactory", "qwen_inline", "table"] = Field(
        "auto", description="How rows are written; auto tells by looking at them."
    )
    split: str = Field("train", description="Split of a hub dataset or saved folder.")
    name: str | None = Field(None, description="Configuration of a hub dataset, or the entry of a dataset_info.json.")
    columns: ColumnSettings | None = Field(None, description="For tables: which column is what.")
    prompt: str | None = Field(
        None, description="For tables: template of the user turn, {column} is replaced, e.g. '{query}\\nAnswer briefly.'"
    )
    formatter: str | None = Field(None, description="module:function from a row (dict) to a messages-style dict.")
    media_dir: str | None = Field(
        None, description="Second folder that image paths are resolved against; it may stand for the folders that they begin with."
    )
    weight_column: str | None = Field(None, description="Column with the weight of the sample, for formats other than tables.")
    system: str | None = Field(None, description="System prompt for rows that have none.")


class DataSettings(Settings):
    train: list[SourceSettings] = Field(default_factory=list, description="Rows to train on.")
    eval_split: str | None = Field(None, description="Hold-out: '5%', 'last 4', or the path of a file. Split by image.")
    image_first: bool = Field(False, description="Move the images of a leading user turn ahead of its text, so that more is shared.")
    train_on: Literal["all", "last"] = Field("all", description="Assistant turns that are trained on.")
    min_pixels: int | None = Field(None, ge=1, description="Lower pixel limit of an image; none: the checkpoint's own.")
    max_pixels: int | None = Field(None, ge=1, description="Upper pixel limit of an image; none: the checkpoint's own.")
    video_min_pixels: int | None = Field(None, ge=1, description="Lower pixel limit of a video (of a frame for Qwen2.5-VL).")
    video_max_pixels: int | None = Field(None, ge=1, description="Upper pixel limit of a video (of a frame for Qwen2.5-VL).")
    fps: float = Field(2.0, gt=0, description="Frames sampled a second of video.")
    max_frames: int = Field(768, ge=2, description="Most frames sampled of one video.")
    max_length_tokens: int | None = Field(None, ge=1, description="Longest sample; none: training.token_budget.")
    too_long: Literal["refuse", "shrink_pixels", "drop_turns"] = Field(
        "refuse", description="A sample past that: stop; shrink its images; or drop turns from the end of the conversation."
    )
    on_bad_row: Literal["stop", "skip"] = Field("stop", description="stop: report all bad rows and stop; skip: report, count and go on.")
    allow_urls: bool = Field(False, description="Fetch http(s) images that rows name.")
    allowed_dirs: list[str] = Field(default_factory=list, description="Further folders that media may lie in.")
    share_prefixes: bool = Field(True, description="Compute images and leading turns that samples share once.")

    @field_validator("train", mode="before")
    @classmethod
    def _one_source(cls, value: Any) -> Any:
        """A path, or one source, may stand for the list of them."""
        if isinstance(value, str):
            return [{"path": value}]
        if isinstance(value, Mapping):
            return [value]
        if isinstance(value, Sequence):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @field_validator("eval_split", mode="before")
    @classmethod
    def _no_bare_number(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip().lower() in ("none", "null", "no", ""):
            return None
        try:
            number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None
        except ValueError:
            return value
        if number is not None:
            raise ValueError(
                f"a bare number does not say what it counts; write '{number * 100 if number < 1 else number:g}%' or 'last {max(1, int(number))}'"
            )
        return value

    @field_validator("eval_split", mode="after")
    @classmethod
    def _readable_split(cls, value: str | None) -> str | None:
        if value is None:
            return value
        try:
            if value.endswith("%") and not 0 < float(value[:-1]) < 100:
                raise ValueError
            if value.startswith("last ") and int(value[5:]) < 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"{value!r} is neither a share such as '5%', nor 'last 4', nor a path") from None
        return value
