// primitives.cuh for the CPU: runs the unchanged kernel sources and checks every access.
//
// Every CUDA thread is a fiber. The next fiber to run is drawn at random. A collective operation (a
// barrier, an exchange between lanes, a tensor-core product) blocks a fiber until all participants
// have arrived. The first of these faults ends the launch with a message:
//   - a misaligned access to global memory, or one outside the tensors of the launch; a write to an
//     input, a read of an output, an element written twice or never, a read of an element that was
//     already updated in place
//   - a misaligned access to shared memory, or one outside what the kernel declared; a read of
//     uninitialised shared memory
//   - a race: two threads access the same word of shared memory without a barrier between them, at
//     least one of them writing. Its detection does not depend on the order of the fibers.
//   - lanes of a warp in different collectives; a deadlock
// It also counts bank conflicts of ldmatrix. It cannot show speed, nor the rounding inside a real
// tensor core, which adds in another order.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

typedef uint32_t u32;
typedef unsigned long long u64;
typedef uint16_t f16;
struct alignas(16) uint4 {
  u32 x, y, z, w;
};

namespace emulator {

// ---- fibers ------------------------------------------------------------------------------------

constexpr size_t STACK_BYTES = 1 << 16;
enum Collective { NONE, WARP_BARRIER, SHUFFLE, MATRICES, MATRICES_TRANSPOSED, PRODUCT };
const char* const COLLECTIVE_NAMES[] = {"none",         "warp_barrier", "a shuffle", "load_matrices",
                                        "load_matrices_transposed", "multiply_accumulate"};

struct Slot {  // a lane's input to a collective, and its result
  u32 words[4];
  float floats[4];
  const unsigned char* address;
  int lane;
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
  bool started, done;
};

struct Warp {
  Collective kind;
  int arrived;
  u32 epoch;  // warp barriers passed
  Slot slots[32];
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<int> ready;
static int current, threads, at_block_barrier, finished, block_x, block_y;
static u32 block_epoch;  // block barriers passed
static std::mt19937 order;
static jmp_buf scheduler;
static std::string message, kernel_name;
static std::function<void()> body;
static u64 bank_conflicts;

// Ends the launch with a message.
[[noreturn]] static void fail(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  message = kernel_name + ", block (" + std::to_string(block_x) + ", " + std::to_string(block_y) +
            "), thread " + std::to_string(current) + ": " + text;
  _longjmp(scheduler, 1);
}

static void run_body() {
  body();
  fibers[current].done = true;
  finished++;
  _longjmp(scheduler, 2);
}

// Runs other fibers until this one is drawn again.
__attribute__((noinline)) static void wait() {
  if (_setjmp(fibers[current].resume) == 0) _longjmp(scheduler, 2);
}

static void run_block() {
  ready.resize(threads);
  for (int i = 0; i < threads; i++) {
    ready[i] = i;
    fibers[i].started = fibers[i].done = false;
  }
  for (Warp& warp : warps) warp = Warp{};
  at_block_barrier = finished = 0;
  block_epoch = 0;
  if (_setjmp(scheduler) == 1) return;
  if (finished == threads) return;
  if (ready.empty()) {
    int in_collective = 0;
    for (const Warp& warp : warps) in_collective += warp.arrived;
    fail("deadlock: %d threads finished, %d wait at block_barrier, %d in a collective of their warp",
         finished, at_block_barrier, in_collective);
  }
  const size_t drawn = order() % ready.size();
  current = ready[drawn];
  ready[drawn] = ready.back();
  ready.pop_back();
  Fiber& fiber = fibers[current];
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Waits until the warp's 32 lanes are in the same collective; the last lane performs it for all.
template <class Perform>
static Slot& collective(Collective kind, const Slot& mine, Perform perform) {
  Warp& warp = warps[current / 32];
  const int lane = current % 32;
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) {
    fail("lanes of a warp diverge: this one is in %s, others in %s", COLLECTIVE_NAMES[kind],
         COLLECTIVE_NAMES[warp.kind]);
  }
  warp.slots[lane] = mine;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    perform(warp);
    for (int other = current / 32 * 32; other < current / 32 * 32 + 32; other++) {
      if (other != current) ready.push_back(other);
    }
  } else {
    wait();
  }
  return warps[current / 32].slots[current % 32];
}

// ---- global memory -----------------------------------------------------------------------------

struct View {  // a tensor: `rows` rows of `row_bytes`, `stride` bytes apart
  std::string name;
  uintptr_t base;
  int64_t rows, row_bytes, stride;
  enum Role { INPUT, OUTPUT, UPDATED } role;  // UPDATED: read until written, in place
  std::vector<bool> written;
};

static std::vector<View> views;

// The view that holds these bytes, and their offset in it.
static std::pair<View*, int64_t> locate(const void* pointer, size_t bytes, const char* what) {
  const uintptr_t address = (uintptr_t)pointer;
  if (address % std::min<size_t>(bytes, 16)) fail("%s of %zu bytes at a misaligned global address", what, bytes);
  for (View& view : views) {
    if (address < view.base) continue;
    const int64_t row = (address - view.base) / view.stride;
    const int64_t byte = (address - view.base) % view.stride;
    if (row < view.rows && byte + (int64_t)bytes <= view.row_bytes) {
      return {&view, row * view.row_bytes + byte};
    }
  }
  std::string nearest = "none";
  int64_t distance = 0;
  for (const View& view : views) {
    const int64_t d = (int64_t)(address - view.base);
    if (nearest == "none" || std::abs(d) < std::abs(distance)) nearest = view.name, distance = d;
  }
  fail("%s of %zu bytes outside every tensor of the launch; nearest is %s, %lld bytes from its start",
       what, bytes, nearest.c_str(), (long long)distance);
}

static void check_load(const void* pointer, size_t bytes) {
  const auto [view, byte] = locate(pointer, bytes, "read");
  if (view->role == View::OUTPUT) fail("read of %s, an output", view->name.c_str());
  for (size_t i = 0; view->role == View::UPDATED && i < bytes; i++) {
    if (view->written[byte + i]) fail("read of %s after it was updated", view->name.c_str());
  }
}

static void check_store(const void* pointer, size_t bytes) {
  const auto [view, byte] = locate(pointer, bytes, "write");
  if (view->role == View::INPUT) fail("write to %s, an input", view->name.c_str());
  for (size_t i = 0; i < bytes; i++) {
    if (view->written[byte + i]) {
      fail("byte %lld of %s is written a second time", (long long)(byte + i), view->name.c_str());
    }
    view->written[byte + i] = true;
  }
}

static void check_everything_written() {
  for (const View& view : views) {
    int64_t missing = 0, first = -1;
    for (size_t i = 0; i < view.written.size(); i++) {
      if (!view.written[i] && missing++ == 0) first = i;
    }
    if (missing) {
      message = kernel_name + ": " + std::to_string(missing) + " bytes of " + view.name +
                " never written, the first at " + std::to_string(first);
      return;
    }
  }
}

// ---- shared memory -----------------------------------------------------------------------------

struct Access {
  int thread;  // -1: none
  u32 block_epoch, warp_epoch;
};

struct Word {  // the last accesses to four bytes of shared memory
  Access writer;
  std::vector<Access> readers;
};

alignas(128) static unsigned char memory[1 << 16];
static std::vector<Word> words;

static unsigned char* shared_memory(size_t bytes) {
  const size_t count = (bytes + 3) / 4;
  if (words.size() != count) words.assign(count, Word{{-1, 0, 0}, {}});
  return memory;
}

static void new_shared_memory() {
  memset(memory, 0xff, sizeof memory);  // as halves and floats: NaN
  words.clear();
}

static bool unordered(const Access& before, int thread) {
  if (before.thread < 0 || before.thread == thread || before.block_epoch != block_epoch) return false;
  return before.thread / 32 != thread / 32 || before.warp_epoch == warps[thread / 32].epoch;
}

static void touch_shared(const unsigned char* pointer, size_t bytes, bool write, int thread) {
  const ptrdiff_t offset = pointer - memory;
  const char* what = write ? "write" : "read";
  if (offset < 0 || offset + bytes > 4 * words.size()) {
    fail("%s of %zu bytes at offset %td of %zu bytes of shared memory", what, bytes, offset,
         4 * words.size());
  }
  if (offset % bytes) fail("%s of %zu bytes at misaligned offset %td of shared memory", what, bytes,
                           offset);
  const Access now{thread, block_epoch, warps[thread / 32].epoch};
  for (size_t i = offset / 4; i < (offset + bytes) / 4; i++) {
    Word& word = words[i];
    if (!write && word.writer.thread < 0) fail("read of shared memory that nobody wrote, offset %zu",
                                               4 * i);
    if (unordered(word.writer, thread)) {
      fail("race: %s of shared memory at offset %zu, written by thread %d since the last barrier",
           what, 4 * i, word.writer.thread);
    }
    if (write) {
      for (const Access& reader : word.readers) {
        if (unordered(reader, thread)) {
          fail("race: write of shared memory at offset %zu, read by thread %d since the last barrier",
               4 * i, reader.thread);
        }
      }
      word.writer = now;
      word.readers.clear();
    } else {
      bool known = false;  // this thread has read the word in this epoch
      for (const Access& reader : word.readers) {
        known |= reader.thread == thread && reader.block_epoch == now.block_epoch &&
                 reader.warp_epoch == now.warp_epoch;
      }
      if (!known) word.readers.push_back(now);
    }
  }
}

// ---- halves ------------------------------------------------------------------------------------

static float half_to_float(f16 bits) {
  static const std::vector<float> table = [] {
    std::vector<float> values(1 << 16);
    for (u32 i = 0; i < values.size(); i++) {
      const u32 exponent = i >> 10 & 31, fraction = i & 1023;
      float value = exponent == 31 ? (fraction ? NAN : INFINITY)
                    : exponent ? std::ldexp(1024.f + fraction, (int)exponent - 25)
                               : std::ldexp((float)fraction, -24);
      values[i] = i >> 15 ? -value : value;
    }
    return values;
  }();
  return table[bits];
}

// In software: g++ knows _Float16 from version 13 on.
static f16 float_to_half(float value) {
  u32 bits;
  memcpy(&bits, &value, sizeof bits);
  const u32 sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x47800000) return sign | 0x7c00;  // 2^16 and above
  if (magnitude < 0x38800000) {                       // below 2^-14, where halves are 2^-24 apart
    return sign | (u32)std::nearbyint(std::ldexp(std::fabs(value), 24));
  }
  // Another bias of the exponent, and 13 bits less: to nearest, ties to even.
  return sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
}

