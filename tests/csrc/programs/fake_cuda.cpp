// A CUDA driver that is none: the library's GPU path runs against it where there is no GPU.
//
// Device memory is host memory behind addresses that no host code can follow, filled with NaN until written.
// What is queued on a stream runs only when something waits for that stream, as on a GPU at its slowest, so
// that work queued on the wrong stream comes out wrong. Launches are carried out as fake_kernels.h says.
// Every call is written to a log. What a real driver would refuse, or what would crash it, counts as misuse.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "fake_kernels.h"

#define FAKE extern "C" __attribute__((visibility("default")))

namespace {

using fake::Address;

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NO_FILE = 301, NOT_FOUND = 500 };

constexpr Address kMark = Address{1} << 62;  // makes a host address one that faults

constexpr const char *kMerge = "merge_kernel", *kLowRankMerge = "lowrank_merge_kernel";

struct Module {
  std::string file;
  std::string symbol;
};

struct Fake {
  std::mutex mutex;
  int architecture = 90;
  int fail_at = 0, calls = 0, misuses = 0;
  void* capturing = nullptr;
  int retained = 0;
  std::vector<void*> contexts;  // the current thread's stack, pushed by us
  std::map<Address, std::size_t> memory;
  std::map<const std::byte*, std::size_t> locked;  // host memory that the device reads when a copy runs
  std::map<void*, void*> events;                   // the stream on which each was last recorded
  std::set<Module*> modules;
  std::map<void*, std::vector<std::function<void()>>> queues;
  std::string log, failed;
};

Fake& state() {
  static Fake instance;
  return instance;
}

int context_of_device;  // its address is the handle

using fake::misuse;

// Every call begins here: the log, and the failure that the test asked for.
int enter(const std::string& name, const std::string& arguments = "", bool in_context = true) {
  Fake& f = state();
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

using fake::host;

void run(void* stream) {
  std::vector<std::function<void()>> queue;
  queue.swap(state().queues[stream]);
  for (const auto& work : queue) work();
}

void run_all() {
  for (auto& [stream, queue] : state().queues) run(stream);
}

// The default stream waits for all others, and they for it.
void submit(void* stream, std::function<void()> work) {
  if (stream == nullptr) {
    run_all();
    work();
  } else {
    state().queues[stream].push_back(std::move(work));
  }
}

}  // namespace

int fake::misuse(const std::string& what, int code) {
  ++state().misuses;
  state().log += "MISUSE " + what + "\n";
  return code;
}

