// What the kernels of this folder share. All but the ones in correct.cu have one fault each, named by the kernel: the tests of
// the emulator require that it is found. They are compiled for the emulator alone.
//
// out 256 i32, in 256 i32; grid 1, block 256, unless the test says otherwise.
#pragma once
#include "primitives.cuh"

using namespace tidemill;

#define FAULT(NAME)                                                         \
    extern "C" __global__ void NAME(int *out, const int *in, int n);        \
    KERNEL(NAME);                                                           \
    extern "C" __global__ void NAME(int *out, const int *in, int n)
