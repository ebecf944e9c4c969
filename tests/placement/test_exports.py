"""Exports, each read back by a reader of its own, and traces as vLLM and SGLang write them (torch writes .pt here)."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import yaml

from placement.exports import export_sglang, export_tensorrt_llm, export_vllm, export_vllm_ascend, yaml_text
from placement.placement import Placement
from placement.traces.importers import import_trace
from placement.traces.trace import ActivationTrace, TraceError

PLACEMENT = Placement(2, 1, 3, np.array([[0, 1, 2, 0], [2, 1, 0, 2]]))


def test_export_vllm():
    out = json.loads(json.dumps(export_vllm(PLACEMENT)))
    assert out["physical_to_logical_map"] == [[0, 1, 2, 0], [2, 1, 0, 2]]
    assert out["logical_to_physical_map"] == [[[0, 3], [1, -1], [2, -1]], [[2, -1], [1, -1], [0, 3]]]
    assert out["logical_replica_count"] == [[2, 1, 1], [1, 1, 2]]
    assert out["engine_args"]["eplb_config"] == {"num_redundant_experts": 1}
    assert Placement.from_json(out) == PLACEMENT


def test_export_sglang_has_one_key_and_a_row_for_every_decoder_layer():
    assert export_sglang(PLACEMENT) == {"physical_to_logical_map": [[0, 1, 2, 0], [2, 1, 0, 2]]}
    assert export_sglang(PLACEMENT, layers=[1, 3], num_hidden_layers=5) == {
        "physical_to_logical_map": [[0, 1, 2, 0], [0, 1, 2, 0], [0, 1, 2, 0], [2, 1, 0, 2], [0, 1, 2, 0]]
    }
    assert len(export_sglang(PLACEMENT, layers=[1, 3])["physical_to_logical_map"]) == 4
    with pytest.raises(ValueError, match="layers must name 2 different decoder layers"):
        export_sglang(PLACEMENT, layers=[1])
    with pytest.raises(ValueError, match="layers are 1 to 3, expected 0 to 2"):
        export_sglang(PLACEMENT, layers=[1, 3], num_hidden_layers=3)


# Readers written from the engines' own descriptions and sources, sharing no code with the exports. Each returns what
# the engine makes of a file: for each decoder or MoE layer the experts of each rank, in the order of their slots.
Held = dict[int, list[list[int]]]


def as_vllm_ascend_reads(text: str) -> Held:
    """Rows by position, not by id; as many experts on every device, so that a tensor can be made of them."""
    data = json.loads(text)
    assert len(data["layer_list"]) == data["moe_layer_count"]
    held = {}
    for position, layer in enumerate(data["layer_list"]):
        assert layer["layer_id"] == position
        devices = layer["device_list"]
        assert [device["device_id"] for device in devices] == list(range(layer["device_count"]))
        assert len({len(device["device_expert"]) for device in devices}) == 1
        held[position] = [device["device_expert"] for device in devices]
    return held


def as_sglang_reads(text: str, num_ranks: int) -> Held:
    """The keys go to a function by name, so there must be no others; slots are dealt to ranks in order."""

    def init_by_mapping(*, physical_to_logical_map: list[list[int]]) -> Held:
        size = len(physical_to_logical_map[0]) // num_ranks
        assert {len(row) for row in physical_to_logical_map} == {size * num_ranks}
        return {
            layer: [row[size * rank : size * (rank + 1)] for rank in range(num_ranks)]
            for layer, row in enumerate(physical_to_logical_map)
        }

    return init_by_mapping(**json.loads(text))


def as_tensorrt_llm_reads(text: str, num_ranks: int, moe_layers: list[int]) -> Held:
    """Strict keys; layers are integers and every MoE layer is looked up; each row has `num_slots` entries."""
    data = yaml.safe_load(text)
    assert set(data) <= {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
    assert data["layer_updates_per_iter"] == 0
    assert data["num_slots"] % num_ranks == 0
    size = data["num_slots"] // num_ranks
    held = {}
    for layer in moe_layers:
        row = data["initial_global_assignments"][layer]
        assert len(row) == data["num_slots"]
        held[layer] = [row[size * rank : size * (rank + 1)] for rank in range(num_ranks)]
    return held


def random_placement(seed: int) -> Placement:
    """4 ranks on 2 nodes, 5 slots each, 13 experts in 3 layers; some have a replica, every slot is used."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(np.concatenate([np.arange(13), rng.choice(13, 7, replace=False)])) for _ in range(3)]
    return Placement(4, 2, 13, np.array(rows))


