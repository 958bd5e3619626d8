// Warp collectives: shuffles, votes, reductions, matches, and matrix products of a warp.
#pragma once

namespace emu {

enum Op : int { SHUFFLE = 1, VOTE, REDUCE, SYNCWARP, MATCH, LDMATRIX, MMA, ELECT, WGMMA };

// Deposits up to 48 bytes and meets all lanes of the mask; warp_read then reads what another lane brought.
void warp_meet(uint32_t mask, int op, const void *value, unsigned bytes, const char *file, int line);
// What `lane` brought to the last meeting; all ones (NaN) when it was not there, which is undefined on a GPU.
void warp_read(unsigned lane, void *out, unsigned bytes);
// The lanes of the last meeting.
uint32_t warp_present();
// mma.sync m16n8k16: d += a * b on the fragments of PTX; kind 0: bf16, 1: f16.
void warp_mma(uint32_t mask, int kind, float *d, const uint32_t *a, const uint32_t *b, const char *file, int line);
// Five xor shuffles over a full warp, in one meeting: the sum, or the maximum.
float warp_butterfly(float value, bool max, const char *file, int line);

// `source` is the lane to read from; negative: the own value.
template <class T>
inline T shuffle(uint32_t mask, T value, int source, const char *file, int line) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    warp_meet(mask, SHUFFLE, &value, sizeof(T), file, line);
    T result = value;
    if (source >= 0) warp_read((unsigned)source, &result, sizeof(T));
    return result;
}

// The first lane of the segment of `width` lanes that this lane is in.
inline int segment(int width) { return (int)cur->lane & ~(width - 1); }

inline uint32_t ballot(uint32_t mask, int predicate, const char *file, int line) {
    const uint32_t value = predicate != 0;
    warp_meet(mask, VOTE, &value, 4, file, line);
    uint32_t result = 0;
    for (uint32_t rest = warp_present(); rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        uint32_t theirs;
        warp_read(lane, &theirs, 4);
        result |= theirs << lane;
    }
    return result;
}

template <class T, class F>
inline T reduce(uint32_t mask, T value, F combine, const char *file, int line) {
    static_assert(std::is_integral_v<T> && sizeof(T) == 4, "__reduce_*_sync takes 32-bit integers");
    warp_meet(mask, REDUCE, &value, sizeof(T), file, line);
    uint32_t rest = warp_present();
    T result{};
    warp_read(__builtin_ctz(rest), &result, sizeof(T));
    for (rest &= rest - 1; rest; rest &= rest - 1) {
        T theirs;
        warp_read(__builtin_ctz(rest), &theirs, sizeof(T));
        result = combine(result, theirs);
    }
    return result;
}

}  // namespace emu

template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, int width = 32, EMU_PLACE) {
    return emu::shuffle(mask, value, emu::segment(width) | (source & (width - 1)), file, line);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int lane_mask, int width = 32, EMU_PLACE) {
    const int source = (int)emu::cur->lane ^ lane_mask;
    return emu::shuffle(mask, value, source < emu::segment(width) + width ? source : -1, file, line);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_PLACE) {
    const int source = (int)(emu::cur->lane + delta);
    return emu::shuffle(mask, value, source < emu::segment(width) + width ? source : -1, file, line);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMU_PLACE) {
    const int source = (int)emu::cur->lane - (int)delta;
    return emu::shuffle(mask, value, source >= emu::segment(width) ? source : -1, file, line);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, EMU_PLACE) {
    return emu::ballot(mask, predicate, file, line);
}
inline int __any_sync(uint32_t mask, int predicate, EMU_PLACE) {
    return emu::ballot(mask, predicate, file, line) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, EMU_PLACE) {
    const uint32_t votes = emu::ballot(mask, predicate, file, line);
    return votes == emu::warp_present();
}

#define EMU_REDUCE(NAME, COMBINED)                                                                     \
    template <class T>                                                                                 \
    inline T NAME(uint32_t mask, T value, EMU_PLACE) {                                                 \
        return emu::reduce(mask, value, [](T a, T b) -> T { return COMBINED; }, file, line);           \
    }
EMU_REDUCE(__reduce_add_sync, a + b)
EMU_REDUCE(__reduce_min_sync, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, a & b)
EMU_REDUCE(__reduce_or_sync, a | b)
EMU_REDUCE(__reduce_xor_sync, a ^ b)

template <class T>
inline uint32_t __match_any_sync(uint32_t mask, T value, EMU_PLACE) {
    emu::warp_meet(mask, emu::MATCH, &value, sizeof(T), file, line);
    uint32_t result = 0;
    for (uint32_t rest = emu::warp_present(); rest; rest &= rest - 1) {
        const int lane = __builtin_ctz(rest);
        T theirs;
        emu::warp_read(lane, &theirs, sizeof(T));
        if (theirs == value) result |= 1u << lane;
    }
    return result;
}