static float half_of(u32 word, int which) { return half_to_float((f16)(word >> (16 * which))); }

// ---- launching ---------------------------------------------------------------------------------

struct Kernel {
  int threads;
  int parameters;
  std::function<std::function<void()>(void**)> bind;  // returns the body with its parameters bound
};

static std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> table;
  return table;
}

template <class... P>
struct Register {
  Register(const char* name, int threads, void (*function)(P...)) {
    kernels()[name] = {threads, (int)sizeof...(P), [function](void** parameters) {
                         return bind(function, parameters, std::index_sequence_for<P...>());
                       }};
  }

  // Reads the parameters as the driver does: each entry points to a value of the kernel's type.
  template <size_t... I>
  static std::function<void()> bind(void (*function)(P...), void** parameters,
                                    std::index_sequence<I...>) {
    std::tuple<P...> values{*static_cast<P*>(parameters[I])...};
    return [=] { std::apply(function, values); };
  }
};

template <class... P>
Register(const char*, int, void (*)(P...)) -> Register<P...>;

template <class Exchange>
static float shuffle(float value, Exchange partner) {
  Slot mine{};
  mine.floats[0] = value;
  return collective(SHUFFLE, mine, [&](Warp& warp) {
           for (int lane = 0; lane < 32; lane++) {
             warp.slots[lane].floats[1] = warp.slots[partner(lane)].floats[0];
           }
         }).floats[1];
}