@pytest.mark.parametrize("seed", range(5))
def test_each_engine_finds_every_expert_where_the_placement_has_it(seed):
    placement = random_placement(seed)
    expected = [[placement.experts_of_rank(rank)[layer].tolist() for rank in range(4)] for layer in range(3)]
    assert as_vllm_ascend_reads(json.dumps(export_vllm_ascend(placement))) == dict(enumerate(expected))
    sglang = as_sglang_reads(json.dumps(export_sglang(placement, layers=[1, 2, 4], num_hidden_layers=6)), 4)
    assert set(sglang) == set(range(6))
    assert [sglang[layer] for layer in (1, 2, 4)] == expected
    text = yaml_text(export_tensorrt_llm(placement, layers=[1, 2, 4]))
    assert as_tensorrt_llm_reads(text, 4, [1, 2, 4]) == dict(zip([1, 2, 4], expected, strict=True))
    assert "  4: [" in text  # a row on its own line, as in TensorRT-LLM's documentation


@pytest.mark.parametrize("seed", range(5))
def test_vllm_derives_from_our_map_what_we_export(seed):
    torch, eplb_state = pytest.importorskip("torch"), pytest.importorskip("vllm.distributed.eplb.eplb_state")
    parallel = pytest.importorskip("vllm.config.parallel")
    out = json.loads(json.dumps(export_vllm(random_placement(seed))))
    found, count = eplb_state.compute_logical_maps(torch.tensor(out["physical_to_logical_map"]), out["num_experts"])
    assert found.tolist() == out["logical_to_physical_map"]
    assert count.tolist() == out["logical_replica_count"]
    config = parallel.EPLBConfig(**out["engine_args"]["eplb_config"])
    assert config.num_redundant_experts + out["num_experts"] == len(out["physical_to_logical_map"][0])


def test_tensorrt_llm_counts_layers_from_0_unless_they_are_named():
    assert as_tensorrt_llm_reads(yaml_text(export_tensorrt_llm(PLACEMENT)), 2, [0, 1])[1] == [[2, 1], [0, 2]]
    with pytest.raises(ValueError, match="layers must name 2 different decoder layers"):
        export_tensorrt_llm(PLACEMENT, layers=[3, 3])


EXPORTS = [export_vllm, export_vllm_ascend, export_sglang, export_tensorrt_llm]


def first_row(data):
    """The slots of layer 0 in any of the formats."""
    if "layer_list" in data:
        return [expert for device in data["layer_list"][0]["device_list"] for expert in device["device_expert"]]
    return (data.get("physical_to_logical_map") or data["initial_global_assignments"])[0]


@pytest.mark.parametrize("export", EXPORTS)
def test_empty_slots(export):
    holes = Placement(3, 1, 3, np.array([[0, 1, 2, -1, -1, -1]]))
    with pytest.raises(ValueError, match=r"layer 0: slot 3 is empty \(3 in all\)"):
        export(holes)
    row = first_row(export(holes, fill_empty=True))
    assert row[:4] == [0, 1, 2, 2]
    assert all(0 <= expert < 3 for expert in row)


@pytest.mark.parametrize("export", EXPORTS)
def test_a_placement_that_lacks_experts_is_refused(export):
    partial = Placement(2, 1, 3, np.array([[0, 1, 0, 1]]), partial=True)
    with pytest.raises(ValueError, match="layer 0: expert 2 has no slot"):
        export(partial, fill_empty=True)


def routed(seed=0, tokens=20, layers=3, k=2, num_experts=8):
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, layers, num_experts)), axis=2)[:, :, :k].astype(np.uint8)


