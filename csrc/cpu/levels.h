// Instruction levels: every CPU kernel is compiled from one source, once for each level that is built, and the running
// processor chooses among those. setup.py builds the baseline and the level of the processor that it runs on, unless
// ANNNET_CPU_LEVELS asks for others.
//
// An operator `op` consists of
//   cpu/op.h           plain structs of pointers, sizes and strides (the arguments), and `struct OpKernels`, a table of
//                      function pointers indexed by Dtype. No ATen, no standard library beyond C headers.
//   cpu/op_kernels.h   the kernels as templates, inside `namespace annnet::ANNNET_LEVEL`, on the types of vector.h, and
//                      `constexpr OpKernels op_kernels = {...}`. Only C headers: a function of the standard library or
//                      of ATen that is compiled here would contain AVX-512 code, and the linker might keep that copy
//                      of it for every caller on every processor.
//   cpu/op.cpp         the host: TORCH_LIBRARY_IMPL(annnet_native, CPU, m), checks (checks.h), and at::parallel_for
//                      around kernels().op. Compiled for the baseline.
// To add one: write the three files, add a member to `struct Kernels` (kernels.h), the include and the initialiser to
// kernels_of_level.h, and the schema to library.cpp. setup.py finds the sources by itself.
#pragma once

#include "kernels.h"
#include "processor.h"

namespace annnet {

constexpr int kLevels = 4;

const char* level_name(Level level);
bool level_from_name(const char* name, Level* level);

bool is_built(Level level);

// The highest level up to `limit` that is built and that the running processor has.
Level best_level(Level limit);

// The level in use: the best one, unless choose_level lowered it (once, when the library is loaded).
Level chosen_level();
void choose_level(Level limit);

// The kernels of the level in use.
const Kernels& kernels();

}  // namespace annnet
