"""The command against a controller's real state and simulated shards: what it prints, what it changes, how it ends."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from placement.placement import Placement
from tests.support.simulated.client import Run, SimulatedClient

LAYERS, EXPERTS, SHARDS = 2, 8, 3


def published(client: SimulatedClient) -> Placement:
    return client.mesh.mesh.holdings.placement(SHARDS)


def other(path: Path, seed: int = 1) -> Path:
    """A file with another placement of the same model on three ranks."""
    order = np.random.default_rng(seed).permutation(EXPERTS)
    map_LS = np.tile(np.append(order, -1), (LAYERS, 1))
    Placement(SHARDS, 1, EXPERTS, map_LS).save(path)
    return path


def same_experts(one: Placement, two: Placement) -> bool:
    def rows(placement: Placement) -> list[list[set[int]]]:
        return [[set(row[row >= 0].tolist()) for row in placement.experts_of_rank(rank)] for rank in range(SHARDS)]

    return rows(one) == rows(two)


def test_show_tells_of_every_shard(run: Run, client: SimulatedClient) -> None:
    done = run("show")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].endswith("; every expert is served")
    assert lines[1].split(None, 1)[1] == "1 (first)"
    assert "nothing moves" in lines[2]
    rows = [line.split() for line in lines[lines.index("") + 2 :]]
    held = [int(shard.held_LE.sum()) for shard in client.mesh.shards.values()]
    assert [row[:5] for row in rows] == [[str(rank), "serving", "6", str(held[rank]), "0"] for rank in range(SHARDS)]
    assert [row[-1] for row in rows] == ["s0", "s1", "s2"]


def test_show_as_json_is_the_status(run: Run) -> None:
    status = json.loads(run("show", "--json").out)
    assert status["migration"]["target_version"] == 1
    assert [shard["state"] for shard in status["shards"]] == ["serving"] * SHARDS


def test_show_says_what_is_lost(run: Run, client: SimulatedClient) -> None:
    client.mesh.kill(client.mesh.shards["s1"])
    client.mesh.run(15)
    out = run("show").out
    assert "of a layer served by no shard; no shard at rank 1" in out.splitlines()[0]
    assert "every expert is served" not in out


def test_what_show_saves_can_be_applied(run: Run, client: SimulatedClient, tmp_path: Path) -> None:
    before = published(client)
    assert run("show", "--save", tmp_path / "p.json").status == 0
    assert Placement.load(tmp_path / "p.json") == before
    done = run("apply", tmp_path / "p.json")
    assert (done.status, done.out.splitlines()[0]) == (0, "target 2: no copies")


def test_show_saves_nowhere_that_cannot_be_written(run: Run, tmp_path: Path) -> None:
    done = run("show", "--save", tmp_path / "no" / "p.json")
    assert (done.status, done.out) == (1, "")
    assert done.err == f"error: {tmp_path / 'no' / 'p.json'}: cannot be written: No such file or directory\n"


def test_apply_follows_until_the_target_is_reached(run: Run, client: SimulatedClient, tmp_path: Path) -> None:
    wanted = Placement.load(other(tmp_path / "p.json"))
    done = run("apply", tmp_path / "p.json")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert re.fullmatch(r"target 2: \d+ copies in \d rounds?, .* MB \(from node .* MB\), about .* s", lines[0])
    assert any("copying, " in line and "left" in line for line in lines)
    assert "target 2 reached, epoch" in lines[-1]
    assert same_experts(published(client), wanted)
    rows = run("history").out.splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [["2", "command"]]
    assert "reached" in rows[1]


def test_a_dry_run_changes_nothing_and_says_what_it_would_take(
    run: Run, client: SimulatedClient, tmp_path: Path
) -> None:
    before = published(client)
    dry = run("apply", "--dry-run", other(tmp_path / "p.json"))
    assert (dry.status, dry.out.splitlines()[0][-21:]) == (0, "; nothing was changed")
    client.mesh.run(30)
    assert published(client) == before
    assert client.mesh.mesh.keeper.target is not None
    assert client.mesh.mesh.keeper.target.version == 1
    wet = run("apply", "--no-wait", tmp_path / "p.json")
    assert wet.out.splitlines() == [f"target 2: {dry.out.removesuffix('; nothing was changed' + chr(10))}"]
    before_it = client.mesh.mesh.conductor.counters.copies
    client.mesh.run_until_still()
    copies = client.mesh.mesh.conductor.counters.copies - before_it
    assert dry.out.startswith(f"{copies} cop")


@pytest.mark.parametrize(
    ("placement", "told"),
    [
        (Placement.linear(LAYERS, EXPERTS, 4), "it gives experts to rank 3; shards take them at [0, 1, 2]"),
        (Placement.linear(LAYERS, EXPERTS, 1), "it needs 8 slots in a layer of rank 0, whose shard has 6"),
        (Placement.linear(LAYERS, 9, 3), "it is for 2 layers of 9 experts, the model for 2 of 8"),
    ],
)
def test_a_placement_that_does_not_fit_is_refused(run: Run, tmp_path: Path, placement: Placement, told: str) -> None:
    placement.save(path := tmp_path / "p.json")
    for more in ([], ["--dry-run"]):
        done = run("apply", path, *more)
        assert (done.status, done.out, done.err) == (1, "", f"error: {path} does not fit: {told}\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read: No such file or directory"),
        ("{", "Expecting"),
        ("{}", "the placement has no 'num_ranks'"),
    ],
)
@pytest.mark.parametrize("action", ["apply", "diff"])
def test_a_file_that_is_no_placement_is_refused(
    run: Run, tmp_path: Path, text: str | None, told: str, action: str
) -> None:
    path = tmp_path / "p.json"
    if text is not None:
        path.write_text(text)
    done = run(action, path)
    assert (done.status, done.out) == (1, "")
    [line] = done.err.splitlines()
    assert line.startswith(f"error: {path}: {told}")


def test_following_ends_in_time_and_says_what_goes_on(run: Run, client: SimulatedClient, tmp_path: Path) -> None:
    done = run("apply", other(tmp_path / "p.json"), "--timeout-s", "1e-9")
    assert done.status == 1
    assert done.err.startswith("error: waited 1e-09 s for target 2 to be reached (")
    assert done.err.endswith("); it goes on without this command\n")
    client.mesh.run_until_still()
    assert same_experts(published(client), Placement.load(tmp_path / "p.json"))


def test_an_interrupt_leaves_it_running_and_says_so(
    run: Run, client: SimulatedClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = client.status

    async def interrupted(*, timeout_s: float) -> object:
        if client.asked == 1:
            signal.raise_signal(signal.SIGINT)
        return await status(timeout_s=timeout_s)

    monkeypatch.setattr(client, "status", interrupted)
    done = run("apply", other(tmp_path / "p.json"))
    assert (done.status, done.err) == (130, "")
    assert done.out.endswith("interrupted while waiting for target 2 to be reached; it goes on without this command\n")
    monkeypatch.undo()
    client.mesh.run_until_still()
    assert same_experts(published(client), Placement.load(tmp_path / "p.json"))


def test_following_goes_on_through_a_restart_of_the_controller(
    run: Run, client: SimulatedClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = client.status

    async def restarting(*, timeout_s: float) -> object:
        if client.asked == 1 and not client.silent:
            client.silent = 3
            client.mesh.restart_controller()
        return await status(timeout_s=timeout_s)

    monkeypatch.setattr(client, "status", restarting)
    done = run("apply", other(tmp_path / "p.json"))
    assert (done.status, done.err) == (0, "")
    assert "did not answer status" in done.out
    assert " reached" in done.out.splitlines()[-1]
    assert same_experts(published(client), Placement.load(tmp_path / "p.json"))


def test_a_target_that_is_replaced_is_told(run: Run, client: SimulatedClient, tmp_path: Path) -> None:
    second = Placement.load(other(tmp_path / "second.json", seed=2))
    status = client.status

    async def replaced(*, timeout_s: float) -> object:
        if client.asked == 1:
            client.mesh.mesh.set_target(second, "config")
        return await status(timeout_s=timeout_s)

    client.status = replaced  # type: ignore[assignment,method-assign]
    done = run("apply", other(tmp_path / "p.json"))
    assert (done.status, done.err) == (1, "error: target 2 was replaced by target 3 (config)\n")


def test_a_paused_migration_is_not_waited_for(run: Run, client: SimulatedClient, tmp_path: Path) -> None:
    assert run("pause").status == 0
    done = run("apply", other(tmp_path / "p.json"))
    assert done.status == 1
    assert "target 2 is not reached, and the migration is paused" in done.err
    assert "paused, " in run("show").out
    assert run("resume").status == 0
    client.mesh.run_until_still()
    assert same_experts(published(client), Placement.load(tmp_path / "p.json"))


@pytest.mark.parametrize("name", ["1", "s1"])
def test_a_drained_shard_is_followed_until_it_is_empty(run: Run, client: SimulatedClient, name: str) -> None:
    done = run("drain", name)
    assert (done.status, done.err) == (0, "")
    assert "rank 1: empty; its shard may stop" in done.out.splitlines()[-1]
    assert not client.mesh.shards["s1"].held_LE.any()
    assert not published(client).partial, "the others have everything"
    assert run("show").out.splitlines()[-2].split()[:2] == ["1", "draining"]
    assert run("undrain", name).out == "rank 1: takes experts again\n"
    client.mesh.run_until_still()
    assert client.mesh.shards["s1"].held_LE.any()


def test_a_drain_without_room_is_refused_with_the_controllers_reason(run: Run, client: SimulatedClient) -> None:
    assert run("drain", "0").status == 0
    done = run("drain", "1")
    told = "rank 1 cannot be drained: without rank 1, 1 shards have 6 slots in a layer for 8 experts"
    assert (done.status, done.out, done.err) == (1, "", f"error: {told}\n")


def test_a_shard_that_is_not_there_is_answered_with_those_that_are(run: Run) -> None:
    done = run("drain", "7")
    assert done.status == 1
    assert done.err == (
        "error: no shard has the rank, process id or replica id '7'; there are 0 (pid 1, s0), 1 (pid 1, s1), "
        "2 (pid 1, s2)\n"
    )


def test_diff_counts_what_the_controller_would_copy(run: Run, client: SimulatedClient, tmp_path: Path) -> None:
    assert run("diff").out.startswith("nothing: epoch ")
    path = other(tmp_path / "p.json")
    found = json.loads(run("diff", path, "--json").out)
    assert f"{found['copies']} cop" in run("apply", path, "--dry-run").out
    text = run("diff", path).out
    assert text.splitlines()[0].endswith(f"to {path}:")
    assert run("apply", path, "--no-wait").status == 0
    assert text.splitlines()[2:] == run("diff").out.splitlines()[2:], "the target is the file now"
    client.mesh.run_until_still()
    assert run("diff").out.startswith("nothing: epoch ")


def test_history_is_told_as_json_too(run: Run, tmp_path: Path) -> None:
    run("show")
    run("apply", other(tmp_path / "p.json"))
    entries = json.loads(run("history", "--json").out)
    assert [(entry["version"], entry["origin"], entry["outcome"]) for entry in entries] == [
        (1, "first", "reached"),
        (2, "command", "reached"),
    ]


def test_changes_are_told_as_one_json_document_and_progress_apart(run: Run, tmp_path: Path) -> None:
    done = run("apply", other(tmp_path / "p.json"), "--json")
    told = json.loads(done.out)
    assert (told["target_version"], told["reached"], told["dry_run"]) == (2, True, False)
    assert "target 2 reached, epoch" in done.err
    assert json.loads(run("apply", tmp_path / "p.json", "--dry-run", "--json").out)["copies"] == 0
    assert json.loads(run("drain", "1", "--json").out) == {"rank": 1, "shard_id": "s1", "draining": True, "empty": True}
    assert json.loads(run("undrain", "1", "--json").out)["draining"] is False
    assert [json.loads(run(word, "--json").out) for word in ("pause", "resume")] == [
        {"paused": True},
        {"paused": False},
    ]
