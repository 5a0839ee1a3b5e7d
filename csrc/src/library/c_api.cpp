#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "library/c_guard.h"
#include "paretofuse/replicas.h"

namespace pf = paretofuse;
using pf::c::guarded;
using pf::c::numbers;
using pf::c::required;
using pf::c::view_of;

struct paretofuse_replica {
  pf::Replica replica;
};

namespace {

using Names = const std::vector<std::string>& (pf::Engine::*)() const;

std::uint64_t count_of(const paretofuse_engine* engine, Names names) {
  return engine == nullptr ? 0 : (engine->engine.*names)().size();
}

const char* name_of(const paretofuse_engine* engine, Names names, std::uint64_t index) {
  return index < count_of(engine, names) ? (engine->engine.*names)()[index].c_str() : nullptr;
}

}  // namespace

const char* paretofuse_last_error(void) { return pf::c::last_error().c_str(); }

const char* paretofuse_version(void) { return PARETOFUSE_VERSION; }

paretofuse_status paretofuse_open(const char* path, const paretofuse_options* options,
                                  paretofuse_engine** engine) {
  return guarded([&] {
    paretofuse_engine*& result = required(engine, "engine");
    pf::Options chosen;
    if (options != nullptr) {
      chosen.threads = options->threads;
      if (options->replicas != 0) chosen.replicas = options->replicas;
      if (options->isa != nullptr) chosen.isa = options->isa;
      chosen.verify = options->verify != 0;
    }
    result = new paretofuse_engine{pf::Engine::open(&required(path, "path"), chosen)};
  });
}

void paretofuse_close(paretofuse_engine* engine) { delete engine; }

std::uint64_t paretofuse_objective_count(const paretofuse_engine* engine) {
  return count_of(engine, &pf::Engine::objectives);
}

const char* paretofuse_objective(const paretofuse_engine* engine, std::uint64_t index) {
  return name_of(engine, &pf::Engine::objectives, index);
}

std::uint64_t paretofuse_plane_count(const paretofuse_engine* engine) {
  return count_of(engine, &pf::Engine::planes);
}

const char* paretofuse_plane(const paretofuse_engine* engine, std::uint64_t index) {
  return name_of(engine, &pf::Engine::planes, index);
}

std::uint64_t paretofuse_group_count(const paretofuse_engine* engine) {
  return count_of(engine, &pf::Engine::groups);
}

const char* paretofuse_group(const paretofuse_engine* engine, std::uint64_t index) {
  return name_of(engine, &pf::Engine::groups, index);
}

std::uint64_t paretofuse_tensor_count(const paretofuse_engine* engine) {
  return count_of(engine, &pf::Engine::tensor_names);
}

const char* paretofuse_tensor_name(const paretofuse_engine* engine, std::uint64_t index) {
  return name_of(engine, &pf::Engine::tensor_names, index);
}

paretofuse_status paretofuse_routing_weights(const paretofuse_engine* engine, const double* preference,
                                             std::uint64_t length, float* weights, std::uint64_t count) {
  return guarded([&] {
    const pf::Weights result =
        required(engine, "engine").engine.routing_weights(numbers(preference, length, "preference"));
    if (count != result.values.size()) {
      throw std::invalid_argument("count: got " + std::to_string(count) + ", expected " +
                                  std::to_string(result.values.size()));
    }
    if (count > 0) required(weights, "weights");
    std::copy(result.values.begin(), result.values.end(), weights);
  });
}

paretofuse_status paretofuse_switch(paretofuse_engine* engine, const double* preference,
                                    std::uint64_t length) {
  return guarded([&] {
    required(engine, "engine").engine.switch_to(pf::Preference(numbers(preference, length, "preference")));
  });
}

paretofuse_status paretofuse_switch_weights(paretofuse_engine* engine, const float* weights,
                                            std::uint64_t count) {
  return guarded(
      [&] { required(engine, "engine").engine.switch_to(pf::Weights{numbers(weights, count, "weights")}); });
}

paretofuse_status paretofuse_tensor(const paretofuse_engine* engine, const char* name,
                                    paretofuse_view* view) {
  return guarded([&] {
    required(view, "view") = view_of(required(engine, "engine").engine.tensor(&required(name, "name")));
  });
}

paretofuse_status paretofuse_merge_into(const paretofuse_engine* engine, const double* preference,
                                        std::uint64_t length, const paretofuse_target* targets,
                                        std::uint64_t count) {
  return guarded([&] {
    std::vector<pf::Target> list;
    for (const paretofuse_target& target : numbers(targets, count, "targets")) {
      list.push_back({&required(target.name, "name"), target.data, static_cast<std::int64_t>(target.nbytes)});
    }
    required(engine, "engine").engine.merge_into(numbers(preference, length, "preference"), list);
  });
}

paretofuse_status paretofuse_write(const paretofuse_engine* engine, const char* path, const char* head) {
  return guarded(
      [&] { required(engine, "engine").engine.write(&required(path, "path"), head == nullptr ? "" : head); });
}

paretofuse_status paretofuse_acquire(const paretofuse_engine* engine, const double* preference,
                                     std::uint64_t length, paretofuse_replica** replica) {
  return paretofuse_acquire_within(engine, preference, length, std::numeric_limits<double>::infinity(),
                                   replica);
}

paretofuse_status paretofuse_acquire_within(const paretofuse_engine* engine, const double* preference,
                                            std::uint64_t length, double timeout,
                                            paretofuse_replica** replica) {
  return guarded([&] {
    paretofuse_replica*& result = required(replica, "replica");
    result = new paretofuse_replica{
        required(engine, "engine").engine.acquire(numbers(preference, length, "preference"), timeout)};
  });
}

paretofuse_status paretofuse_replica_tensor(const paretofuse_replica* replica, const char* name,
                                            paretofuse_view* view) {
  return guarded([&] {
    required(view, "view") = view_of(required(replica, "replica").replica.tensor(&required(name, "name")));
  });
}

void paretofuse_release(paretofuse_replica* replica) { delete replica; }
