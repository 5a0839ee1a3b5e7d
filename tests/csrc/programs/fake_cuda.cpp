// A CUDA driver that is none: the library's GPU path runs against it where there is no GPU.
//
// Device memory is host memory behind addresses that no host code can follow, filled with NaN until written.
// What is queued on a stream runs only when something waits for that stream, as on a GPU at its slowest, so
// that work queued on the wrong stream comes out wrong. A launch of merge_kernel is carried out from its
// argument bytes; the dtypes are in the file name of its module. Every call is written to a log. What a real
// driver would refuse, or what would crash it, counts as misuse.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "simd/convert.h"

#define FAKE extern "C" __attribute__((visibility("default")))

namespace {

using paretofuse::DType;
using Address = std::uint64_t;

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NO_FILE = 301, NOT_FOUND = 500 };

constexpr Address kMark = Address{1} << 62;  // makes a host address one that faults

struct Module {
  std::string file;
};

struct Fake {
  std::mutex mutex;
  int architecture = 90;
  int fail_at = 0, calls = 0, misuses = 0;
  void* capturing = nullptr;
  int retained = 0;
  std::vector<void*> contexts;  // the current thread's stack, pushed by us
  std::map<Address, std::size_t> memory;
  std::set<Module*> modules;
  std::map<void*, std::vector<std::function<void()>>> queues;
  std::string log, failed;
};

Fake& fake() {
  static Fake instance;
  return instance;
}

int context_of_device;  // its address is the handle

int misuse(const std::string& what, int code) {
  ++fake().misuses;
  fake().log += "MISUSE " + what + "\n";
  return code;
}

// Every call begins here: the log, and the failure that the test asked for.
int enter(const std::string& name, const std::string& arguments = "", bool in_context = true) {
  Fake& f = fake();
  ++f.calls;
  f.log += name + (arguments.empty() ? "" : " " + arguments) + "\n";
  if (in_context && f.contexts.empty()) return misuse(name + " without a current context", INVALID_CONTEXT);
  if (f.calls != f.fail_at) return OK;
  f.failed = name;
  return OUT_OF_MEMORY;
}

