// Compiled once for each instruction set, with the header of its VECTORS and the NAME of its table.
#include "kernels/cpu/tests/conversions.h"

#include VECTORS
// The vectors come first.
#include "kernels/cpu/pack.h"

namespace tokenmix::cpu::testing {
namespace {

void read(Storage storage, const Strided& from, int64_t offset, int64_t size, float* to) {
  read_row(storage, from, offset, size, 1.0f, to);
}

void write(Storage storage, const float* from, int64_t size, const Strided& to, int64_t offset) {
  write_row(storage, from, size, 1.0f, to, offset);
}

}  // namespace

const Conversions NAME = {read, write};

}  // namespace tokenmix::cpu::testing
