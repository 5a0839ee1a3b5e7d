#include "library/cuda/weights.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace paretofuse {
namespace {

constexpr std::size_t kAligned = 256;  // as the driver aligns what it allocates
constexpr std::int64_t kMaxGrid = 0x7fffffff;

std::size_t bytes(std::int64_t count, DType dtype) {
  return static_cast<std::size_t>(count * item_size(dtype));
}

void refuse_rows() {
  throw std::invalid_argument(
      "got row coefficients (family rows), which the GPU's kernels do not read; merge on the CPU (switch_to, "
      "merge_into), or train routers of the family scalar");
}

const void* pointer(DeviceAddress address) { return reinterpret_cast<const void*>(address); }

}  // namespace

CudaWeights::State::State(std::shared_ptr<const Model> opened, const CudaOptions& options)
    : model(std::move(opened)), kernels(read_kernels(options.kernels)) {
  context = std::make_shared<const CudaContext>(options.driver, options.device);
  // Machine code runs on its own architecture and on later ones of the same generation; from sm_90 on Triton
  // uses instructions of that architecture alone (sm_90a, sm_100a), and what it wrote runs on no other.
  const int ours = kernels.architecture, theirs = context->architecture();
  const bool own = ours >= 90;
  if (ours / 10 != theirs / 10 || ours > theirs || (own && ours != theirs)) {
    throw CudaError(kernels.folder + ": kernels for sm_" + std::to_string(ours) + ", the device has sm_" +
                    std::to_string(theirs) + "; write them with --arch sm_" + std::to_string(theirs));
  }
  const CurrentContext current(*context);
  const Manifest& manifest = model->store().manifest;
  for (const auto& [expert, planes] : manifest.planes) {
    if (planes.empty()) continue;
    throw std::invalid_argument("got a store with planes of the format " +
                                std::string(plane_format_name(planes.begin()->second.format)) +
                                ", which the GPU's kernels do not read; stack it with --planes dense");
  }
  if (model->store().routers.by_row()) refuse_rows();
  for (const TensorSpec& spec : manifest.tensors) {
    views.push_back({nullptr, model->store().base.find(spec.name)->nbytes, spec.dtype, spec.shape});
  }
  const auto rows = manifest.groups.size() + 1;
  weights = DeviceMemory(context, rows * manifest.members.size() * sizeof(float));
  model->store().check_unchanged();
  for (Bucket& bucket : make_buckets(manifest)) {
    if (bucket.length() == 0) continue;  // tensors without elements
    buckets.push_back({std::move(bucket), nullptr, nullptr, {}, {}, {}, {}});
    fill(buckets.back());
  }
  place_constants();
  merge_statics();
  context->driver().check(context->driver().cuCtxSynchronize(), "cuCtxSynchronize");
  model->store().check_unchanged();  // what was copied was the store
  for (DeviceBucket& device : buckets) {
    if (device.bucket.role != Role::fixed) continue;
    for (DeviceMemory* merged : {&device.base, &device.deltas, &device.tiles}) merged->give_back();
  }
}

CudaWeights::State::~State() {
  try {
    const CurrentContext current(*context);
    context->driver().cuCtxSynchronize();  // merges that are under way use the memory
  } catch (const CudaError&) {             // then nothing is under way
  }
}

void CudaWeights::State::copy(DeviceAddress to, const void* from, std::int64_t nbytes) {
  if (nbytes == 0) return;
  const CudaDriver& driver = context->driver();
  driver.check(driver.cuMemcpyHtoD(to, from, static_cast<std::size_t>(nbytes)), "cuMemcpyHtoD");
}

void CudaWeights::State::fill(DeviceBucket& device) {
  const Store& store = model->store();
  const CudaDriver& driver = context->driver();
  const Bucket& bucket = device.bucket;
  const std::int64_t length = bucket.length(), experts = static_cast<std::int64_t>(store.experts.size());
  device.kernel = &kernels.choose(bucket.dtype, bucket.delta_dtype, bucket.dtype, experts);
  if (length / device.kernel->block > kMaxGrid) throw CudaError("the model is too large for one launch");
  device.function = std::make_unique<CudaFunction>(context, device.kernel->file, device.kernel->symbol);
  device.base = DeviceMemory(context, bytes(length, bucket.dtype));
  device.deltas = DeviceMemory(context, bytes(experts * length, bucket.delta_dtype));
  device.tiles = DeviceMemory(context, bucket.rows.size() * sizeof(std::int32_t));
  device.out = DeviceMemory(context, bytes(length, bucket.dtype));
  // Experts that leave a tensor unchanged have no delta, and tensors end within a tile.
  for (const DeviceMemory* memory : {&device.base, &device.deltas, &device.out}) {
    driver.check(driver.cuMemsetD8(memory->address(), 0, memory->size()), "cuMemsetD8");
  }
  copy(device.tiles.address(), bucket.rows.data(), static_cast<std::int64_t>(device.tiles.size()));
  for (std::size_t i = 0; i < bucket.tensors.size(); ++i) {
    const std::string& name = store.manifest.tensors[bucket.tensors[i]].name;
    const Entry& entry = *store.base.find(name);
    const std::size_t offset = bytes(bucket.offsets[i], bucket.dtype);
    copy(device.base.address() + offset, store.base.data(entry), entry.nbytes);
    if (entry.nbytes > 0) views[bucket.tensors[i]].data = pointer(device.out.address() + offset);
    for (std::int64_t e = 0; e < experts; ++e) {
      const TensorFile& expert = store.experts[static_cast<std::size_t>(e)];
      const Entry* delta = expert.find(name);
      if (delta == nullptr) continue;
      const std::size_t place = bytes(e * length + bucket.offsets[i], bucket.delta_dtype);
      copy(device.deltas.address() + place, expert.data(*delta), delta->nbytes);
    }
  }
}

