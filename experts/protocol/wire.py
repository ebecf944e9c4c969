"""The bytes of a dispatch request and of its reply.

Legend: M rows, N (row, expert) pairs, D hidden size. All sections start on 64-byte boundaries.

    request: header int64[16] | row_offsets_M1 int32 | experts_N int32 | weights_N float32 | rows_MD
    reply:   header int64[16] | rows_MD                                  (status OK)
             header int64[16] | utf-8 text of the error                  (otherwise)

Row m has the pairs row_offsets[m] : row_offsets[m + 1]; a row travels once, however many experts it needs there.
Experts are named by logical id, and the shard looks up its own slot for each. So a router of an older epoch is still
answered while the shard holds the expert, and a mismatch of epochs can never reach another expert's weights.

Words of the header (constants H_*). A dash means that the word is neither written nor read:

    word  name    in a request (router writes, shard reads)     in a reply (shard writes, router reads)
    0     MAGIC   MAGIC, else the request is refused            MAGIC, else the reply is refused
    1     SEQ     number of the message                         the request's number
    2     EPOCH   the router's epoch, for the shard's status    -
    3     LAYER   MoE layer: a row of the placement             -
    4     ROWS    M; transports that send rows apart read it    M; likewise
    5     PAIRS   N                                             -
    6     DTYPE   DTYPE_CODES, compared with the shard's own    -
    7     HIDDEN  D, compared with the shard's own              -
    8     STATUS  -                                             STATUS_OK, STATUS_REJECTED or STATUS_NO_SLOT
    9     TEXT    -                                             bytes of the error's text (not with STATUS_OK)
    10    NO_SLOT_LAYER   -                                     the request's layer (STATUS_NO_SLOT)
    11    NO_SLOT_EXPERT  -                                     an expert without a slot (STATUS_NO_SLOT)
    12    COMPUTE_NS  -                                         how long the shard computed (STATUS_OK); 0 for not said
    13-15   HINTS   a bit for each expert that the next layer   -
                    will probably need; zero: not said. Only
                    where a shard of the epoch wants hints

STATUS_NO_SLOT: the request is sound, but the shard does not hold all of its experts (any more, or yet). Nothing was
computed. The header names one such expert, the text says how many there are. The shard still serves the others.

To add a word, take the next free one, extend this table, and raise `PROTOCOL_VERSION` (in
experts.transports.control_port.handshake) unless zero, which the other version has there, will do.
"""

from __future__ import annotations

import numpy as np
import torch

from placement.compiled import compiled

MAGIC = 0x45584D31  # "EXM1"
HEADER_WORDS = 16
HEADER_BYTES = 8 * HEADER_WORDS
ALIGN = 64

H_MAGIC, H_SEQ, H_EPOCH, H_LAYER, H_ROWS, H_PAIRS, H_DTYPE, H_HIDDEN, H_STATUS, H_TEXT = range(10)
H_NO_SLOT_LAYER, H_NO_SLOT_EXPERT, H_COMPUTE_NS = 10, 11, 12
H_HINTS = 13
HINTED_EXPERTS = 64 * (HEADER_WORDS - H_HINTS)  # a layer with more of them gets no hints

STATUS_OK = 0
STATUS_REJECTED = 1
STATUS_NO_SLOT = 2

DTYPE_CODES: dict[torch.dtype, int] = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


@compiled()
def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the next section boundary."""
    return (nbytes + ALIGN - 1) // ALIGN * ALIGN


@compiled()
def request_layout(num_rows: int, num_pairs: int, row_bytes: int) -> tuple[int, int, int, int, int]:
    """Byte offsets of (row_offsets, experts, weights, rows), and the length of the request."""
    offsets_at = HEADER_BYTES
    experts_at = offsets_at + aligned(4 * (num_rows + 1))
    weights_at = experts_at + aligned(4 * num_pairs)
    rows_at = weights_at + aligned(4 * num_pairs)
    return offsets_at, experts_at, weights_at, rows_at, rows_at + num_rows * row_bytes


def request_capacity(max_rows: int, top_k: int, row_bytes: int) -> int:
    """Bytes of the largest request: `max_rows` rows with `top_k` experts each."""
    return int(aligned(request_layout(max_rows, max_rows * top_k, row_bytes)[4]))


def reply_capacity(max_rows: int, row_bytes: int) -> int:
    """Bytes of the largest reply; always enough for the text of an error."""
    return int(aligned(max(HEADER_BYTES + max_rows * row_bytes, 4096)))


def exchange_bytes(num_rows: int, num_pairs: int, row_bytes: int) -> int:
    """Bytes of a request of `num_rows` rows with `num_pairs` (row, expert) pairs, and of the reply to it."""
    return int(request_layout(num_rows, num_pairs, row_bytes)[4]) + HEADER_BYTES + num_rows * row_bytes


def header_of(buffer: np.ndarray) -> np.ndarray:
    """The header words (int64 [16], a view) of a message in `buffer` (uint8)."""
    return buffer[:HEADER_BYTES].view(np.int64)


def hint_words(experts_N: np.ndarray) -> np.ndarray:
    """Words H_HINTS and later (int64 [3]) for experts, each below HINTED_EXPERTS."""
    bits = np.zeros(HINTED_EXPERTS, np.uint8)
    bits[experts_N] = 1
    return np.packbits(bits, bitorder="little").view(np.int64)


def hinted_experts(words: np.ndarray, num_experts: int) -> np.ndarray:
    """The experts below `num_experts` that `hint_words` was told, ascending."""
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:num_experts])


def error_reply(buffer: np.ndarray, seq: int, text: str) -> int:
    """Write a STATUS_REJECTED reply with `text`, cut to fit `buffer`; returns the reply's length in bytes."""
    data = text.encode()[: len(buffer) - HEADER_BYTES]
    header = header_of(buffer)
    header[:] = 0
    header[H_MAGIC], header[H_SEQ], header[H_STATUS], header[H_TEXT] = MAGIC, seq, STATUS_REJECTED, len(data)
    buffer[HEADER_BYTES : HEADER_BYTES + len(data)] = np.frombuffer(data, np.uint8)
    return HEADER_BYTES + len(data)


def no_slot_reply(buffer: np.ndarray, seq: int, text: str, layer: int, expert: int) -> int:
    """Write a STATUS_NO_SLOT reply for `expert` of `layer`, otherwise as `error_reply`."""
    length = error_reply(buffer, seq, text)
    header = header_of(buffer)
    header[H_STATUS], header[H_NO_SLOT_LAYER], header[H_NO_SLOT_EXPERT] = STATUS_NO_SLOT, layer, expert
    return length


def error_text(buffer: np.ndarray) -> str:
    """The text of a STATUS_REJECTED or STATUS_NO_SLOT reply."""
    length = int(header_of(buffer)[H_TEXT])
    return bytes(buffer[HEADER_BYTES : HEADER_BYTES + length]).decode(errors="replace")
