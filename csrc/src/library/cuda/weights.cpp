#include "library/cuda/weights.h"

#include <cstring>
#include <stdexcept>
#include <utility>

namespace paretofuse {
namespace {

constexpr std::size_t kAligned = 256;  // as the driver aligns what it allocates

[[noreturn]] void refuse_columns(const std::string& what) {
  throw std::invalid_argument(
      "got " + what +
      ": the CUDA device merges no column coefficients; use the engine on the CPU, or "
      "train with family=\"rows\"");
}

const void* pointer(DeviceAddress address) { return reinterpret_cast<const void*>(address); }

}  // namespace

CudaWeights::State::State(std::shared_ptr<const Model> opened, const CudaOptions& options)
    : model(std::move(opened)), kernels(read_kernels(options.kernels)) {
  if (model->store().routers.by_column()) refuse_columns("a store whose routers have columns.weight");
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
  for (const TensorSpec& spec : manifest.tensors) {
    views.push_back({nullptr, model->store().base.find(spec.name)->nbytes, spec.dtype, spec.shape});
  }
  const auto rows = model->rows().count() + manifest.rows;
  weights = DeviceMemory(context, static_cast<std::size_t>(rows) * manifest.members.size() * sizeof(float));
  staging = std::make_unique<Staging>(context, weights.size());
  model->store().check_unchanged();
  place_merged();
  place_constants();
  merge_statics();
  context->driver().check(context->driver().cuCtxSynchronize(), "cuCtxSynchronize");
  model->store().check_unchanged();  // what was copied was the store
  for (const auto& merge : merges) {
    if (merge->bucket().role == Role::fixed) merge->keep_output();
  }
}

CudaWeights::State::~State() {
  try {
    const CurrentContext current(*context);
    context->driver().cuCtxSynchronize();  // merges that are under way use the memory
  } catch (const CudaError&) {             // then nothing is under way
  }
}

void CudaWeights::State::place_merged() {
  const Source source{context, kernels, *model};
  for (Bucket& bucket : make_buckets(model->store(), model->rows())) {
    if (bucket.length() == 0) continue;  // tensors without elements
    const auto make = bucket.format == Format::LowRank ? low_rank_merge : flat_merge;
    merges.push_back(make(source, std::move(bucket)));
    const DeviceMerge& merge = *merges.back();
    for (std::size_t i = 0; i < merge.bucket().tensors.size(); ++i) {
      TensorView& view = views[merge.bucket().tensors[i]];
      if (view.nbytes > 0) view.data = pointer(merge.output(i));
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
    constants.write(offset, store.base.data(entry), static_cast<std::size_t>(entry.nbytes));
    views[number].data = pointer(constants.address() + offset);
  }
}

void CudaWeights::State::merge_statics() {
  const std::vector<float> table = model->rows().of_statics();
  weights.write(0, table.data(), table.size() * sizeof(float));
  for (const auto& merge : merges) {
    if (merge->bucket().role == Role::fixed) merge->launch(weights.address(), false, nullptr);
  }
}

void CudaWeights::State::merge(const Weights& chosen, void* stream) {
  const std::vector<float> table = model->rows().all(chosen);
  const bool by_row = model->rows().by_row(chosen);
  if (model->rows().by_column(chosen)) refuse_columns("routing weights of columns");
  const CurrentContext current(*context);
  const CudaDriver& driver = context->driver();
  int capturing = 0;
  driver.check(driver.cuStreamIsCapturing(stream, &capturing), "cuStreamIsCapturing");
  if (capturing != 0) {
    throw std::invalid_argument(
        "got a stream that is being captured into a graph, expected an ordinary one: the graph would read "
        "the routing weights again at each launch, from memory that later switches rewrite; switch before "
        "the graph is launched, on its stream");
  }
  staging->copy(weights.address(), table.data(), table.size() * sizeof(float), stream);
  for (const auto& merge : merges) {
    if (merge->bucket().role == Role::routed) merge->launch(weights.address(), by_row, stream);
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