void CudaWeights::State::place_constants() {
  const Store& store = model->store();
  std::vector<std::pair<std::size_t, std::size_t>> places;  // tensor, offset
  std::size_t end = 0;
  for (std::size_t number = 0; number < views.size(); ++number) {
    if (store.manifest.tensors[number].role != Role::constant || views[number].nbytes == 0) continue;
    places.emplace_back(number, end);
    end += (static_cast<std::size_t>(views[number].nbytes) + kAligned - 1) / kAligned * kAligned;
  }
  constants = DeviceMemory(context, end);
  for (const auto& [number, offset] : places) {
    const Entry& entry = *store.base.find(store.manifest.tensors[number].name);
    copy(constants.address() + offset, store.base.data(entry), entry.nbytes);
    views[number].data = pointer(constants.address() + offset);
  }
}

void CudaWeights::State::merge_statics() {
  const std::vector<float> table = model->rows().of_statics();
  copy(weights.address(), table.data(), static_cast<std::int64_t>(weights.size()));
  for (const DeviceBucket& device : buckets) {
    if (device.bucket.role == Role::fixed) launch(device, nullptr);
  }
}

void CudaWeights::State::launch(const DeviceBucket& device, void* stream) const {
  const Manifest& manifest = model->store().manifest;
  const CudaDriver& driver = context->driver();
  DeviceAddress base = device.base.address(), deltas = device.deltas.address();
  DeviceAddress tiles = device.tiles.address(), table = weights.address(), out = device.out.address();
  std::int64_t length = device.bucket.length(), delta_stride = length, out_stride = length;
  auto experts = static_cast<std::int32_t>(manifest.members.size());
  auto rows = static_cast<std::int32_t>(model->rows().count());
  std::int32_t preferences = 1;
  DeviceAddress no_scales = table, no_places = tiles, no_scratch = 0;
  // In the order that cuda_kernels.cpp checks; the driver copies them before it returns.
  void* arguments[] = {&base,        &deltas,       &tiles,      &table,      &no_scales,
                       &no_places,   &out,          &length,     &experts,    &rows,
                       &preferences, &delta_stride, &out_stride, &no_scratch, &no_scratch};
  const auto grid = static_cast<unsigned>(length / device.kernel->block);
  driver.check(driver.cuLaunchKernel(device.function->handle(), grid, 1, 1, device.kernel->threads, 1, 1,
                                     device.kernel->shared_bytes, stream, arguments, nullptr),
               "cuLaunchKernel");
}

void CudaWeights::State::merge(const Weights& chosen, void* stream) {
  const std::vector<float> table = model->rows().at(chosen);
  if (model->rows().by_row(chosen)) refuse_rows();
  const CurrentContext current(*context);
  const CudaDriver& driver = context->driver();
  int capturing = 0;
  driver.check(driver.cuStreamIsCapturing(stream, &capturing), "cuStreamIsCapturing");
  if (capturing != 0) {
    throw std::invalid_argument(
        "got a stream that is being captured into a graph, expected an ordinary one: the graph would read "
        "the routing "
        "weights again at each launch, from memory that is gone; switch before the graph is launched, on its "
        "stream");
  }
  // Pageable memory is copied aside before the call returns.
  driver.check(driver.cuMemcpyHtoDAsync(weights.address(), table.data(), weights.size(), stream),
               "cuMemcpyHtoDAsync");
  for (const DeviceBucket& device : buckets) {
    if (device.bucket.role == Role::routed) launch(device, stream);
  }
}

void CudaWeights::State::read(std::string_view name, void* data, std::int64_t nbytes, void* stream) const {
  const TensorView& view = views[model->index(name)];
  if (nbytes != view.nbytes || (data == nullptr && nbytes > 0)) {
    throw std::invalid_argument("target \"" + std::string(name) + "\": got " + std::to_string(nbytes) +
                                " bytes at " + (data == nullptr ? "null" : "an address") + ", expected " +
                                std::to_string(view.nbytes));
  }
  const CurrentContext current(*context);
  const CudaDriver& driver = context->driver();
  if (nbytes > 0) {
    driver.check(driver.cuMemcpyDtoHAsync(data, reinterpret_cast<DeviceAddress>(view.data),
                                          static_cast<std::size_t>(nbytes), stream),
                 "cuMemcpyDtoHAsync");
  }
  driver.check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize");
}

CudaWeights::CudaWeights(std::unique_ptr<State> state) : state_(std::move(state)) {}
CudaWeights::CudaWeights(CudaWeights&&) noexcept = default;
CudaWeights& CudaWeights::operator=(CudaWeights&&) noexcept = default;
CudaWeights::~CudaWeights() = default;

void CudaWeights::switch_to(const Preference& preference, void* stream) {
  switch_to(state_->model->weights(preference), stream);
}

void CudaWeights::switch_to(const Weights& weights, void* stream) { state_->merge(weights, stream); }

const TensorView& CudaWeights::tensor(std::string_view name) const {
  return state_->views[state_->model->index(name)];
}

void CudaWeights::read(std::string_view name, void* data, std::int64_t nbytes, void* stream) const {
  state_->read(name, data, nbytes, stream);
}

}  // namespace paretofuse
