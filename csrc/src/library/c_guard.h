// What the C interface's functions share: no exception leaves them.
#pragma once

#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "paretofuse/cuda.h"
#include "paretofuse/engine.h"
#include "paretofuse/paretofuse.h"

struct paretofuse_engine {
  paretofuse::Engine engine;
};

namespace paretofuse::c {

inline std::string& last_error() {
  thread_local std::string message;
  return message;
}

inline paretofuse_status failed(paretofuse_status status, const char* what) noexcept {
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
  } catch (const StoreError& error) {
    return failed(PARETOFUSE_STORE, error.what());
  } catch (const TimeoutError& error) {
    return failed(PARETOFUSE_TIMEOUT, error.what());
  } catch (const CudaError& error) {
    return failed(PARETOFUSE_DEVICE, error.what());
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
  if (count > PTRDIFF_MAX / sizeof(T)) {  // more than there are addresses
    throw std::invalid_argument(std::string(name) + ": got " + std::to_string(count) +
                                " entries, which is out of range");
  }
  return std::vector<T>(from, from + count);
}

inline paretofuse_view view_of(const TensorView& view) {
  return {view.data, static_cast<std::uint64_t>(view.nbytes), view.dtype.c_str(), view.shape.data(),
          view.shape.size()};
}

}  // namespace paretofuse::c