template <class T>
std::string text(T value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

std::string hex(const void* data, std::size_t size) {
  std::string out;
  char two[3];
  for (std::size_t i = 0; i < size; ++i) {
    std::snprintf(two, sizeof two, "%02x", static_cast<const unsigned char*>(data)[i]);
    out += two;
  }
  return out;
}

// The host address of a range that lies in one allocation; null, and a misuse, for any other.
std::byte* host(Address address, std::size_t size, const char* what) {
  Fake& f = fake();
  auto after = f.memory.upper_bound(address);
  if (after != f.memory.begin()) {
    const auto& [start, length] = *--after;
    if (address >= start && address - start <= length && size <= length - (address - start)) {
      return reinterpret_cast<std::byte*>(address ^ kMark);
    }
  }
  misuse(std::string(what) + ": " + text(size) + " bytes outside of any allocation", 0);
  return nullptr;
}

void run(void* stream) {
  std::vector<std::function<void()>> queue;
  queue.swap(fake().queues[stream]);
  for (const auto& work : queue) work();
}

void run_all() {
  for (auto& [stream, queue] : fake().queues) run(stream);
}

// The default stream waits for all others, and they for it.
void submit(void* stream, std::function<void()> work) {
  if (stream == nullptr) {
    run_all();
    work();
  } else {
    fake().queues[stream].push_back(std::move(work));
  }
}

float load(DType dtype, const std::byte* from) {
  return dtype == DType::F32    ? paretofuse::load_one<DType::F32>(from)
         : dtype == DType::BF16 ? paretofuse::load_one<DType::BF16>(from)
                                : paretofuse::load_one<DType::F16>(from);
}

void store(DType dtype, std::byte* to, float value) {
  if (dtype == DType::F32) paretofuse::store_one<DType::F32>(to, value);
  if (dtype == DType::BF16) paretofuse::store_one<DType::BF16>(to, value);
  if (dtype == DType::F16) paretofuse::store_one<DType::F16>(to, value);
}

// The kernel's arguments, as its manifest lists them.
struct Merge {
  Address base, deltas, tile_group, weights, scales, places, out;
  std::int64_t n;
  std::int32_t experts, groups, preferences;
  std::int64_t delta_stride, out_stride;
  Address global_scratch, profile_scratch;

  explicit Merge(void** arguments) {
    std::size_t next = 0;
    const auto take = [&](auto& field) { std::memcpy(&field, arguments[next++], sizeof field); };
    for (Address* field : {&base, &deltas, &tile_group, &weights, &scales, &places, &out}) take(*field);
    take(n);
    for (std::int32_t* field : {&experts, &groups, &preferences}) take(*field);
    take(delta_stride);
    take(out_stride);
    take(global_scratch);
    take(profile_scratch);
  }

  std::string bytes() const {
    std::string all;
    for (const Address field : {base, deltas, tile_group, weights, scales, places, out})
      all += hex(&field, 8) + " ";
    all += hex(&n, 8) + " ";
    for (const std::int32_t field : {experts, groups, preferences}) all += hex(&field, 4) + " ";
    for (const std::int64_t field : {delta_stride, out_stride}) all += hex(&field, 8) + " ";
    return all + hex(&global_scratch, 8) + " " + hex(&profile_scratch, 8);
  }

  void carry_out(const std::string& file, unsigned grid) const {
    DType types[3];
    const std::string name = file.substr(file.rfind('/') + 1, file.rfind('.') - file.rfind('/') - 1);
    std::istringstream parts(name);
    std::vector<std::string> words;
    for (std::string word; std::getline(parts, word, '_');) words.push_back(word);
    for (int i = 0; i < 3; ++i) {
      const std::string& word = words[words.size() - 3 + static_cast<std::size_t>(i)];
      types[i] = word == "fp32" ? DType::F32 : word == "bf16" ? DType::BF16 : DType::F16;
    }
    const auto size = [&](int i) { return static_cast<std::size_t>(paretofuse::item_size(types[i])); };
    const auto length = static_cast<std::size_t>(n), tiles = length / 1024;
    const auto rows = static_cast<std::size_t>(groups), all = static_cast<std::size_t>(experts);
    const auto stride = static_cast<std::size_t>(delta_stride);
    if (length == 0 || grid == 0 || length % grid != 0 || 1024 % (length / grid) != 0 || preferences != 1) {
      misuse("a launch that does not cover the buffer by blocks", 0);
      return;
    }
    for (const Address address : {base, deltas, tile_group, weights, scales, places, out}) {
      if (address % 16 != 0) misuse("an argument that is no multiple of 16", 0);
    }
    const std::byte* from = host(base, length * size(0), "base");
    const std::byte* delta = host(deltas, ((all - 1) * stride + length) * size(1), "deltas");
    const std::byte* group = host(tile_group, tiles * 4, "tile_group");
    const std::byte* table = host(weights, rows * all * 4, "weights");
    std::byte* to = host(out, length * size(2), "out");
    if (!from || !delta || !group || !table || !to) return;
    for (std::size_t t = 0; t < length; ++t) {
      std::int32_t row;
      std::memcpy(&row, group + t / 1024 * 4, 4);
      if (row < 0 || row >= groups) return void(misuse("a tile of no group", 0));
      float merged = load(types[0], from + t * size(0));
      for (std::size_t e = 0; e < all; ++e) {
        const float weight = load(DType::F32, table + (static_cast<std::size_t>(row) * all + e) * 4);
        const float product = weight * load(types[1], delta + (e * stride + t) * size(1));
        merged += product;
      }
      store(types[2], to + t * size(2), merged);
    }
  }
};

}  // namespace

