// Weights of 8 and 4 bits, as the matrix products read them: eight neighbours of a row at a time, widened to bf16 on their way into an
// mma, so that a product has the bits of the bf16 product with the widened weights.
//
//   w = code * scale + offset, one fused multiply-add in f32, rounded once to bf16
//
// BITS 8: codes [W, K] int8, or F8E4M3 with FLOAT_CODES. BITS 4: codes [W, K / 2], the even column in the low half of a byte, 0 to 15 with
// OFFSETS, without them -8 to 7 with 8 added, or E2M1 with FLOAT_CODES. K a multiple of 32, codes 16-byte aligned.
// Scales [W, groups] f32; with OFFSETS [W, groups, 2], each scale before its offset; a group has 2^scale_shift columns, 16 at least, or all.
// Scales of E2M1 are those of OCP MX (Rouhani et al. 2023): bytes [W, K / 32 up to a multiple of 4], 2^(byte - 127), 255 no number.
#pragma once
#include "primitives.cuh"

namespace tidemill {

// How the codes of a matrix are to be understood, beside their number of bits.
struct CodeFormat {
    bool float_codes, offsets;
    uint32_t scale_shift;
};

// Eight codes as they lie in memory.
template <int BITS>
struct Codes;
template <>
struct Codes<16> {
    using Type = uint4;
};
template <>
struct Codes<8> {
    using Type = uint2;
};
template <>
struct Codes<4> {
    using Type = uint32_t;
};

TM_DEVICE bool is_mx(int bits, const CodeFormat &f) { return bits == 4 && f.float_codes; }

// Word of a row's scales that has those of the eight weights from column `k` on, and with OFFSETS the one behind it.
template <int BITS>
TM_DEVICE uint32_t scale_word(const CodeFormat &f, uint32_t k) {
    return is_mx(BITS, f) ? k / 128 : (k >> f.scale_shift) << (f.offsets ? 1 : 0);
}

// Byte of 127 + the exponent; its ends are 2^-127, which has no exponent in f32, and no number.
TM_DEVICE float mx_scale(uint32_t word, uint32_t k) {
    const uint32_t byte = word >> (k / 32 % 4 * 8) & 0xff;
    return bits_to_f32(byte == 0 ? 0x00400000u : byte == 255 ? 0x7fc00000u : byte << 23);
}

// An integer below 2^23 in the mantissa of 2^23.
TM_DEVICE float magic(uint32_t integer) { return bits_to_f32(integer | 0x4b000000u); }

TM_DEVICE void codes_to_f32(const CodeFormat &f, uint2 codes, float (&v)[8]) {
    const uint32_t words[2] = {codes.x, codes.y};
    if (f.float_codes) {
        f8_to_f32(codes, v);
        return;
    }
    TM_UNROLL
    for (int i = 0; i < 8; i++) v[i] = magic((words[i / 4] ^ 0x80808080u) >> (i % 4 * 8) & 0xff) - (8388608.0f + 128.0f);
}
TM_DEVICE void codes_to_f32(const CodeFormat &f, uint32_t codes, float (&v)[8]) {
    const float zero = 8388608.0f + (f.offsets ? 0.0f : 8.0f);
    TM_UNROLL
    for (int i = 0; i < 8; i++) {
        const uint32_t code = codes >> (4 * i) & 15;
        // Exponent and mantissa of an E2M1 in the place of an f32's, whose bias is greater by 126: also right for 0.5.
        v[i] = f.float_codes ? bits_to_f32((code & 7) << 22 | (code & 8) << 28) * bits_to_f32((127u + 126u) << 23)
                             : magic(code) - zero;
    }
}

TM_DEVICE uint4 widen(const CodeFormat &, uint4 weights, uint2, uint32_t) { return weights; }
// Eight weights from column `k` on.
template <class Type>
TM_DEVICE uint4 widen(const CodeFormat &f, Type codes, uint2 scales, uint32_t k) {
    float v[8];
    codes_to_f32(f, codes, v);
    // Eight codes have as many bytes as a code has bits.
    const float scale = is_mx(sizeof(Type), f) ? mx_scale(scales.x, k) : bits_to_f32(scales.x);
    const float offset = f.offsets ? bits_to_f32(scales.y) : 0.0f;
    TM_UNROLL
    for (int i = 0; i < 8; i++) v[i] = __fmaf_rn(v[i], scale, offset);
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// Weights that are read once. Where a row's part of a block is less than a sector of 32 bytes, L1 keeps the rest for the next block.
TM_DEVICE uint4 load_codes(const uint4 *p) { return load_streaming16(p); }
TM_DEVICE uint2 load_codes(const uint2 *p) { return load_streaming8(p); }
TM_DEVICE uint32_t load_codes(const uint32_t *p) { return __ldg(p); }

TM_DEVICE uint2 load_scales(const CodeFormat &f, const uint32_t *p) {
    return f.offsets ? __ldg((const uint2 *)p) : make_uint2(__ldg(p), 0);
}

}  // namespace tidemill