static void matrices(u32 (&m)[4], const unsigned char* row, bool transposed) {
  Slot mine{};
  mine.address = row;
  const Slot& taken = collective(transposed ? MATRICES_TRANSPOSED : MATRICES, mine, [&](Warp& warp) {
    const int first = current / 32 * 32;
    for (int lane = 0; lane < 32; lane++) {
      touch_shared(warp.slots[lane].address, 16, false, first + lane);
    }
    for (int i = 0; i < 4; i++) {
      u32 banks = 0;
      for (int r = 0; r < 8; r++) {
        const u32 bank = 1u << ((warp.slots[8 * i + r].address - memory) / 16 % 8);
        bank_conflicts += (banks & bank) != 0;
        banks |= bank;
      }
      for (int lane = 0; lane < 32; lane++) {
        const int major = lane / 4, minor = 2 * (lane % 4);
        f16 pair[2];
        for (int e = 0; e < 2; e++) {
          const int r = transposed ? minor + e : major, c = transposed ? major : minor + e;
          memcpy(&pair[e], warp.slots[8 * i + r].address + 2 * c, 2);
        }
        warp.slots[lane].words[i] = pair[0] | (u32)pair[1] << 16;
      }
    }
  });
  memcpy(m, taken.words, sizeof m);
}

}  // namespace emulator