def as_base64(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".json", ".jsonl"])
def test_vllm_routed_experts(tmp_path, suffix):
    first, second = routed(0), routed(1, tokens=7)
    path = tmp_path / f"trace{suffix}"
    expected = np.concatenate([first, second])
    if suffix == ".npy":
        np.save(path, expected)
    elif suffix == ".npz":
        np.savez(path, first, second)
    else:
        choices = [{"index": 0, "routed_experts": as_base64(first)}, {"index": 1, "routed_experts": None}]
        responses = [{"id": "a", "choices": choices}, {"id": "b", "choices": [{"routed_experts": second.tolist()}]}]
        path.write_text("\n".join(map(json.dumps, responses)) if suffix == ".jsonl" else json.dumps(responses))
    for kind in ("vllm", "auto"):
        trace = import_trace(path, kind, num_experts=8)
        assert (trace.topk_ids == expected).all()
        assert (trace.num_experts, trace.layers) == (8, (0, 1, 2))


def test_vllm_dense_layers_are_left_out(tmp_path):
    array = routed()
    array[:, 0] = 0
    np.save(tmp_path / "trace.npy", array)
    trace = import_trace(tmp_path / "trace.npy", "vllm")
    assert trace.layers == (1, 2)
    assert (trace.topk_ids == array[:, 1:]).all()


# What SGLang's recorder saves: layer 0 is dense, slots of layers 1 and 2 are shuffled, 4 experts on 5 slots.
MAP_LS = [[0, 1, 2, 3, 0], [3, 2, 1, 0, 3], [1, 0, 3, 2, 1]]


def per_token_dump(as_array):
    ids_LTK = np.full((3, 4, 3), -1, np.int32)  # the last token is padding, the third choice is not used
    ids_LTK[1, :3, :2] = [[0, 1], [4, 2], [3, 1]]
    ids_LTK[2, :3, :2] = [[0, 1], [4, 2], [3, 1]]
    return {
        "records": [
            {"forward_pass_id": 1, "rank": 0, "gatherer_key": "primary", "input_ids": [1, 2, 3, 0],
             "topk_ids_of_layer": as_array(ids_LTK), "global_physical_count": as_array(np.ones((3, 5)))}
        ],
        "last_physical_to_logical_map": as_array(np.array(MAP_LS)),
    }  # fmt: skip


def write(path, make):
    if path.suffix == ".pt":
        torch = pytest.importorskip("torch")
        torch.save(make(torch.from_numpy), path)
    else:
        path.write_text(json.dumps(make(lambda array: array.tolist())))


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_sglang_per_token(tmp_path, suffix):
    path = tmp_path / f"dump{suffix}"
    write(path, per_token_dump)
    trace = import_trace(path, "sglang")
    assert trace.layers == (1, 2)
    assert trace.num_experts == 4
    assert trace.topk_ids.tolist() == [
        [[3, 2, -1], [1, 0, -1]],
        [[3, 1, -1], [1, 3, -1]],
        [[0, 2, -1], [2, 0, -1]],
    ]


@pytest.mark.parametrize("suffix", [".pt", ".json"])
def test_sglang_counts(tmp_path, suffix):
    path = tmp_path / f"dump{suffix}"
    counts = np.array([[[0, 0], [1, 2]], [[0, 0], [3, 4]]])  # two buffered steps, a dense layer
    write(path, lambda as_array: {"rank": 0, "logical_count": as_array(counts), "average": None})
    trace = import_trace(path, "auto")
    assert not trace.has_sets
    assert trace.layers == (1,)
    assert trace.counts.tolist() == [[4, 6]]


def test_a_folder_of_dumps_is_merged(tmp_path):
    for rank in range(3):
        write(tmp_path / f"dump{rank}.json", per_token_dump)
    assert import_trace(tmp_path, "sglang").num_tokens == 9
    (tmp_path / "empty").mkdir()
    with pytest.raises(TraceError, match="no traces in the folder"):
        import_trace(tmp_path / "empty", "sglang")


