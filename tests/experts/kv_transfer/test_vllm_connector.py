"""A prompt that one engine computes and another goes on with: the tokens are those of one engine, whatever happens to
the files between them.

Float32 and greedy; the blocks are copied bit by bit, so tokens are compared as they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experts.kv_transfer.handover import new_name
from tests.support.zygote.engine_zygote import Zygote
from tests.support.zygote.transfer_jobs import BLOCK, STEP_TOKENS

pytestmark = pytest.mark.whole_machine

FAMILIES = ("qwen3_moe", "deepseek_v2", "gpt_oss")  # plain attention; MLA; sliding windows and sinks
SHARED = 2 * BLOCK  # tokens that the last two prompts begin with
LENGTHS = (STEP_TOKENS * 2 + 20, BLOCK + 1, 70, 200, SHARED + 50, SHARED + 9)


def make_prompts() -> list[list[int]]:
    draw = random.Random(5)
    found = [[draw.randrange(90) for _ in range(count)] for count in LENGTHS]
    found[-1][:SHARED] = found[-2][:SHARED]
    return found


PROMPTS = make_prompts()


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("transfer") / "zygote", "engine", "transfer_jobs")
    yield zygote
    zygote.close()


def make(zygote: Zygote, folder: Path, family: str) -> str:
    job = zygote.start("make", family=family, path=str(folder), overrides={})
    zygote.wait(job, "changed")
    return str(folder)


def compute(zygote: Zygote, model: str, folder: Path, prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
    names = [new_name() for _ in prompts]
    job = zygote.start("compute_prompts", model=model, folder=str(folder), prompts=prompts, names=names, **options)
    return list(zygote.wait(job, "offers"))


def go_on(zygote: Zygote, model: str, folder: Path, *rounds: dict[str, Any]) -> list[dict[str, Any]]:
    job = zygote.start("go_on", model=model, folder=str(folder), rounds=list(rounds))
    return list(zygote.wait(job, "rounds"))


def alone(prompts: list[list[int]]) -> dict[str, Any]:
    return {"prompts": prompts, "params": [None] * len(prompts)}


def tokens_of(answers: dict[str, Any]) -> list[list[int]]:
    return [ids for ids, _ in answers["answers"]]


def test_the_interface_of_vllm_is_where_the_connector_looks_for_it(zygote: Zygote) -> None:
    job = zygote.start("joints")
    zygote.wait(job, "done")
    facts = zygote.events(job)
    assert facts["unknown"] == facts["missing"] == []
    assert [name for name, (theirs, ours) in facts["signatures"].items() if theirs != ours] == []
    assert {"finished_recving", "failed_recving"} <= set(facts["results"])
    assert len(facts["says"]) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens_as_one_engine(zygote: Zygote, tmp_path: Path, family: str) -> None:
    """Prompts of one step and of several, one that begins as another does, and one that the reader has half of."""
    model, folder = make(zygote, tmp_path / "model", family), tmp_path / "kv"
    offers = compute(zygote, model, folder, PROMPTS)
    again = compute(zygote, model, folder, PROMPTS[-2:])
    one, two, half = go_on(
        zygote,
        model,
        folder,
        alone(PROMPTS),
        {"prompts": PROMPTS, "params": offers},
        # The end of the first is new; the cache has the second as a whole, but for what is no whole block.
        {"prompts": PROMPTS[-2:], "params": again, "warm": True},
    )
    assert one["taken"] == 0
    assert tokens_of(two) == tokens_of(one)
    assert two["taken"] == sum(LENGTHS), "all prompts came from the other engine"
    assert tokens_of(half) == tokens_of(one)[-2:]
    # vLLM has no prefix cache for MLA on CPUs.
    assert (half["taken"] < sum(LENGTHS[-2:])) == (family != "deepseek_v2")
    left = {path.name for path in folder.iterdir()}
    assert left <= {offer["file"] for offer in again}, "a file that was read is gone"
    assert [cached for _, cached in two["answers"]] == [offer["remote_prefill_cached_tokens"] for offer in offers]


@pytest.fixture(scope="module")
def scene(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One engine computes prompts, files are changed, and another engine goes on: alone, with them, and so on."""
    home = tmp_path_factory.mktemp("scene")
    folder, long, short = home / "kv", PROMPTS[0], PROMPTS[3]
    model, other = make(zygote, home / "model", "qwen3_moe"), make(zygote, home / "other", "mixtral")
    prompts = [long, long, short, short, long, short, long, long]
    offers = compute(zygote, model, folder, prompts)
    missing, cut, flipped, swapped, foreign, outside, right, kept = offers
    (theirs,) = compute(zygote, other, home / "theirs", [long])
    (folder / missing["file"]).unlink()
    whole = (folder / cut["file"]).read_bytes()
    (folder / cut["file"]).write_bytes(whole[:-1])
    damaged = bytearray((folder / flipped["file"]).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / flipped["file"]).write_bytes(damaged)
    swapped.update(file=kept["file"], keep=True)
    (folder / foreign["file"]).write_bytes((home / "theirs" / theirs["file"]).read_bytes())
    outside["file"] = f"../theirs/{theirs['file']}"
    strange = [{**kept, "digest": "00" * 32}, {**kept, "num_tokens": 5}, {"do_remote_prefill": True}]
    names = ("one", "wrong", "right", "strange", "kept")
    rounds = go_on(
        zygote,
        model,
        folder,
        alone([long, short]),
        {"prompts": prompts[:6], "params": offers[:6]},
        {"prompts": [long], "params": [right]},
        {"prompts": [long] * 3, "params": strange},
        {"prompts": [long] * 2, "params": [{**kept, "keep": True}] * 2},
    )
    left = {path.name for path in folder.iterdir()}
    read = {offer["file"] for offer in (cut, flipped, foreign, right)}
    return {**dict(zip(names, rounds, strict=True)), "left": left, "read": read, "kept_file": kept["file"]}


def test_files_that_are_not_right_are_not_read(scene: dict[str, Any]) -> None:
    """Missing, cut off, with a wrong bit, of another prompt, of other weights, by a name that leads out of the folder:
    each costs computing the prompt, and nothing else."""
    long, short = tokens_of(scene["one"])
    assert long != short
    assert tokens_of(scene["wrong"]) == [long, long, short, short, long, short]
    assert tokens_of(scene["right"]) == [long]
    assert scene["right"]["taken"] == LENGTHS[0]


def test_what_is_no_handover_of_this_prompt_is_passed_over(scene: dict[str, Any]) -> None:
    assert scene["strange"]["taken"] == 0
    assert tokens_of(scene["strange"]) == tokens_of(scene["one"])[:1] * 3


def test_a_file_stays_for_all_who_read_it_and_no_other_does(scene: dict[str, Any]) -> None:
    assert scene["kept"]["taken"] == 2 * LENGTHS[0]
    assert tokens_of(scene["kept"]) == tokens_of(scene["one"])[:1] * 2
    assert scene["kept_file"] in scene["left"]
    assert scene["left"].isdisjoint(scene["read"])


def test_a_prompt_that_could_not_be_written_is_not_offered(zygote: Zygote, tmp_path: Path) -> None:
    """One more than fits, and a file's name that is none."""
    model, folder = make(zygote, tmp_path / "model", "qwen3_moe"), tmp_path / "kv"
    job = zygote.start(
        "compute_prompts",
        model=model,
        folder=str(folder),
        prompts=[PROMPTS[1], PROMPTS[0]],
        names=[new_name(), "../outside.kv"],
        max_bytes=100,
    )
    assert zygote.wait(job, "offers") == [None, None]
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "outside.kv").exists()
