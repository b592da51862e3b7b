"""Six questions about each image: computed as one tree, against six samples each by itself (all ours)."""

from __future__ import annotations

from bench.claim import Claim, Finding, Rows, main
from bench.claims.settings import our_run
from bench.comparison import compared, ratio, single

STEP = ("--batch", "60")
QUESTIONS = ("--per-image", "6", *STEP)
REACH = 3.0


def judge(rows: Rows) -> list[Finding]:
    shared, distinct = single(rows, "ours-shared"), single(rows, "ours-distinct")
    what = "six questions about one image in one tree, over six samples with an image each"
    return [
        compared(
            "six questions about one image in one tree, over the same six samples unshared", REACH, shared, single(rows, "ours-separate")
        ),
        Finding(what, REACH, None, reason="one of the rows is missing")
        if shared is None or distinct is None
        else Finding(what, REACH, ratio(shared, distinct), compared=("ours-shared", "ours-distinct")),
    ]


CLAIM = Claim(
    "per_image",
    "Six questions about each image",
    (our_run("ours-shared", *QUESTIONS), our_run("ours-separate", *QUESTIONS, "--no-share"), our_run("ours-distinct", *STEP)),
    judge,
    note="All are ours. Unshared, the language model computes an image's tokens once for each question; the tower still computes an "
    "image once in a pack.",
)

if __name__ == "__main__":
    main(CLAIM)
