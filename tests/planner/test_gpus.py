"""Cards by loose names, amounts of memory."""

from __future__ import annotations

import pytest

from finesight.errors import RecipeError
from finesight.planner.gpus import GPUS, find_gpu, is_name_of, parse_memory


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
        ("H100 80GB", "H100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("h100", "H100 SXM 80GB"),
        ("A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("RTX 4070", "RTX 4070"),
        ("4070 ti super", "RTX 4070 Ti SUPER"),
        ("Tesla T4", "T4"),
        ("L40S", "L40S"),
        ("L4", "L4"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060 12GB"),
    ],
)
def test_loose_names(name: str, found: str) -> None:
    assert find_gpu(name).name == found


def test_every_card_finds_itself() -> None:
    assert [find_gpu(gpu.name).name for gpu in GPUS] == [gpu.name for gpu in GPUS]


def test_unknown_cards_are_refused_with_near_ones() -> None:
    with pytest.raises(RecipeError, match=r"No GPU 'RTX 4900'.*RTX 4090.*--gpu 24GiB"):
        find_gpu("RTX 4900")
    for name in ("NVIDIA", "rtx"):
        with pytest.raises(RecipeError, match=f"No GPU '{name}' is known. .*(H200|RTX A6000).*--gpu 24GiB"):
            find_gpu(name)


def test_unknown_cards_like_none_are_answered_with_all() -> None:
    for name in ("MI300X", "Arc A770"):
        with pytest.raises(RecipeError, match=f"No GPU '{name}' is known. Known are B200, .*, T4. Name"):
            find_gpu(name)
    with pytest.raises(RecipeError, match=r"Nearest: A10\."):
        find_gpu("NVIDIA A10G")


@pytest.mark.parametrize("name", ["4090", "NVIDIA GeForce RTX 4090", "h100", "NVIDIA H100 80GB HBM3", "Tesla V100-SXM2-16GB", "5060 Ti"])
def test_short_and_long_names_of_a_card(name: str) -> None:
    assert is_name_of(find_gpu(name), name)


@pytest.mark.parametrize("name", ["4090 Ti", "RTX 4080 SUPER", "RTX 4070 Ti", "RTX 4090 Laptop GPU", "5070"])
def test_names_of_cards_that_are_not_known(name: str) -> None:
    assert not is_name_of(find_gpu(name), name)


def test_what_a_card_can_do() -> None:
    assert find_gpu("H100").has_float8 and not find_gpu("4090").has_float8
    assert find_gpu("4090").compiles and not find_gpu("T4").compiles
    assert 15.5 * 2**30 < find_gpu("T4").available_bytes < 16 * 2**30


@pytest.mark.parametrize(
    ("text", "gib"), [("16GiB", 16), ("24 GB", 24e9 / 2**30), ("16000mb", 16e9 / 2**30), ("12", 12), ("1.5g", 1.5), ("24576MiB", 24)]
)
def test_amounts(text: str, gib: float) -> None:
    assert parse_memory(text) == int(gib * 2**30)


@pytest.mark.parametrize("text", ["", "much", "16 TB", "0", "-4GiB"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(RecipeError, match="no amount of memory"):
        parse_memory(text)
