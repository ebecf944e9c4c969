// The bytes of a request and of its reply; experts/protocol/wire.py has the table, and a test compares the two.

#pragma once

#include <stdint.h>

enum { HEADER_WORDS = 16, HEADER_BYTES = 8 * HEADER_WORDS, SECTION_ALIGN = 64 };
enum HeaderWord {
    H_MAGIC, H_SEQ, H_EPOCH, H_LAYER, H_ROWS, H_PAIRS, H_DTYPE, H_HIDDEN, H_STATUS, H_TEXT,
    H_COMPUTE_NS = 12, H_HINTS = 13,
};
enum { HINT_WORDS = HEADER_WORDS - H_HINTS };
enum : int64_t { MAGIC = 0x45584D31, STATUS_OK = 0 };
enum Dtype : int64_t { FLOAT32 = 1, BFLOAT16 = 2, FLOAT16 = 3 };

inline int64_t value_bytes(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }

inline int64_t aligned(int64_t nbytes) { return (nbytes + SECTION_ALIGN - 1) / SECTION_ALIGN * SECTION_ALIGN; }

struct RequestLayout {
    int64_t offsets_at, experts_at, weights_at, rows_at, nbytes;
    RequestLayout(int64_t num_rows, int64_t num_pairs, int64_t row_bytes) {
        offsets_at = HEADER_BYTES;
        experts_at = offsets_at + aligned(4 * (num_rows + 1));
        weights_at = experts_at + aligned(4 * num_pairs);
        rows_at = weights_at + aligned(4 * num_pairs);
        nbytes = rows_at + num_rows * row_bytes;
    }
};