FAKE void fake_reset(int fail_at) {
  Fake& f = fake();
  for (const auto& [address, size] : f.memory) std::free(reinterpret_cast<void*>(address ^ kMark));
  for (Module* module : f.modules) delete module;
  f.memory.clear();
  f.modules.clear();
  f.contexts.clear();
  f.queues.clear();
  f.log.clear();
  f.failed.clear();
  f.architecture = 90;
  f.fail_at = fail_at;
  f.calls = f.misuses = f.retained = 0;
}
FAKE void fake_set_architecture(int architecture) { fake().architecture = architecture; }
FAKE void fake_set_capturing(void* stream) { fake().capturing = stream; }
FAKE const char* fake_log() { return fake().log.c_str(); }
FAKE const char* fake_failed() { return fake().failed.c_str(); }
FAKE int fake_calls() { return fake().calls; }
FAKE int fake_misuses() { return fake().misuses; }
// What is not given back yet: allocations, modules, the retained context, contexts pushed.
FAKE int fake_live() {
  const Fake& f = fake();
  return static_cast<int>(f.memory.size() + f.modules.size() + f.contexts.size()) + f.retained;
}

FAKE int cuInit(unsigned) { return enter("cuInit", "", false); }

FAKE int cuDeviceGet(int* device, int ordinal) {
  if (const int code = enter("cuDeviceGet", text(ordinal), false)) return code;
  if (ordinal != 0) return 101;
  *device = 7;
  return OK;
}

FAKE int cuDeviceGetAttribute(int* value, int attribute, int device) {
  if (const int code = enter("cuDeviceGetAttribute", text(attribute), false)) return code;
  if (device != 7 || (attribute != 75 && attribute != 76)) return misuse("attribute", INVALID_VALUE);
  *value = attribute == 75 ? fake().architecture / 10 : fake().architecture % 10;
  return OK;
}

FAKE int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (const int code = enter("cuDevicePrimaryCtxRetain", "", false)) return code;
  if (device != 7) return misuse("device", INVALID_VALUE);
  ++fake().retained;
  *context = &context_of_device;
  return OK;
}

FAKE int cuDevicePrimaryCtxRelease_v2(int device) {
  --fake().retained;
  const int code = enter("cuDevicePrimaryCtxRelease", "", false);
  if (device != 7 || fake().retained < 0) return misuse("release of a context", INVALID_VALUE);
  return code;
}

FAKE int cuCtxPushCurrent_v2(void* context) {
  if (const int code = enter("cuCtxPushCurrent", "", false)) return code;
  if (context != &context_of_device || fake().retained == 0) return misuse("push", INVALID_CONTEXT);
  fake().contexts.push_back(context);
  return OK;
}

FAKE int cuCtxPopCurrent_v2(void** context) {
  const int code = enter("cuCtxPopCurrent");
  if (fake().contexts.empty()) return INVALID_CONTEXT;
  *context = fake().contexts.back();
  fake().contexts.pop_back();
  return code;
}

FAKE int cuCtxSynchronize() {
  if (const int code = enter("cuCtxSynchronize")) return code;
  run_all();
  return OK;
}

FAKE int cuModuleLoad(void** module, const char* path) {
  if (const int code = enter("cuModuleLoad", path)) return code;
  std::FILE* file = std::fopen(path, "rb");
  if (file == nullptr) return NO_FILE;
  std::fclose(file);
  auto* loaded = new Module{path};
  fake().modules.insert(loaded);
  *module = loaded;
  return OK;
}

FAKE int cuModuleUnload(void* module) {
  const int code = enter("cuModuleUnload");
  if (fake().modules.erase(static_cast<Module*>(module)) == 0) return misuse("unload", INVALID_VALUE);
  run_all();
  delete static_cast<Module*>(module);
  return code;
}

FAKE int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (const int code = enter("cuModuleGetFunction", name)) return code;
  if (fake().modules.count(static_cast<Module*>(module)) == 0) return misuse("module", INVALID_VALUE);
  if (std::string(name) != "merge_kernel") return NOT_FOUND;
  *function = module;
  return OK;
}

