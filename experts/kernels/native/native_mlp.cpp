// Grouped gated MLP of one shard on the CPU: y[m] = sum over the pairs of row m of weight * w2 act(w13 x[m]).
//
// The pairs of a call are grouped by slot. A slot's rows are gathered into blocks of at most MAX_ROWS. Each weight panel
// (two vectors wide) is read from memory once and multiplied with all blocks while it is in cache. Sums stay in float32
// registers over the whole reduction, and each slot's product is added to a float32 y in ascending slot order. So a row's
// result depends neither on the other rows of the call nor on the number of threads.
//
// Legend: D hidden size, I expert intermediate size, M rows, N pairs; words and panels as in native_pack.h.

#include <unistd.h>

#include <algorithm>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "native_pack.h"

// 1 if the kernel was compiled for several threads.
extern "C" int32_t expert_mlp_has_threads() {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}

namespace {

struct Block {
    int32_t first, rows;  // in the pairs sorted by slot
};

struct Group {
    int32_t slot, first_block, num_blocks, rows;
};

// Where the slots of a kernel stand that has memory for some of them only. Shared with Python (placed.py), which moves
// slots from place to place while none of the layer is in use.
struct Places {
    const int32_t* place_of_slot;  // [layers, slots]; `loaded` says whether it holds
    int64_t* last_use;             // [layers, slots]: what `clock` said
    float* heat;                   // [layers, slots]: share of the layer's calls that used the slot, late ones most
    uint8_t* wanted;               // [slots]: those of the call that was refused last
    int64_t wanted_layer;          // of that call
    double heat_step;              // of a call
    int64_t clock;                 // calls so far
    int64_t layer;                 // whose slots are in use, else -1
    int64_t last_layer;            // of the newest call
    int64_t uses;                  // slots used, summed over calls
    int64_t called;                // an eventfd that is told of each call, else -1
};

struct Kernel {
    Sizes sizes;
    int64_t num_layers, num_slots;
    int32_t format, activation, on_input;
    float alpha, limit;
    const uint32_t* weights;
    int64_t slot_words;
    const uint8_t* loaded;  // [num_layers, num_slots]
    Places* places;         // null: each slot stands in its own
    // scratch memory, reused between calls
    std::vector<int32_t> starts, rows;
    std::vector<float> pair_weights, y;
    std::vector<int32_t> ranks, apart_rows;  // see Part
    std::vector<float> apart_weights, apart;
    std::vector<uint32_t> x_blocks, h_blocks;
    std::vector<Block> blocks;
    std::vector<Group> groups;
    std::vector<const void*> row_addresses;
    std::vector<void*> out_addresses;
};

// The words of a group's slot.
const uint32_t* words_of(const Kernel& k, int64_t layer, const Group& group) {
    if (!k.places) return k.weights + (layer * k.num_slots + group.slot) * k.slot_words;
    const int32_t place = k.places->place_of_slot[layer * k.num_slots + group.slot];
    return k.weights + place * k.slot_words;
}

// Keeps a layer's slots where they are. Python takes a slot out of `loaded`, then looks at `layer`; here it is the other
// way round, so one of the two sees the other.
struct LayerInUse {
    Places* places;
    LayerInUse(Places* p, int64_t layer) : places(p) {
        if (!places) return;
        __atomic_store_n(&places->layer, layer, __ATOMIC_SEQ_CST);
        __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }
    ~LayerInUse() {
        if (places) __atomic_store_n(&places->layer, int64_t(-1), __ATOMIC_SEQ_CST);
    }
};

// Note what a call uses, and tell who brings in what the next one may use.
void note_use(const Kernel& k, int64_t layer, bool first_part) {
    Places& p = *k.places;
    p.clock++;
    const float step = float(p.heat_step);
    float* heat = p.heat + layer * k.num_slots;
    if (first_part)
        for (int64_t slot = 0; slot < k.num_slots; slot++) heat[slot] *= 1.0f - step;
    for (const Group& group : k.groups) {
        p.last_use[layer * k.num_slots + group.slot] = p.clock;
        heat[group.slot] += step;
    }
    p.uses += k.groups.size();
    __atomic_store_n(&p.last_layer, layer, __ATOMIC_SEQ_CST);
    const uint64_t one = 1;
    if (p.called >= 0 && write(int(p.called), &one, sizeof one) < 0) return;  // full: it has been told
}

// Note what a call that is refused would use: somebody may bring it in.
void note_wanted(const Kernel& k, int64_t layer, int64_t N, const int32_t* slots) {
    Places& p = *k.places;
    std::fill(p.wanted, p.wanted + k.num_slots, uint8_t(0));
    for (int64_t n = 0; n < N; n++)
        if (slots[n] >= 0 && slots[n] < k.num_slots) p.wanted[slots[n]] = 1;
    p.wanted_layer = layer;
}

// What to prefetch during a multiplication: an address, and its step for each word of the reduction.
struct Ahead {
    const uint32_t* from;
    int64_t step;
};

// A single block prefetches its own panel, a distance ahead; several blocks each prefetch a part of the next panel.
Ahead look_ahead(const uint32_t* panel, int64_t words, int b, int num_blocks) {
    if (num_blocks == 1) return {panel + PREFETCH_WORDS, PANEL};
    return {panel + words * PANEL + b * words / num_blocks * PANEL, PANEL / num_blocks};
}

// sums[r][vector] of R rows times one panel, over the whole reduction.
template <class Format, int R>
void multiply(const uint32_t* block, const uint32_t* panel, int64_t words, VecF* sums, Ahead ahead) {
    constexpr int STEPS = Format::STEPS;
    VecF acc[R][2] = {};
    for (int64_t start = 0; start < words; start += CHUNK / STEPS, block += MAX_ROWS * ROW_STRIDE) {
        const int64_t length = std::min<int64_t>(CHUNK / STEPS, words - start);
        for (int64_t k = 0; k < length; k++, panel += PANEL, ahead.from += ahead.step) {
            __builtin_prefetch(ahead.from);
            __builtin_prefetch(ahead.from + LANES);
#pragma GCC unroll 2
            for (int step = 0; step < STEPS; step++) {
                const typename Format::B first = Format::load_b(panel, step), second = Format::load_b(panel + LANES, step);
#pragma GCC unroll 12
                for (int r = 0; r < R; r++) {
                    const uint32_t* a = block + r * ROW_STRIDE + k * STEPS + step;
                    acc[r][0] = Format::multiply_add(acc[r][0], a, first);
                    acc[r][1] = Format::multiply_add(acc[r][1], a, second);
                }
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < 2; v++) sums[2 * r + v] = acc[r][v];
}

typedef void (*Multiply)(const uint32_t*, const uint32_t*, int64_t, VecF*, Ahead);

template <class Format, int R>
Multiply find_multiply(int rows) {
    if constexpr (R == 0) {
        return nullptr;
    } else {
        return rows == R ? multiply<Format, R> : find_multiply<Format, R - 1>(rows);
    }
}

// multiply() for each number of rows.
template <class Format>
struct MultiplyTable {
    Multiply of_rows[MAX_ROWS + 1];
    MultiplyTable() {
        for (int r = 0; r <= MAX_ROWS; r++) of_rows[r] = find_multiply<Format, MAX_ROWS>(r);
    }
    static Multiply get(int rows) {
        static const MultiplyTable table;
        return table.of_rows[rows];
    }
};

// Copy the rows of one slot into its blocks: [chunk][row][CHUNK words], so that rows are a constant distance apart.
template <class Format>
void gather(const Kernel& k, const Group& group, const void* const* rows, uint32_t* x_blocks) {
    typedef typename Format::Value Value;
    const Sizes& s = k.sizes;
    constexpr int64_t CHUNK_VALUES = CHUNK * Format::BLOCK_GROUP;
    constexpr bool as_they_are = Format::GROUP == Format::BLOCK_GROUP;
    for (int b = 0; b < group.num_blocks; b++) {
        const Block& block = k.blocks[group.first_block + b];
        for (int r = 0; r < block.rows; r++) {
            const auto* source = static_cast<const Value*>(rows[k.rows[block.first + r]]);
            const float weight = k.on_input ? k.pair_weights[block.first + r] : 1.0f;
            uint32_t* target = x_blocks + b * s.block_D + r * ROW_STRIDE;
            for (int64_t start = 0; start < s.D; start += CHUNK_VALUES, target += MAX_ROWS * ROW_STRIDE) {
                const int64_t length = std::min<int64_t>(CHUNK_VALUES, s.D - start);
                for (int64_t i = length; i % Format::GROUP; i++) target[i / Format::BLOCK_GROUP] = 0;
                if (as_they_are && !k.on_input) {
                    memcpy(target, source + start, length * sizeof(Value));
                    continue;
                }
                int64_t i = 0;
                for (; i + LANES <= length; i += LANES)
                    Format::store_block(target + i / Format::BLOCK_GROUP, Format::load_lanes(source + start + i) * weight);
                if (i == length) continue;
                Value last[LANES] = {};
                memcpy(last, source + start + i, (length - i) * sizeof(Value));
                uint32_t words[LANES];
                Format::store_block(words, Format::load_lanes(last) * weight);
                memcpy(target + i / Format::BLOCK_GROUP, words, divide_up(length - i, Format::BLOCK_GROUP) * 4);
            }
        }
    }
}

// h = act(gate, up) for panels [begin, end) of w13 and all rows of a slot.
template <class Format>
void first_matrix(const Kernel& k, const Group& group, const uint32_t* slot, int64_t begin, int64_t end,
                  const uint32_t* x_blocks, uint32_t* h_blocks) {
    const Sizes& s = k.sizes;
    const float* biases = reinterpret_cast<const float*>(slot + s.w13_words() + s.w2_words());
    VecF sums[MAX_ROWS * 2];
    for (int64_t p = begin; p < end; p++) {
        const uint32_t* panel = slot + p * PANEL * s.words_D;
        const VecF gate_bias = load<VecF>(biases + p * PANEL), up_bias = load<VecF>(biases + p * PANEL + LANES);
        const int64_t word = p * LANES / Format::BLOCK_GROUP, offset = word / CHUNK * MAX_ROWS * ROW_STRIDE + word % CHUNK;
        for (int b = 0; b < group.num_blocks; b++) {
            const int rows = k.blocks[group.first_block + b].rows;
            MultiplyTable<Format>::get(rows)(x_blocks + b * s.block_D, panel, s.words_D, sums,
                                             look_ahead(panel, s.words_D, b, group.num_blocks));
            uint32_t* target = h_blocks + b * s.block_I + offset;
            for (int r = 0; r < rows; r++, target += ROW_STRIDE) {
                VecF h = activate(k.activation, k.alpha, k.limit, sums[2 * r] + gate_bias, sums[2 * r + 1] + up_bias);
                Format::store_block(target, h);
            }
        }
    }
}

// y += weight * (w2 h + b2) for panels [begin, end) of w2 and all rows of a slot.
template <class Format>
void second_matrix(Kernel& k, const Group& group, const uint32_t* slot, int64_t begin, int64_t end,
                   const uint32_t* h_blocks) {
    const Sizes& s = k.sizes;
    const uint32_t* panels = slot + s.w13_words();
    const float* biases = reinterpret_cast<const float*>(panels + s.w2_words()) + s.b13_words();
    const int64_t y_stride = s.panels_D * PANEL;
    VecF sums[MAX_ROWS * 2];
    for (int64_t p = begin; p < end; p++) {
        const uint32_t* panel = panels + p * PANEL * s.words_I;
        const VecF bias[2] = {load<VecF>(biases + p * PANEL), load<VecF>(biases + p * PANEL + LANES)};
        for (int b = 0; b < group.num_blocks; b++) {
            const Block& block = k.blocks[group.first_block + b];
            MultiplyTable<Format>::get(block.rows)(h_blocks + b * s.block_I, panel, s.words_I, sums,
                                                   look_ahead(panel, s.words_I, b, group.num_blocks));
            for (int r = 0; r < block.rows; r++) {
                if (!k.ranks.empty()) {
                    float* target = k.apart.data() + k.ranks[block.first + r] * y_stride + p * PANEL;
                    for (int v = 0; v < 2; v++) store(target + v * LANES, sums[2 * r + v] + bias[v]);
                    continue;
                }
                const float weight = k.on_input ? 1.0f : k.pair_weights[block.first + r];
                float* target = k.y.data() + k.rows[block.first + r] * y_stride + p * PANEL;
                for (int v = 0; v < 2; v++) {
                    float* lanes = target + v * LANES;
                    store(lanes, load<VecF>(lanes) + weight * (sums[2 * r + v] + bias[v]));
                }
            }
        }
    }
}

// Add up what was computed apart, pair by pair in the order that one call would have had: so the bits are the same.
void add_apart(Kernel& k, int64_t begin, int64_t end) {
    const int64_t y_stride = k.sizes.panels_D * PANEL;
    for (size_t n = 0; n < k.apart_rows.size(); n++) {
        const float weight = k.on_input ? 1.0f : k.apart_weights[n];
        const float* from = k.apart.data() + n * y_stride;
        float* target = k.y.data() + k.apart_rows[n] * y_stride;
        for (int64_t d = begin * PANEL; d < end * PANEL; d += LANES)
            store(target + d, load<VecF>(target + d) + weight * load<VecF>(from + d));
    }
}

template <class Format>
void write_rows(const Kernel& k, int64_t begin, int64_t end, void* const* out_rows) {
    typedef typename Format::Value Value;
    const int64_t y_stride = k.sizes.panels_D * PANEL, D = k.sizes.D;
    for (int64_t m = begin; m < end; m++) {
        Value* out = static_cast<Value*>(out_rows[m]);
        const float* y = k.y.data() + m * y_stride;
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) Format::store_lanes(out + d, load<VecF>(y + d));
        if (d < D) {
            Value last[LANES];
            Format::store_lanes(last, load<VecF>(y + d));
            memcpy(out + d, last, (D - d) * sizeof(Value));
        }
    }
}

// Sort the pairs by slot and cut each slot's rows into blocks. False if the pairs are invalid.
bool group_pairs(Kernel& k, int64_t layer, int64_t M, int64_t N, const int32_t* offsets, const int32_t* slots,
                 const float* weights, const int32_t* ranks) {
    if (offsets[0] != 0 || offsets[M] != N) return false;
    for (int64_t m = 0; m < M; m++)
        if (offsets[m] > offsets[m + 1]) return false;
    const uint8_t* loaded = k.loaded + layer * k.num_slots;
    k.starts.assign(k.num_slots + 1, 0);
    for (int64_t n = 0; n < N; n++) {
        if (slots[n] < 0 || slots[n] >= k.num_slots || !loaded[slots[n]]) return false;
        k.starts[slots[n] + 1]++;
    }
    k.blocks.clear();
    k.groups.clear();
    for (int32_t slot = 0; slot < k.num_slots; slot++) {
        const int32_t rows = k.starts[slot + 1];
        k.starts[slot + 1] += k.starts[slot];
        if (rows == 0) continue;
        const int32_t count = divide_up(rows, MAX_ROWS);
        k.groups.push_back({slot, int32_t(k.blocks.size()), count, rows});
        int32_t first = k.starts[slot];
        for (int32_t b = 0; b < count; b++) {
            const int32_t size = rows / count + (b < rows % count);
            k.blocks.push_back({first, size});
            first += size;
        }
    }
    k.rows.resize(N);
    k.pair_weights.resize(N);
    k.ranks.resize(ranks ? N : 0);
    for (int64_t m = 0; m < M; m++)
        for (int32_t n = offsets[m]; n < offsets[m + 1]; n++) {
            const int32_t at = k.starts[slots[n]]++;
            k.rows[at] = m;
            k.pair_weights[at] = weights[n];
            if (!ranks) continue;
            if (ranks[n] < 0 || size_t(ranks[n]) >= k.apart_rows.size()) return false;
            k.ranks[at] = ranks[n];
            k.apart_rows[ranks[n]] = m;
            k.apart_weights[ranks[n]] = weights[n];
        }
    return true;
}

// A call may be one of several for the same rows: y starts with the first, and the last one writes it. Either their pairs
// are of ascending slots and are added up at once; or `ranks` says for each pair which one of `pairs` it is in the order
// of one call, their products are kept apart, and the last one adds them up in that order.
struct Part {
    bool first, last;
    const int32_t* ranks = nullptr;
    int64_t pairs = 0;
};

template <class Format>
void run(Kernel& k, int64_t layer, int64_t M, const void* const* rows, void* const* out, int threads, Part part) {
    const Sizes& s = k.sizes;
    if (part.first) k.y.assign(M * s.panels_D * PANEL, 0.0f);
    if (threads <= 1) {
        int32_t most = 0;
        for (const Group& group : k.groups) most = std::max(most, group.num_blocks);
        k.x_blocks.resize(std::max<size_t>(k.x_blocks.size(), most * s.block_D));
        k.h_blocks.resize(std::max<size_t>(k.h_blocks.size(), most * s.block_I));
        for (const Group& group : k.groups) {
            const uint32_t* slot = words_of(k, layer, group);
            gather<Format>(k, group, rows, k.x_blocks.data());
            first_matrix<Format>(k, group, slot, 0, s.panels_I, k.x_blocks.data(), k.h_blocks.data());
            second_matrix<Format>(k, group, slot, 0, s.panels_D, k.h_blocks.data());
        }
        if (part.last && part.ranks) add_apart(k, 0, s.panels_D);
        if (part.last) write_rows<Format>(k, 0, M, out);
        return;
    }
#if defined(_OPENMP)
    // In the first matrix, threads share the panels of all slots; in the second, each owns a range of y's columns.
    const int64_t num_groups = k.groups.size(), strips = divide_up(s.panels_I, 4);
    k.x_blocks.resize(std::max<size_t>(k.x_blocks.size(), k.blocks.size() * s.block_D));
    k.h_blocks.resize(std::max<size_t>(k.h_blocks.size(), k.blocks.size() * s.block_I));
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t g = 0; g < num_groups; g++)
            gather<Format>(k, k.groups[g], rows, k.x_blocks.data() + k.groups[g].first_block * s.block_D);
#pragma omp for schedule(dynamic)
        for (int64_t job = 0; job < num_groups * strips; job++) {
            const Group& group = k.groups[job / strips];
            const int64_t begin = job % strips * 4;
            first_matrix<Format>(k, group, words_of(k, layer, group), begin,
                                 std::min(begin + 4, s.panels_I), k.x_blocks.data() + group.first_block * s.block_D,
                                 k.h_blocks.data() + group.first_block * s.block_I);
        }
        const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
        for (const Group& group : k.groups)
            second_matrix<Format>(k, group, words_of(k, layer, group), s.panels_D * me / team,
                                  s.panels_D * (me + 1) / team, k.h_blocks.data() + group.first_block * s.block_I);
        if (part.last && part.ranks) add_apart(k, s.panels_D * me / team, s.panels_D * (me + 1) / team);
#pragma omp barrier
        if (part.last) write_rows<Format>(k, M * me / team, M * (me + 1) / team, out);
    }
#endif
}

