"""What the headers of files say of a layer for multi-token prediction that is served."""

from __future__ import annotations

from dataclasses import replace

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.sizes.from_headers import MTP, MTP_EXPERTS
from placement.sizing.model import SERVED_BYTES, ModelFacts, Side


def with_parts(facts: ModelFacts, parts: tuple[tuple[str, Side, int], ...]) -> ModelFacts:
    """The model with the bytes of its files, those of a served MTP layer among them.

    CheckpointError if the files lack that layer's experts.
    """
    facts = replace(facts, header_bytes=parts)
    if facts.mtp_router_bytes is None:
        return facts
    unused = {part: nbytes for part, side, nbytes in parts if side == "unused"}
    if MTP_EXPERTS not in unused:
        raise CheckpointError(f"{facts.name}: config.json names an MTP layer, which the files lack")
    nbytes = unused.get(MTP, 0)
    if facts.stored.form is None:
        return replace(facts, mtp_router_bytes=nbytes * SERVED_BYTES // facts.stored.float_bytes)
    facts = replace(facts, mtp_router_bytes=nbytes)
    if facts.moe_layers * unused[MTP_EXPERTS] == facts.weight_bytes("experts"):
        return facts
    note = "the layer for multi-token prediction is stored otherwise than the others: experts are held in 16 bits"
    return replace(facts, stored=replace(facts.stored, kept=False), notes=(*facts.notes, note))
