// KERNEL(name); after a kernel makes it known to the launcher by its name, in the call shape of cuLaunchKernel.
#pragma once

namespace emu {

struct Kernel {
    const char *name;
    // Calls the kernel with one pointer per argument.
    void (*entry)(void **arguments);
    unsigned num_parameters;
    const unsigned *parameter_sizes;
    Kernel *next;
};
void register_kernel(Kernel *kernel);

template <auto Function>
struct Entry;
template <class... A, void (*Function)(A...)>
struct Entry<Function> {
    template <size_t... I>
    static void call([[maybe_unused]] void **arguments, std::index_sequence<I...>) {
        Function(*(std::remove_cv_t<std::remove_reference_t<A>> *)arguments[I]...);
    }
    static void entry(void **arguments) { call(arguments, std::index_sequence_for<A...>{}); }
    static constexpr unsigned num_parameters = sizeof...(A);
    // One more element, since a kernel may have no parameters.
    static constexpr unsigned sizes[] = {(unsigned)sizeof(A)..., 0};
};

struct Registrar {
    Kernel kernel;
    Registrar(const char *name, void (*entry)(void **), unsigned num_parameters, const unsigned *sizes)
        : kernel{name, entry, num_parameters, sizes, nullptr} {
        register_kernel(&kernel);
    }
};

}  // namespace emu

#define KERNEL(NAME)                                                                                  \
    static emu::Registrar emu_registrar_##NAME(#NAME, &emu::Entry<&NAME>::entry,                      \
                                               emu::Entry<&NAME>::num_parameters, emu::Entry<&NAME>::sizes)