std::byte* fake::host(Address address, std::size_t size, const char* what) {
  Fake& f = state();
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

FAKE void fake_reset(int fail_at) {
  Fake& f = state();
  for (const auto& [address, size] : f.memory) std::free(reinterpret_cast<void*>(address ^ kMark));
  for (const auto& [memory, size] : f.locked) std::free(const_cast<std::byte*>(memory));
  for (const auto& [event, stream] : f.events) delete static_cast<char*>(event);
  for (Module* module : f.modules) delete module;
  f.locked.clear();
  f.events.clear();
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
FAKE void fake_set_architecture(int architecture) { state().architecture = architecture; }
FAKE void fake_set_capturing(void* stream) { state().capturing = stream; }
FAKE const char* fake_log() { return state().log.c_str(); }
FAKE const char* fake_failed() { return state().failed.c_str(); }
FAKE int fake_calls() { return state().calls; }
FAKE int fake_misuses() { return state().misuses; }
// Bytes from an address to the end of its allocation; 0 where there is none.
FAKE std::int64_t fake_size(Address address) {
  const Fake& f = state();
  const auto after = f.memory.upper_bound(address);
  if (after == f.memory.begin()) return 0;
  const auto& [start, length] = *std::prev(after);
  return address - start < length ? static_cast<std::int64_t>(length - (address - start)) : 0;
}
// What is not given back yet: allocations, locked memory, events, modules, the retained context, contexts
// pushed.
FAKE int fake_live() {
  const Fake& f = state();
  return static_cast<int>(f.memory.size() + f.locked.size() + f.events.size() + f.modules.size() +
                          f.contexts.size()) +
         f.retained;
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
  *value = attribute == 75 ? state().architecture / 10 : state().architecture % 10;
  return OK;
}

FAKE int cuDevicePrimaryCtxRetain(void** context, int device) {
  if (const int code = enter("cuDevicePrimaryCtxRetain", "", false)) return code;
  if (device != 7) return misuse("device", INVALID_VALUE);
  ++state().retained;
  *context = &context_of_device;
  return OK;
}

FAKE int cuDevicePrimaryCtxRelease_v2(int device) {
  --state().retained;
  const int code = enter("cuDevicePrimaryCtxRelease", "", false);
  if (device != 7 || state().retained < 0) return misuse("release of a context", INVALID_VALUE);
  return code;
}

FAKE int cuCtxPushCurrent_v2(void* context) {
  if (const int code = enter("cuCtxPushCurrent", "", false)) return code;
  if (context != &context_of_device || state().retained == 0) return misuse("push", INVALID_CONTEXT);
  state().contexts.push_back(context);
  return OK;
}

FAKE int cuCtxPopCurrent_v2(void** context) {
  const int code = enter("cuCtxPopCurrent");
  if (state().contexts.empty()) return INVALID_CONTEXT;
  *context = state().contexts.back();
  state().contexts.pop_back();
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
  auto* loaded = new Module{path, ""};
  state().modules.insert(loaded);
  *module = loaded;
  return OK;
}

FAKE int cuModuleUnload(void* module) {
  const int code = enter("cuModuleUnload");
  if (state().modules.erase(static_cast<Module*>(module)) == 0) return misuse("unload", INVALID_VALUE);
  run_all();
  delete static_cast<Module*>(module);
  return code;
}

FAKE int cuModuleGetFunction(void** function, void* module, const char* name) {
  if (const int code = enter("cuModuleGetFunction", name)) return code;
  if (state().modules.count(static_cast<Module*>(module)) == 0) return misuse("module", INVALID_VALUE);
  if (std::string(name) != kMerge && std::string(name) != kLowRankMerge) return NOT_FOUND;
  static_cast<Module*>(module)->symbol = name;
  *function = module;
  return OK;
}

FAKE int cuMemAlloc_v2(Address* address, std::size_t size) {
  if (const int code = enter("cuMemAlloc", text(size))) return code;
  if (size == 0) return misuse("allocation of nothing", INVALID_VALUE);
  void* block = std::aligned_alloc(256, (size + 255) / 256 * 256);
  std::memset(block, 0xff, size);
  *address = reinterpret_cast<Address>(block) ^ kMark;
  state().memory[*address] = size;
  return OK;
}

FAKE int cuMemFree_v2(Address address) {
  const int code = enter("cuMemFree");
  run_all();
  if (state().memory.erase(address) == 0) return misuse("free of what is not allocated", INVALID_VALUE);
  std::free(reinterpret_cast<void*>(address ^ kMark));
  return code;
}

FAKE int cuMemAllocHost_v2(void** memory, std::size_t size) {
  if (const int code = enter("cuMemAllocHost", text(size))) return code;
  if (size == 0) return misuse("allocation of nothing", INVALID_VALUE);
  *memory = std::malloc(size);
  state().locked[static_cast<const std::byte*>(*memory)] = size;
  return OK;
}

FAKE int cuMemFreeHost(void* memory) {
  const int code = enter("cuMemFreeHost");
  run_all();
  if (state().locked.erase(static_cast<const std::byte*>(memory)) == 0) {
    return misuse("free of host memory that is not locked", INVALID_VALUE);
  }
  std::free(memory);
  return code;
}

FAKE int cuEventCreate(void** event, unsigned flags) {
  if (const int code = enter("cuEventCreate", text(flags))) return code;
  *event = new char;
  state().events[*event] = nullptr;
  return OK;
}

FAKE int cuEventDestroy_v2(void* event) {
  const int code = enter("cuEventDestroy");
  if (state().events.erase(event) == 0) return misuse("destruction of no event", INVALID_VALUE);
  delete static_cast<char*>(event);
  return code;
}

FAKE int cuEventRecord(void* event, void* stream) {
  if (const int code = enter("cuEventRecord", "stream " + text(stream))) return code;
  if (state().events.count(event) == 0) return misuse("record of no event", INVALID_VALUE);
  state().events[event] = stream;
  return OK;
}

FAKE int cuEventSynchronize(void* event) {
  if (const int code = enter("cuEventSynchronize")) return code;
  if (state().events.count(event) == 0) return misuse("wait for no event", INVALID_VALUE);
  void* stream = state().events[event];
  stream == nullptr ? run_all() : run(stream);
  return OK;
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
  const auto& locked = state().locked;
  const auto after = locked.upper_bound(bytes);
  if (after != locked.begin()) {
    const auto& [start, length] = *std::prev(after);
    if (bytes + size <= start + length) {
      submit(stream, [=] { std::memcpy(to, bytes, size); });
      return OK;
    }
  }
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
  *status = stream != nullptr && stream == state().capturing ? 1 : 0;
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
  if (state().modules.count(static_cast<Module*>(function)) == 0) {
    return misuse("launch of what is no function", INVALID_VALUE);
  }
  const Module& module = *static_cast<Module*>(function);
  fake::Arguments given(arguments);
  std::function<void()> work;
  if (module.symbol == kMerge) {
    const fake::Merge merge(given);
    work = [merge, file = module.file, grid_x] { merge.carry_out(file, grid_x); };
  } else {
    const fake::LowRankMerge merge(given);
    work = [merge, file = module.file, grid_x] { merge.carry_out(file, grid_x); };
  }
  std::ostringstream line;
  line << "grid " << grid_x << " " << grid_y << " " << grid_z << " block " << block_x << " " << block_y << " "
       << block_z << " shared " << shared << " stream " << stream << " file "
       << module.file.substr(module.file.rfind('/') + 1) << " arguments " << given.bytes();
  if (const int code = enter("cuLaunchKernel", line.str())) return code;
  if (extra != nullptr || grid_x == 0 || block_x == 0 || block_x > 1024)
    return misuse("launch", INVALID_VALUE);
  submit(stream, std::move(work));
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
