"""`profile`, `explain` and `export`: traces, reports and other engines' files."""

from __future__ import annotations

import json
from pathlib import Path

from placement.command.ending import CommandError, Ending, tell
from placement.placement import Placement
from placement.progress import ProgressBar
from placement.traces.trace import ActivationTrace


def profile(
    url: str,
    prompts: Path,
    out: Path,
    model: str | None,
    max_tokens: int,
    concurrency: int,
    timeout_s: float,
    api_key: str | None,
    keep: bool,
    as_json: bool,
) -> None:
    """Send prompts to a server, then write what it recorded."""
    from placement.traces.profile import NoServerError, profile_server, read_prompts

    asked = read_prompts(prompts)
    try:
        with ProgressBar("prompts answered") as bar:
            trace = profile_server(
                url,
                asked,
                model=model,
                max_tokens=max_tokens,
                concurrency=concurrency,
                timeout_s=timeout_s,
                progress=bar.update,
                api_key=api_key,
                keep=keep,
            )
    except NoServerError as error:
        raise CommandError(str(error), ending=Ending.UNREACHABLE) from None
    trace.save(out)
    sizes = {"tokens": trace.num_tokens, "layers": trace.num_layers, "experts": trace.num_experts}
    line = f"{out}: {', '.join(f'{number} {name}' for name, number in sizes.items())}"
    tell(as_json, {"out": str(out), **sizes}, [line])


def explain(trace: ActivationTrace, placement: Path, before: Path | None, out: Path, as_json: bool) -> None:
    """Write the HTML report and its PNGs."""
    from placement.report.page import write_report

    earlier = Placement.load(before) if before else None
    with ProgressBar("layers drawn") as bar:
        written = write_report(trace, Placement.load(placement), earlier, str(out), progress=bar.update)
    paths = [str(path) for path in written]
    tell(as_json, {"written": paths}, paths)


def export(
    placement: Path,
    engine: str,
    out: Path,
    layers: tuple[int, ...] | None,
    num_hidden_layers: int | None,
    fill_empty: bool,
    as_json: bool,
) -> None:
    """Write the placement as another engine reads it. ValueError for what that engine would not read."""
    from placement.exports import export_sglang, export_tensorrt_llm, export_vllm, export_vllm_ascend, yaml_text

    if layers is not None and engine not in ("sglang", "tensorrt-llm"):
        raise ValueError("--layers is for SGLang and TensorRT-LLM; vLLM counts only MoE layers")
    if num_hidden_layers is not None and engine != "sglang":
        raise ValueError("--num-hidden-layers is for SGLang, whose map has a row for every decoder layer")
    # Both engines tell what a file holds by its name.
    suffixes = {"sglang": (".json",), "tensorrt-llm": (".yaml", ".yml")}.get(engine)
    if suffixes and out.suffix not in suffixes:
        raise ValueError(f"{out}: {engine} reads files named {' or '.join(suffixes)}")
    loaded = Placement.load(placement)
    if engine == "tensorrt-llm":
        text = yaml_text(export_tensorrt_llm(loaded, layers=layers, fill_empty=fill_empty))
    elif engine == "sglang":
        told = export_sglang(loaded, layers=layers, num_hidden_layers=num_hidden_layers, fill_empty=fill_empty)
        text = json.dumps(told) + "\n"
    else:
        write = export_vllm if engine == "vllm" else export_vllm_ascend
        text = json.dumps(write(loaded, fill_empty=fill_empty)) + "\n"
    out.write_text(text)
    tell(as_json, {"out": str(out), "format": engine}, [str(out)])
