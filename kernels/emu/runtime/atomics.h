// Atomics. They are real ones: blocks run in parallel. Relaxed, as on a GPU; each is a point of preemption.
#pragma once

namespace emu {

// Replaces the value at `address` by `update` of it, and returns the old one.
template <class T, class F>
inline T atomic_update(T *address, F update) {
    maybe_yield();
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    static_assert(sizeof(T) == sizeof(Bits), "atomics take 4 or 8 bytes");
    Bits old_bits = __atomic_load_n((Bits *)address, __ATOMIC_RELAXED), new_bits;
    T old_value, new_value;
    do {
        memcpy(&old_value, &old_bits, sizeof(T));
        new_value = update(old_value);
        memcpy(&new_bits, &new_value, sizeof(T));
    } while (!__atomic_compare_exchange_n((Bits *)address, &old_bits, new_bits, false, __ATOMIC_RELAXED,
                                          __ATOMIC_RELAXED));
    return old_value;
}

}  // namespace emu

#define EMU_ATOMIC(NAME, RESULT)                                                 \
    template <class T>                                                           \
    inline T NAME(T *address, std::common_type_t<T> value) {                     \
        return emu::atomic_update(address, [=](T old) -> T { return RESULT; });  \
    }
EMU_ATOMIC(atomicAdd, T(old + value))
EMU_ATOMIC(atomicSub, T(old - value))
EMU_ATOMIC(atomicMax, old > value ? old : value)
EMU_ATOMIC(atomicMin, old < value ? old : value)
EMU_ATOMIC(atomicOr, T(old | value))
EMU_ATOMIC(atomicAnd, T(old &value))
EMU_ATOMIC(atomicExch, ((void)old, value))

// Wraps around to 0 beyond `limit`.
inline unsigned atomicInc(unsigned *address, unsigned limit) {
    return emu::atomic_update(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
template <class T>
inline T atomicCAS(T *address, std::common_type_t<T> expected, std::common_type_t<T> value) {
    return emu::atomic_update(address, [=](T old) { return old == expected ? T(value) : old; });
}
