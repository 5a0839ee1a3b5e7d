#include "paretofuse/engine.h"

#include <optional>
#include <stdexcept>
#include <utility>

#include "core/buffer.h"
#include "library/cuda/weights.h"
#include "library/model.h"
#include "library/replica_pool.h"
#include "store/writer.h"

namespace paretofuse {

struct Engine::State {
  State(std::shared_ptr<const Model> opened, int replicas)
      : model(std::move(opened)),
        weights(model->routed_bytes()),
        views(model->views(weights.data())),
        pool(std::make_shared<ReplicaPool>(model, replicas)) {}

  std::shared_ptr<const Model> model;
  Buffer weights;
  std::vector<TensorView> views;
  std::shared_ptr<ReplicaPool> pool;
  std::optional<Weights> switched;  // what the weights are merged at
};

Engine::Engine(std::unique_ptr<State> state) : state_(std::move(state)) {}
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;
Engine::~Engine() = default;

Engine Engine::open(const std::string& path, const Options& options) {
  if (options.replicas < 1 || options.replicas > 4096) {
    throw std::invalid_argument("replicas: got " + std::to_string(options.replicas) + ", expected 1 to 4096");
  }
  Store store = Store::open(path);
  if (options.verify) store.verify();
  auto model = std::make_shared<const Model>(std::move(store), options);
  return Engine(std::make_unique<State>(std::move(model), options.replicas));
}

const std::vector<std::string>& Engine::objectives() const {
  return state_->model->store().manifest.objectives;
}

const std::vector<std::string>& Engine::planes() const { return state_->model->planes(); }

const std::vector<std::string>& Engine::groups() const { return state_->model->store().manifest.groups; }

const std::vector<std::string>& Engine::tensor_names() const { return state_->model->names(); }

std::vector<std::string> Engine::heads() const {
  std::vector<std::string> names;
  for (const auto& [objective, file] : state_->model->store().heads) names.push_back(objective);
  return names;
}

Preference Engine::preference(const std::map<std::string, double>& by_name) const {
  Preference preference;
  std::size_t known = 0;
  for (const std::string& objective : objectives()) {
    const auto found = by_name.find(objective);
    known += found != by_name.end();
    preference.push_back(found != by_name.end() ? found->second : 0.0);
  }
  if (known != by_name.size()) {
    throw std::invalid_argument("got a preference for something that is no objective of this store");
  }
  check_preference(preference, objectives());
  return preference;
}

Weights Engine::routing_weights(const Preference& preference) const {
  return state_->model->weights(preference);
}

void Engine::switch_to(const Preference& preference) { switch_to(routing_weights(preference)); }

void Engine::switch_to(const Weights& weights) {
  state_->model->merge(weights, state_->weights.data());
  state_->switched = weights;
}

const TensorView& Engine::tensor(std::string_view name) const {
  return state_->views[state_->model->index(name)];
}

void Engine::merge_into(const Preference& preference, const std::vector<Target>& targets) const {
  merge_into(routing_weights(preference), targets);
}

void Engine::merge_into(const Weights& weights, const std::vector<Target>& targets) const {
  state_->model->merge_into(weights, targets);
}

void Engine::write(const std::string& path, const std::string& head) const {
  if (!state_->switched) {
    throw std::invalid_argument("got write before a switch; call switch_to first to say which model");
  }
  const Model& model = *state_->model;
  const Store& store = model.store();
  write_model(store, *state_->switched, path,
              {head, store.model_files(head), model.threads(), model.isa(), {}});
}

Replica Engine::acquire(const Preference& preference, double timeout) const {
  return state_->pool->acquire(preference, timeout);
}

CudaWeights Engine::to_cuda(const CudaOptions& options) const {
  return CudaWeights(std::make_unique<CudaWeights::State>(state_->model, options));
}

}  // namespace paretofuse
