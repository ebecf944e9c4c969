"""The report: one file that stands alone, its pictures beside it, figures that agree with the evaluation."""

from __future__ import annotations

import base64
import re
import sys

import numpy as np
import pytest

from placement.command.app import app
from placement.placement import Placement
from placement.report.page import moved_experts, write_report
from placement.rule.evaluate import evaluate
from placement.traces.trace import ActivationTrace

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def trace_of_pairs(tokens=60, layers=2, num_experts=8):
    """Tokens that want experts n and n + 4 together: linear placements on 4 ranks split every pair."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, (tokens, layers))
    return ActivationTrace(np.stack([first, first + 4], axis=2).astype(np.int16), num_experts, (3, 7))


TOGETHER = Placement(4, 1, 8, np.tile([0, 4, 1, 5, 2, 6, 3, 7], (2, 1)))


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    trace_of_pairs().save(tmp_path / "t.npz")
    TOGETHER.save(tmp_path / "p.json")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder = tmp_path / "report"
    paths = ["--trace", str(tmp_path / "t.npz"), "--placement", str(tmp_path / "p.json"), "--out", str(folder)]
    assert app(["explain", *paths], standalone_mode=False) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: reports need matplotlib: pip install")
    assert not folder.exists()


def test_the_page_stands_alone_and_shows_what_the_evaluation_says(tmp_path):
    trace = trace_of_pairs()
    page, *pictures = write_report(trace, TOGETHER, None, tmp_path / "made")
    text = page.read_text()
    assert {path.name for path in pictures} == {
        "fan_out.png", "load.png", "moves.png", "coactivation_layer_3.png", "coactivation_layer_7.png",
    }  # fmt: skip
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    assert embedded == [path.read_bytes() for path in pictures]
    assert all(data.startswith(PNG) for data in embedded)
    # Nothing is fetched from elsewhere.
    assert not re.search(r'(src|href)="(?!data:)', text)
    linear, together = (evaluate(p, trace) for p in (Placement.linear(2, 8, 4), TOGETHER))
    assert (linear.fan_out.mean(), together.fan_out.mean()) == (2.0, 1.0)
    row = re.search(r"<tr><td>mean</td>(.*?)</tr>", text).group(1)
    figures = [float(value) for value in re.findall(r">([\d.]+)<", row)]
    assert figures[:2] == [2.0, 1.0]
    assert figures[4:] == pytest.approx([linear.balancedness.mean(), together.balancedness.mean()], abs=6e-4)
    assert "layer 3" in text
    assert "layer 7" in text


def test_moves_are_experts_that_were_not_there():
    before = Placement(2, 1, 4, np.array([[0, 1, 2, 3]]))
    assert moved_experts(before, before).tolist() == [[0, 0]]
    assert moved_experts(before, Placement(2, 1, 4, np.array([[1, 0, 3, 2]]))).tolist() == [[0, 0]]
    assert moved_experts(before, Placement(2, 1, 4, np.array([[0, 2, 1, 3]]))).tolist() == [[1, 1]]


def test_a_placement_compared_with_itself(tmp_path):
    page, *_ = write_report(trace_of_pairs(), TOGETHER, TOGETHER, tmp_path)
    assert 'class="better"' not in page.read_text()
    assert 'class="worse"' not in page.read_text()


def test_counts_alone_leave_out_what_follows_from_sets(tmp_path):
    trace = ActivationTrace(np.zeros((0, 2, 1), np.int16), 8, counts=np.arange(16).reshape(2, 8))
    page, *pictures = write_report(trace, TOGETHER, None, tmp_path)
    assert {path.name for path in pictures} == {"load.png", "moves.png"}
    assert "only counts" in page.read_text()
    assert "nan" not in re.sub(r'src="[^"]+"', "", page.read_text())


def test_one_token_and_few_pictures(tmp_path):
    seen = []
    paths = write_report(
        trace_of_pairs(tokens=1), TOGETHER, None, tmp_path, progress=lambda *at: seen.append(at), max_layers=1
    )
    assert len(paths) == 5
    assert seen == [(1, 1)]


def test_other_models_and_ranks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the placements have 2 and 4 ranks"):
        write_report(trace_of_pairs(), TOGETHER, Placement.linear(2, 8, 2), tmp_path)
    with pytest.raises(ValueError, match="3 layers of 8 experts"):
        write_report(trace_of_pairs(), Placement.linear(3, 8, 4), None, tmp_path)
