"""Made-up kinds of prompts: texts of one alphabet each, whose rows take experts of one group each."""

from __future__ import annotations

import random

import numpy as np

from cluster.signatures.messages import SignatureReport
from cluster.signatures.text import features
from cluster.signatures.usage import signature

ALPHABETS = ("abcdef", "012345", "()[]{}", "ABCDEF")
LAYERS, EXPERTS, TOP_K, ROWS = 2, 16, 2, 16


def text_of_kind(kind: int, seed: int) -> str:
    """A text of 200 characters; texts of a kind share their alphabet alone."""
    return "".join(random.Random(f"{kind} {seed}").choices(ALPHABETS[kind], k=200))


def rows_of_kind(kind: int, seed: int) -> np.ndarray:
    """int16 [R, L, K]: experts of the kind's own four."""
    random_ids = np.random.default_rng([kind, seed])
    return (4 * kind + random_ids.integers(0, 4, (ROWS, LAYERS, TOP_K))).astype(np.int16)


def report_of(number: int, kinds: list[int], seed: int = 0) -> SignatureReport:
    """What a router says that computed one prompt of each of `kinds`."""
    pairs = [
        (features(text_of_kind(kind, seed + place)), signature(rows_of_kind(kind, seed + place), EXPERTS))
        for place, kind in enumerate(kinds)
    ]
    features_NF, signatures_NW = (np.stack(each) for each in zip(*pairs, strict=True))
    return SignatureReport(number, np.rint(signatures_NW.mean(0)).astype(np.int8), features_NF, signatures_NW)
