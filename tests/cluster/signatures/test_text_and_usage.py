"""What a prompt's text and its experts become: vectors of fixed size that tell kinds of prompts apart."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.signatures.messages import KEY, SignatureReport
from cluster.signatures.text import BUCKETS, features, text_of
from cluster.signatures.usage import WIDTH, signature
from tests.support.signature_scene import EXPERTS, report_of, rows_of_kind, text_of_kind


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"prompt": "abc"}, "abc"),
        ({"prompt": ["abc", "def"]}, "abc\ndef"),
        ({"prompt": [1, 2, 3]}, ""),
        ({"messages": [{"role": "user", "content": "abc"}, {"role": "user", "content": "def"}]}, "abc\ndef"),
        ({"messages": [{"content": [{"type": "text", "text": "abc"}, {"type": "image_url", "image_url": {}}]}]}, "abc"),
        ({"messages": None, "prompt": "abc"}, "abc"),
        ({"messages": [None, 5, {"content": None}]}, ""),
        ({}, ""),
    ],
)
def test_the_text_of_a_request_is_what_of_it_is_text(body: dict, text: str) -> None:
    assert text_of(SimpleNamespace(**body)) == text


@given(st.text())
def test_features_of_any_text_have_one_size_and_scale(text: str) -> None:
    found = features(text)
    assert (found.dtype, found.shape) == (np.uint8, (BUCKETS,))
    assert found.max() == (255 if len(text.encode(errors="replace")) >= 3 else 0)


def test_features_are_of_a_texts_edges_whatever_is_between() -> None:
    head, tail = "begin " * 100, "end it " * 100
    np.testing.assert_array_equal(features(head + "x" * 50 + tail), features(head + "other" * 5000 + tail))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    a, b = one.astype(float), other.astype(float)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_texts_and_experts_of_a_kind_are_nearer_to_one_another_than_to_those_of_other_kinds() -> None:
    for make in (
        lambda kind, seed: features(text_of_kind(kind, seed)),
        lambda kind, seed: signature(rows_of_kind(kind, seed), EXPERTS),
    ):
        alike = [cosine(make(kind, 1), make(kind, 2)) for kind in range(4)]
        other = [cosine(make(kind, 1), make(k, 2)) for kind in range(4) for k in range(4) if k != kind]
        assert min(alike) > max(other) + 0.1


def test_signatures_keep_the_angles_of_how_often_experts_were_taken() -> None:
    """The oracle: cosines of the square roots of counts, unprojected. 1 / sqrt(WIDTH) of noise, four times for all."""
    rng = np.random.default_rng(0)
    draws = [rng.choice(EXPERTS, (40, 2, 2), p=rng.dirichlet(np.full(EXPERTS, 0.3))) for _ in range(12)]
    roots = [np.sqrt([np.bincount(ids[:, layer].ravel(), minlength=EXPERTS) for layer in range(2)]) for ids in draws]
    for i, j in itertools.combinations(range(12), 2):
        expected = cosine(roots[i].ravel(), roots[j].ravel())
        assert abs(cosine(signature(draws[i], EXPERTS), signature(draws[j], EXPERTS)) - expected) < 4 / np.sqrt(WIDTH)


def test_a_signature_says_nothing_of_length_nor_of_rows_without_experts() -> None:
    ids = rows_of_kind(1, 0)
    padded = np.concatenate([ids, ids, np.full((5, *ids.shape[1:]), -1, np.int16)])
    np.testing.assert_array_equal(signature(padded, EXPERTS), signature(ids, EXPERTS))
    assert not signature(np.full((3, 2, 2), -1, np.int16), EXPERTS).any()


def test_a_report_comes_back_from_statistics_and_nothing_comes_of_others() -> None:
    report = report_of(7, [0, 1, 2])
    stats = report.to_stats()
    found = SignatureReport.from_stats({"kv": 1, **stats})
    assert found is not None
    assert found.number == 7
    for name in ("mean_W", "features_NF", "signatures_NW"):
        np.testing.assert_array_equal(getattr(found, name), getattr(report, name))
    for other in ({}, {KEY: None}, {KEY: [1, b"", b""]}, {KEY: [1, stats[KEY][1], b"123"]}):
        assert SignatureReport.from_stats(other) is None
