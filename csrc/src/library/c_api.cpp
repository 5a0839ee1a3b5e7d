#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "paretofuse/engine.h"
#include "paretofuse/paretofuse.h"
#include "paretofuse/replicas.h"

namespace pf = paretofuse;

struct paretofuse_engine {
  pf::Engine engine;
};

struct paretofuse_replica {
  pf::Replica replica;
};

namespace {

std::string& last_error() {
  thread_local std::string message;
  return message;
}

paretofuse_status failed(paretofuse_status status, const char* what) noexcept {
  try {
    last_error() = what;
  } catch (...) {
    last_error().clear();
  }
  return status;
}

// Runs a call of the C++ interface and turns what it throws into a status.
template <class Call>
paretofuse_status guarded(Call&& call) noexcept {
  try {
    call();
    return PARETOFUSE_OK;
  } catch (const pf::StoreError& error) {
    return failed(PARETOFUSE_STORE, error.what());
  } catch (const std::invalid_argument& error) {
    return failed(PARETOFUSE_INVALID, error.what());
  } catch (const std::system_error& error) {
    return failed(PARETOFUSE_SYSTEM, error.what());
  } catch (const std::bad_alloc&) {
    return failed(PARETOFUSE_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return failed(PARETOFUSE_INTERNAL, error.what());
  } catch (...) {
    return failed(PARETOFUSE_INTERNAL, "unknown error");
  }
}

template <class T>
T& required(T* pointer, const char* name) {
  if (pointer == nullptr) throw std::invalid_argument(std::string(name) + ": got null");
  return *pointer;
}

template <class T>
std::vector<T> numbers(const T* from, std::uint64_t count, const char* name) {
  if (count > 0) required(from, name);
  return std::vector<T>(from, from + count);
}

paretofuse_view view_of(const pf::TensorView& view) {
  return {view.data, static_cast<std::uint64_t>(view.nbytes), view.dtype.c_str(), view.shape.data(),
          view.shape.size()};
}

using Names = const std::vector<std::string>& (pf::Engine::*)() const;

std::uint64_t count_of(const paretofuse_engine* engine, Names names) {
  return engine == nullptr ? 0 : (engine->engine.*names)().size();
}

const char* name_of(const paretofuse_engine* engine, Names names, std::uint64_t index) {
  return index < count_of(engine, names) ? (engine->engine.*names)()[index].c_str() : nullptr;
}

}  // namespace

const char* paretofuse_last_error(void) { return last_error().c_str(); }

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
  return guarded([&] {
    paretofuse_replica*& result = required(replica, "replica");
    result = new paretofuse_replica{
        required(engine, "engine").engine.acquire(numbers(preference, length, "preference"))};
  });
}

paretofuse_status paretofuse_replica_tensor(const paretofuse_replica* replica, const char* name,
                                            paretofuse_view* view) {
  return guarded([&] {
    required(view, "view") = view_of(required(replica, "replica").replica.tensor(&required(name, "name")));
  });
}

void paretofuse_release(paretofuse_replica* replica) { delete replica; }