FAKE int cuMemAlloc_v2(Address* address, std::size_t size) {
  if (const int code = enter("cuMemAlloc", text(size))) return code;
  if (size == 0) return misuse("allocation of nothing", INVALID_VALUE);
  void* block = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(block, 0xff, size);
  *address = reinterpret_cast<Address>(block) ^ kMark;
  fake().memory[*address] = size;
  return OK;
}

FAKE int cuMemFree_v2(Address address) {
  const int code = enter("cuMemFree");
  run_all();
  if (fake().memory.erase(address) == 0) return misuse("free of what is not allocated", INVALID_VALUE);
  std::free(reinterpret_cast<void*>(address ^ kMark));
  return code;
}

FAKE int cuMemsetD8_v2(Address address, unsigned char value, std::size_t size) {
  if (const int code = enter("cuMemsetD8", text(size))) return code;
  std::byte* to = host(address, size, "memset");
  if (to == nullptr) return INVALID_VALUE;
  submit(nullptr, [=] { std::memset(to, value, size); });
  return OK;
}

FAKE int cuMemcpyHtoD_v2(Address address, const void* from, std::size_t size) {
  if (const int code = enter("cuMemcpyHtoD", text(size))) return code;
  std::byte* to = host(address, size, "copy to the device");
  if (to == nullptr) return INVALID_VALUE;
  submit(nullptr, [=] { std::memcpy(to, from, size); });
  return OK;
}

FAKE int cuMemcpyHtoDAsync_v2(Address address, const void* from, std::size_t size, void* stream) {
  if (const int code = enter("cuMemcpyHtoDAsync", text(size) + " stream " + text(stream))) return code;
  std::byte* to = host(address, size, "copy to the device");
  if (to == nullptr) return INVALID_VALUE;
  const auto* bytes = static_cast<const std::byte*>(from);
  submit(stream, [to, staged = std::vector<std::byte>(bytes, bytes + size)] {
    std::copy(staged.begin(), staged.end(), to);
  });
  return OK;
}

FAKE int cuMemcpyDtoHAsync_v2(void* to, Address address, std::size_t size, void* stream) {
  if (const int code = enter("cuMemcpyDtoHAsync", text(size) + " stream " + text(stream))) return code;
  const std::byte* from = host(address, size, "copy to the host");
  if (from == nullptr) return INVALID_VALUE;
  submit(stream, [=] { std::memcpy(to, from, size); });
  return OK;
}

FAKE int cuStreamIsCapturing(void* stream, int* status) {
  if (const int code = enter("cuStreamIsCapturing", text(stream))) return code;
  *status = stream != nullptr && stream == fake().capturing ? 1 : 0;
  return OK;
}

FAKE int cuStreamSynchronize(void* stream) {
  if (const int code = enter("cuStreamSynchronize", text(stream))) return code;
  stream == nullptr ? run_all() : run(stream);
  return OK;
}

FAKE int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** arguments,
                        void** extra) {
  if (fake().modules.count(static_cast<Module*>(function)) == 0) {
    return misuse("launch of what is no function", INVALID_VALUE);
  }
  const std::string file = static_cast<Module*>(function)->file;
  const Merge merge(arguments);
  std::ostringstream line;
  line << "grid " << grid_x << " " << grid_y << " " << grid_z << " block " << block_x << " " << block_y << " "
       << block_z << " shared " << shared << " stream " << stream << " file "
       << file.substr(file.rfind('/') + 1) << " arguments " << merge.bytes();
  if (const int code = enter("cuLaunchKernel", line.str())) return code;
  if (extra != nullptr || grid_x == 0 || block_x == 0 || block_x > 1024)
    return misuse("launch", INVALID_VALUE);
  submit(stream, [=] { merge.carry_out(file, grid_x); });
  return OK;
}

FAKE int cuGetErrorName(int code, const char** name) {
  *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER";
  return OK;
}

FAKE int cuGetErrorString(int code, const char** words) {
  *words = code == OUT_OF_MEMORY ? "out of memory" : "something else";
  return OK;
}