int32_t forward(Kernel& k, int64_t layer, int64_t M, int64_t N, const void* const* rows, const int32_t* offsets,
                const int32_t* slots, const float* weights, void* const* out, int32_t threads, Part part) try {
    if (layer < 0 || layer >= k.num_layers) return 1;
    const LayerInUse in_use(k.places, layer);
    if (part.first && part.ranks) {
        k.apart_rows.assign(part.pairs, 0);
        k.apart_weights.assign(part.pairs, 0.0f);
        k.apart.assign(part.pairs * k.sizes.panels_D * PANEL, 0.0f);
    }
    if (!group_pairs(k, layer, M, N, offsets, slots, weights, part.ranks)) {
        if (k.places) note_wanted(k, layer, N, slots);
        return 1;
    }
    if (k.places) note_use(k, layer, part.first);
    with_format(k.format, [&](auto format) {
        run<decltype(format)>(k, layer, M, rows, out, expert_mlp_has_threads() ? threads : 1, part);
    });
    return 0;
} catch (const std::bad_alloc&) {
    return 2;
}

Sizes sizes_of(int32_t number, int64_t hidden, int64_t width) {
    return with_format(number, [&](auto format) { return Sizes::of<decltype(format)>(hidden, width); });
}

}  // namespace

extern "C" {

int64_t expert_mlp_slot_bytes(int32_t format, int64_t hidden, int64_t width) {
    return sizes_of(format, hidden, width).slot_bytes();
}

// Lanes of a vector: with the sizes and the number format they decide how an expert is packed.
int32_t expert_mlp_lanes() { return LANES; }

// w13 [2 * width, hidden] and w2 [hidden, width] in the format's own type, biases in float32 or null.
void expert_mlp_pack(int32_t number, int64_t hidden, int64_t width, const void* w13, const float* b13, const void* w2,
             const float* b2, void* slot) {
    const Sizes sizes = sizes_of(number, hidden, width);
    with_format(number, [&](auto format) {
        pack_slot<decltype(format)>(sizes, w13, b13, w2, b2, static_cast<uint32_t*>(slot));
    });
}

// `weights` [layers, slots] of expert_mlp_slot_bytes each and `loaded` [layers, slots] must outlive the kernel. With
// `places`, which must too, `weights` is [places of all layers].
void* expert_mlp_create(int32_t format, int64_t layers, int64_t slots, int64_t hidden, int64_t width, int32_t activation,
                float alpha, float limit, int32_t on_input, const void* weights, const uint8_t* loaded, void* places) {
    const Sizes sizes = sizes_of(format, hidden, width);
    return new (std::nothrow) Kernel{sizes,    layers,   slots,   format,  activation, on_input,
                                     alpha,    limit,    static_cast<const uint32_t*>(weights), sizes.slot_bytes() / 4,
                                     loaded,   static_cast<Places*>(places), {}, {}, {}, {}, {}, {}, {}, {}, {}, {}};
}

// Multiplies a block and a panel in the innermost cache, `repeats` times: the processor's ceiling for this kernel's inner
// loop, for benchmarks. Returns the number of floating-point operations.
double expert_mlp_probe(int32_t number, int64_t repeats) {
    constexpr int64_t words = CHUNK / 4;
    std::vector<uint32_t> block(MAX_ROWS * ROW_STRIDE), panel(2 * words * PANEL);
    VecF sums[MAX_ROWS * 2];
    return with_format(number, [&](auto format) {
        typedef decltype(format) Format;
        const Multiply run = MultiplyTable<Format>::get(MAX_ROWS);
        for (int64_t i = 0; i < repeats; i++) run(block.data(), panel.data(), words, sums, {panel.data(), PANEL});
        return 2.0 * repeats * MAX_ROWS * PANEL * words * Format::GROUP;
    });
}

// Take slots of a kernel with places out of use: they are places of `loaded`. Calls of `Places::layer` may still use them.
void expert_mlp_take_out(uint8_t* loaded, const int64_t* slots, int64_t count) {
    for (int64_t i = 0; i < count; i++) __atomic_store_n(loaded + slots[i], uint8_t(0), __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

// Slots stand in places: calls may use them.
void expert_mlp_put_in(int32_t* place_of_slot, uint8_t* loaded, const int64_t* slots, const int32_t* places, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        __atomic_store_n(place_of_slot + slots[i], places[i], __ATOMIC_SEQ_CST);
        __atomic_store_n(loaded + slots[i], uint8_t(1), __ATOMIC_SEQ_CST);
    }
}

void expert_mlp_destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

// `rows` and `out` are the addresses of M rows, which may stand anywhere (native/shard.h, ForwardRows).
// 0: done. 1: the pairs are invalid, nothing was computed. 2: not enough memory for scratch space.
int32_t expert_mlp_forward_rows(void* kernel, int64_t layer, int64_t M, int64_t N, const void* const* rows,
                                const int32_t* offsets, const int32_t* slots, const float* weights, void* const* out,
                                int32_t threads) {
    return forward(*static_cast<Kernel*>(kernel), layer, M, N, rows, offsets, slots, weights, out, threads, {true, true, nullptr, 0});
}

// The same for rows that stand a constant number of values apart, and for a part of their pairs (`ranks`: see Part).
int32_t expert_mlp_forward(void* kernel, int64_t layer, int64_t M, int64_t N, const void* rows, int64_t row_stride,
                           const int32_t* offsets, const int32_t* slots, const float* weights, void* out,
                           int64_t out_stride, int32_t threads, int32_t first, int32_t last, const int32_t* ranks,
                           int64_t pairs) try {
    Kernel& k = *static_cast<Kernel*>(kernel);
    const int64_t value_bytes = with_format(k.format, [](auto format) { return sizeof(typename decltype(format)::Value); });
    k.row_addresses.resize(M);
    k.out_addresses.resize(M);
    for (int64_t m = 0; m < M; m++) {
        k.row_addresses[m] = static_cast<const char*>(rows) + m * row_stride * value_bytes;
        k.out_addresses[m] = static_cast<char*>(out) + m * out_stride * value_bytes;
    }
    return forward(k, layer, M, N, k.row_addresses.data(), offsets, slots, weights, k.out_addresses.data(), threads,
                   {first != 0, last != 0, ranks, pairs});
} catch (const std::bad_alloc&) {
    return 2;
}
}