def test_olmoe(tmp_path):
    ids = routed(tokens=30)
    domain = (np.arange(30) % 2).astype(np.int8)
    load = np.stack([np.full((3, 8), 5), np.full((3, 8), 7)])
    np.savez(
        tmp_path / "train.npz", topk_ids=ids.astype(np.int16), domain=domain, domains=np.array(["a", "b"]),
        expert_load=load, num_experts=8, layers=np.array([0, 7, 15]),
    )  # fmt: skip
    for kind in ("olmoe", "auto"):
        trace = import_trace(tmp_path / "train.npz", kind)
        assert trace.layers == (0, 7, 15)
        assert trace.domains == ("a", "b")
        assert (trace.counts == 12).all()
        assert trace.of_domain("b").num_tokens == 15


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.json", "{}", "auto", "neither `routed_experts` nor an expert-distribution dump"),
        ("a.json", "{", "auto", "not a usable trace"),
        ("a.json", '{"routed_experts": "xyz"}', "vllm", "not an .npy in base64"),
        ("a.json", '{"routed_experts": [[1, 2]]}', "vllm", r"arrays \[tokens, layers, k\]"),
        ("a.json", '{"records": []}', "sglang", "expected logical_count, or records with a map"),
        ("a.pt", "no archive", "sglang", "not a usable trace"),
        ("a.npz", "no archive", "olmoe", "not a usable trace"),
        ("a.json", "{}", "deepspeed", "trace format is 'deepspeed'"),
        ("a.json", "[" * 100_000, "auto", "not a usable trace"),
        ("a.json", '{"routed_experts": [[[0, 1.7]]]}', "vllm", "routed_experts must be integers, got float64"),
        ("a.json", '{"logical_count": [[NaN, 1]]}', "auto", "layer 0: the count of expert 0 is nan"),
        ("a.json", '{"logical_count": "abc"}', "auto", "logical_count must be numbers"),
        (
            "a.json",
            '{"records": [{"global_physical_count": 5}], "last_physical_to_logical_map": [[0, 1]]}',
            "auto",
            r"global_physical_count must be numbers \[1, 2\]",
        ),
        (
            "a.json",
            '{"records": [{"topk_ids_of_layer": [[[0, -7]]]}], "last_physical_to_logical_map": [[0, 1]]}',
            "auto",
            r"topk_ids_of_layer holds -7, expected -1 \(padding\) to 1",
        ),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, kind, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TraceError, match=message) as caught:
        import_trace(tmp_path / name, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_archive_is_refused_or_read_and_nothing_else(tmp_path, save):
    path, rng = tmp_path / "trace.npz", np.random.default_rng(0)
    ids = rng.integers(0, 8, (200, 2, 2))
    save(path, topk_ids=ids, num_experts=8, layers=[3, 5], schema_version=1)
    sound, refused = path.read_bytes(), []
    for _ in range(300):
        damaged = np.frombuffer(sound, np.uint8).copy()
        damaged[rng.integers(len(damaged), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes())
        try:
            import_trace(path)
        except TraceError as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert not [message for message in refused if "\n" in message]


def test_another_number_of_experts_than_the_file_says_is_refused(tmp_path):
    ActivationTrace(np.zeros((4, 1, 2), int), 8).save(tmp_path / "trace.npz")
    assert import_trace(tmp_path / "trace.npz", num_experts=8).num_experts == 8
    with pytest.raises(TraceError, match="the trace has 8 experts, but num_experts is 4"):
        import_trace(tmp_path / "trace.npz", num_experts=4)


def test_a_missing_file(tmp_path):
    with pytest.raises(TraceError, match="No such file"):
        import_trace(tmp_path / "none.json")
    with pytest.raises(TraceError, match="No such file"):
        import_trace(tmp_path / "none.npz")


def test_a_pickle_that_runs_something_is_refused(tmp_path):
    torch = pytest.importorskip("torch")

    class Runs:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"logical_count": Runs()}, tmp_path / "bad.pt")
    with pytest.raises(TraceError, match=r"the file needs \w+\.print, which is not read"):
        import_trace(tmp_path / "bad.pt", "sglang")
