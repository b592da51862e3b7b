"""GPUs by name: what a plan for a card that is not here needs to know. Datasheet values, not measurements.

Rates are dense (without sparsity); for consumer cards with float32 accumulation, as training uses it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from finesight.errors import RecipeError
from finesight.planner.calibration import GIB

# Of a card's nominal memory, what no program gets: error correction, page tables, the firmware.
UNUSABLE_SHARE = 0.015


@dataclass(frozen=True)
class Gpu:
    """One card."""

    name: str
    memory_gib: float  # nominal
    capability: tuple[int, int]
    bf16_tflop_s: float  # of cards without bf16: float16
    bandwidth_gb_s: float

    @property
    def available_bytes(self) -> int:
        """For one program, its context included."""
        return int(self.memory_gib * (1 - UNUSABLE_SHARE) * GIB)

    @property
    def has_float8(self) -> bool:
        return self.capability >= (9, 0)  # as `models/float8.py` asks for

    @property
    def compiles(self) -> bool:
        return self.capability >= (8, 0)


GPUS = (
    Gpu("B200", 180, (10, 0), 2250, 8000),
    Gpu("H200", 141, (9, 0), 989, 4800),
    Gpu("H100 SXM 80GB", 80, (9, 0), 989, 3350),
    Gpu("H100 PCIe 80GB", 80, (9, 0), 756, 2000),
    Gpu("H100 NVL 94GB", 94, (9, 0), 835, 3900),
    Gpu("GH200 96GB", 96, (9, 0), 989, 4000),
    Gpu("H20", 96, (9, 0), 148, 4000),
    Gpu("A100 80GB", 80, (8, 0), 312, 2039),
    Gpu("A100 40GB", 40, (8, 0), 312, 1555),
    Gpu("A800 80GB", 80, (8, 0), 312, 2039),
    Gpu("A40", 48, (8, 6), 150, 696),
    Gpu("A30", 24, (8, 0), 165, 933),
    Gpu("A10", 24, (8, 6), 125, 600),
    Gpu("L40S", 48, (8, 9), 362, 864),
    Gpu("L40", 48, (8, 9), 181, 864),
    Gpu("L4", 24, (8, 9), 121, 300),
    Gpu("RTX PRO 6000 Blackwell", 96, (12, 0), 504, 1792),
    Gpu("RTX 6000 Ada", 48, (8, 9), 364, 960),
    Gpu("RTX A6000", 48, (8, 6), 155, 768),
    Gpu("RTX A5000", 24, (8, 6), 111, 768),
    Gpu("RTX 5090", 32, (12, 0), 210, 1792),
    Gpu("RTX 5080", 16, (12, 0), 113, 960),
    Gpu("RTX 5070 Ti", 16, (12, 0), 88, 896),
    Gpu("RTX 5060 Ti 16GB", 16, (12, 0), 47, 448),
    Gpu("RTX 4090", 24, (8, 9), 165, 1008),
    Gpu("RTX 4080", 16, (8, 9), 97, 717),
    Gpu("RTX 4070 Ti SUPER", 16, (8, 9), 88, 672),
    Gpu("RTX 4070", 12, (8, 9), 58, 504),
    Gpu("RTX 4060 Ti 16GB", 16, (8, 9), 44, 288),
    Gpu("RTX 3090", 24, (8, 6), 71, 936),
    Gpu("RTX 3080 10GB", 10, (8, 6), 60, 760),
    Gpu("RTX 3060 12GB", 12, (8, 6), 26, 360),
    Gpu("V100 32GB", 32, (7, 0), 125, 900),
    Gpu("V100 16GB", 16, (7, 0), 125, 900),
    Gpu("T4", 16, (7, 5), 65, 320),
)
_NOISE = {"nvidia", "geforce", "tesla", "gpu", "graphics", "card", "rtx", "sxm", "sxm2", "sxm4", "sxm5", "pcie"}
_NEAR = 0.65  # likeness from which a name is taken to be another one misspelt


def find_gpu(name: str) -> Gpu:
    """The card that a name means, loosely: "4090", "RTX 4090", "NVIDIA H100 80GB HBM3".

    Where a name fits several cards, the first of the table: the larger or faster one is named by more words.

    Raises:
        RecipeError: no card is of this name.
    """
    wanted = _words(name)
    exact = wanted - _NOISE
    fitting = [gpu for gpu in GPUS if exact and exact <= _words(gpu.name)]
    if not fitting:  # more words than ours ("HBM3"): all of ours must be among them
        fitting = [gpu for gpu in GPUS if _words(gpu.name) - _NOISE <= wanted]
        fitting.sort(key=lambda gpu: -len(_words(gpu.name)))
    if fitting:
        # Of "RTX 4070" and "RTX 4070 Ti SUPER" the name with fewest words too many.
        return min(fitting, key=lambda gpu: len(_words(gpu.name) - wanted))
    by_plain_name = {_plain(gpu.name): gpu.name for gpu in GPUS}
    near = difflib.get_close_matches(_plain(name), by_plain_name, n=3, cutoff=_NEAR)
    hint = f"Nearest: {', '.join(by_plain_name[one] for one in near)}" if near else f"Known are {', '.join(gpu.name for gpu in GPUS)}"
    raise RecipeError(f"No GPU {name!r} is known. {hint}. Name one of them, or give the memory instead, as --gpu 24GiB.")


def is_name_of(gpu: Gpu, name: str) -> bool:
    """Whether a name says this card: "H100" does of the H100 SXM 80GB, "4090 Ti" does not of the RTX 4090."""
    differing = (_words(name) ^ _words(gpu.name)) - _NOISE
    return all(re.fullmatch(r"\d+gb|hbm\d*e?", word) for word in differing)


def _plain(name: str) -> str:
    """A name without what most cards have in theirs, to compare spellings."""
    return " ".join(word for word in name.casefold().split() if word not in _NOISE)


def _words(name: str) -> set[str]:
    return set(re.findall(r"\d+gb|[a-z]+\d*[a-z]*|\d+", re.sub(r"[-_/]", " ", name.casefold())))


def parse_memory(text: str) -> int:
    """Bytes of "16GiB", "24 GB", "24576MiB" or a bare number of GiB.

    GB and MB are decimal, 10^9 and 10^6 bytes; a number alone or with a bare letter is in GiB or MiB.

    Raises:
        RecipeError: it is not of that form.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(gib|gb|g|mib|mb|m|)\s*", text.casefold())
    if not found or not float(found[1]):
        raise RecipeError(f"--gpu {text!r} is no amount of memory; write it as 16GiB, or name a card with --gpu-name.")
    unit = {"gb": 10**9, "mb": 10**6, "m": 2**20, "mib": 2**20}.get(found[2], GIB)
    return int(float(found[1]) * unit)