// ---- the functions of primitives.cuh -----------------------------------------------------------

#define DEVICE inline
#define UNROLL
#define ROLLED
#define KERNEL(name, threads, min_blocks, parameters, ...) \
  static void name parameters { __VA_ARGS__; }             \
  static const emulator::Register register_##name(#name, threads, name);
#define SHARED_MEMORY(name, bytes) unsigned char* name = emulator::shared_memory(bytes)

DEVICE int thread_index() { return emulator::current; }
DEVICE int block_index_x() { return emulator::block_x; }
DEVICE int block_index_y() { return emulator::block_y; }

template <class T>
DEVICE T load_global(const T* address) {
  emulator::check_load(address, sizeof(T));
  return *address;
}

DEVICE uint4 load_global_16(const f16* address) {
  emulator::check_load(address, 16);
  return *(const uint4*)address;
}

template <class T>
DEVICE void store_global(T* address, T value) {
  emulator::check_store(address, sizeof(T));
  *address = value;
}

DEVICE void store_global_16(f16* address, uint4 value) {
  emulator::check_store(address, 16);
  *(uint4*)address = value;
}

template <class T>
DEVICE T load_shared(const unsigned char* address) {
  emulator::touch_shared(address, sizeof(T), false, emulator::current);
  return *(const T*)address;
}

template <class T>
DEVICE void store_shared(unsigned char* address, T value) {
  emulator::touch_shared(address, sizeof(T), true, emulator::current);
  *(T*)address = value;
}

DEVICE void block_barrier() {
  if (++emulator::at_block_barrier == emulator::threads) {
    emulator::at_block_barrier = 0;
    emulator::block_epoch++;
    for (int i = 0; i < emulator::threads; i++) {
      if (i != emulator::current) emulator::ready.push_back(i);
    }
  } else {
    emulator::wait();
  }
}

DEVICE void warp_barrier() {
  emulator::collective(emulator::WARP_BARRIER, {}, [](emulator::Warp& warp) { warp.epoch++; });
}

DEVICE float quad_sum(float x) {
  x += emulator::shuffle(x, [](int lane) { return lane ^ 1; });
  return x + emulator::shuffle(x, [](int lane) { return lane ^ 2; });
}

DEVICE float quad_max(float x) {
  x = fmaxf(x, emulator::shuffle(x, [](int lane) { return lane ^ 1; }));
  return fmaxf(x, emulator::shuffle(x, [](int lane) { return lane ^ 2; }));
}

DEVICE float warp_sum(float x) {
  for (int distance = 16; distance > 0; distance /= 2) {
    x += emulator::shuffle(x, [=](int lane) { return lane ^ distance; });
  }
  return x;
}

