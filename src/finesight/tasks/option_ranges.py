"""Types of grader options that carry their range, which `LibraryGrader.with_options` holds them to."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

_TAG = re.compile(r"\w[\w.:-]*")


def _tag_names(text: str) -> str:
    if not all(_TAG.fullmatch(name.strip()) for name in text.split(",")):
        raise ValueError("names of tags, parted by commas, such as think,answer")
    return text


RelativeTolerance = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=0)]
TagNames = Annotated[str, AfterValidator(_tag_names)]