DEVICE void load_matrices(u32 (&m)[4], const unsigned char* row) {
  emulator::matrices(m, row, false);
}

DEVICE void load_matrices_transposed(u32 (&m)[4], const unsigned char* row) {
  emulator::matrices(m, row, true);
}

DEVICE void multiply_accumulate(float (&c)[4], u32 a_low, u32 a_high, u32 b) {
  emulator::Slot mine{};
  mine.words[0] = a_low;
  mine.words[1] = a_high;
  mine.words[2] = b;
  memcpy(mine.floats, c, sizeof c);
  const emulator::Slot& taken = emulator::collective(emulator::PRODUCT, mine, [](emulator::Warp& warp) {
    float a[16][8], b_T[8][8];  // b_T[column][row]
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      const emulator::Slot& slot = warp.slots[lane];
      for (int e = 0; e < 2; e++) {
        a[g][2 * t + e] = emulator::half_of(slot.words[0], e);
        a[g + 8][2 * t + e] = emulator::half_of(slot.words[1], e);
        b_T[g][2 * t + e] = emulator::half_of(slot.words[2], e);
      }
    }
    for (int lane = 0; lane < 32; lane++) {
      for (int e = 0; e < 4; e++) {
        const int row = lane / 4 + e / 2 * 8, column = 2 * (lane % 4) + e % 2;
        float sum = warp.slots[lane].floats[e];
        for (int i = 0; i < 8; i++) sum += a[row][i] * b_T[column][i];
        warp.slots[lane].floats[e] = sum;
      }
    }
  });
  memcpy(c, taken.floats, sizeof c);
}

DEVICE u32 pack_halves(float low, float high) {
  return emulator::float_to_half(low) | (u32)emulator::float_to_half(high) << 16;
}

DEVICE void unpack_halves(u32 packed, float& low, float& high) {
  low = emulator::half_of(packed, 0);
  high = emulator::half_of(packed, 1);
}

// The special-function unit flushes subnormal results to zero.
DEVICE float exp2_fast(float x) { return x < -126.f ? 0.f : exp2f(x); }
DEVICE float log2_fast(float x) { return log2f(x); }
DEVICE float square_root(float x) { return std::sqrt(x); }
DEVICE float infinity() { return INFINITY; }

// ---- the functions that Python calls -----------------------------------------------------------

extern "C" {

void emulator_clear_views() { emulator::views.clear(); }

void emulator_add_view(const char* name, void* base, int64_t rows, int64_t row_bytes, int64_t stride,
                       int role) {
  emulator::views.push_back(
      {name, (uintptr_t)base, rows, row_bytes, stride, (emulator::View::Role)role, {}});
  if (role) emulator::views.back().written.assign(rows * row_bytes, false);
}

void emulator_halves(const float* values, f16* halves, int count) {
  for (int i = 0; i < count; i++) halves[i] = emulator::float_to_half(values[i]);
}

uint64_t emulator_bank_conflicts() { return emulator::bank_conflicts; }

// `parameters` is an array of pointers to the values, as for cuLaunchKernel.
// Returns the message of the first fault, or an empty string.
const char* emulator_launch(const char* name, int grid_x, int grid_y, int threads, void** parameters,
                            int count, u32 seed) {
  using namespace emulator;
  message.clear();
  kernel_name = name;
  bank_conflicts = 0;
  const auto found = kernels().find(name);
  if (found == kernels().end()) return "no such kernel";
  if (found->second.threads != threads) return "launched with another number of threads than declared";
  if (count >= 0 && found->second.parameters != count) return "launched with another number of parameters";
  body = found->second.bind(parameters);
  emulator::threads = threads;
  order.seed(seed);
  fibers.resize(threads);
  warps.resize(threads / 32);
  for (block_y = 0; block_y < grid_y && message.empty(); block_y++) {
    for (block_x = 0; block_x < grid_x && message.empty(); block_x++) {
      for (Fiber& fiber : fibers) {
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_body, 0);
      }
      new_shared_memory();
      run_block();
    }
  }
  if (message.empty()) check_everything_written();
  return message.c_str();
}
}
