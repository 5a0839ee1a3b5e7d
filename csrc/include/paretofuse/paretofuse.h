/* The library for C, Rust, Go, ctypes and everything else that calls C. See engine.h and replicas.h for what
 * the calls mean; this header says only what differs.
 *
 * Every function that can fail returns a status; on any but PARETOFUSE_OK its outputs are untouched and
 * paretofuse_last_error() says what went wrong. No exception leaves the library. Strings are UTF-8, end with
 * NUL, and belong to the library: they live as long as the engine unless told otherwise. Null handles are
 * refused with PARETOFUSE_INVALID, but may be closed and released.
 *
 * Threads: paretofuse_acquire, _acquire_within, _release, _replica_tensor and all reading functions may run
 * at the same time on one engine; paretofuse_switch and _switch_weights only alone.
 */
#ifndef PARETOFUSE_H_
#define PARETOFUSE_H_

#include <stddef.h>
#include <stdint.h>

#if defined(PARETOFUSE_SHARED)
#define PARETOFUSE_C_API __attribute__((visibility("default")))
#else
#define PARETOFUSE_C_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t paretofuse_status;

enum {
  PARETOFUSE_OK = 0,
  PARETOFUSE_INVALID = 1,  /* an argument is not valid */
  PARETOFUSE_STORE = 2,    /* the store cannot be read: missing, damaged, altered, too new */
  PARETOFUSE_SYSTEM = 3,   /* the operating system refused: disk full, no permission */
  PARETOFUSE_MEMORY = 4,   /* out of memory */
  PARETOFUSE_INTERNAL = 5, /* a bug in the library */
  PARETOFUSE_DEVICE = 6,   /* the CUDA driver or the kernels refused, see cuda.h */
  PARETOFUSE_TIMEOUT = 7   /* no replica became free in time */
};

typedef struct paretofuse_engine paretofuse_engine;
typedef struct paretofuse_replica paretofuse_replica;

typedef struct {
  int32_t threads;  /* of one merge; 0: as many as the model is worth and the machine has */
  int32_t replicas; /* sets of merged weights for paretofuse_acquire; 0: two */
  const char* isa;  /* forces an instruction set; null: the best of this machine */
  int32_t verify;   /* not 0: read every file first and compare its checksum with the manifest */
} paretofuse_options;

/* A tensor's memory, dense, row-major, aligned to the element size. Everything in it lives as long as the
 * engine or replica that gave it. */
typedef struct {
  const void* data;
  uint64_t nbytes;
  const char* dtype; /* as safetensors names it: "F32", "BF16" ... */
  const int64_t* shape;
  uint64_t dimensions; /* entries of shape */
} paretofuse_view;

/* Where paretofuse_merge_into shall put a tensor. */
typedef struct {
  const char* name;
  void* data;
  uint64_t nbytes; /* must be the tensor's own size */
} paretofuse_target;

/* What the last failed call of this thread said; empty if none failed. Lives until the next failure. */
PARETOFUSE_C_API const char* paretofuse_last_error(void);

/* "major.minor.patch" */
PARETOFUSE_C_API const char* paretofuse_version(void);

/* options: null for the defaults. Close the engine after use; views of it end then, replicas go on living. */
PARETOFUSE_C_API paretofuse_status paretofuse_open(const char* path, const paretofuse_options* options,
                                                   paretofuse_engine** engine);
PARETOFUSE_C_API void paretofuse_close(paretofuse_engine* engine);

/* Counts are 0, and names null, for a null engine or an index out of range. */
PARETOFUSE_C_API uint64_t paretofuse_objective_count(const paretofuse_engine* engine);
PARETOFUSE_C_API const char* paretofuse_objective(const paretofuse_engine* engine, uint64_t index);
PARETOFUSE_C_API uint64_t paretofuse_plane_count(const paretofuse_engine* engine);
PARETOFUSE_C_API const char* paretofuse_plane(const paretofuse_engine* engine, uint64_t index);
PARETOFUSE_C_API uint64_t paretofuse_group_count(const paretofuse_engine* engine);
PARETOFUSE_C_API const char* paretofuse_group(const paretofuse_engine* engine, uint64_t index);
PARETOFUSE_C_API uint64_t paretofuse_tensor_count(const paretofuse_engine* engine);
PARETOFUSE_C_API const char* paretofuse_tensor_name(const paretofuse_engine* engine, uint64_t index);

/* preference: one number for each objective, `length` in all. weights: groups x planes numbers, row by
 * row, where rows have coefficients rows x planes more, and where columns have some too columns x planes
 * more; `count` must be their number. */
PARETOFUSE_C_API paretofuse_status paretofuse_routing_weights(const paretofuse_engine* engine,
                                                              const double* preference, uint64_t length,
                                                              float* weights, uint64_t count);
PARETOFUSE_C_API paretofuse_status paretofuse_switch(paretofuse_engine* engine, const double* preference,
                                                     uint64_t length);
PARETOFUSE_C_API paretofuse_status paretofuse_switch_weights(paretofuse_engine* engine, const float* weights,
                                                             uint64_t count);
PARETOFUSE_C_API paretofuse_status paretofuse_tensor(const paretofuse_engine* engine, const char* name,
                                                     paretofuse_view* view);
PARETOFUSE_C_API paretofuse_status paretofuse_merge_into(const paretofuse_engine* engine,
                                                         const double* preference, uint64_t length,
                                                         const paretofuse_target* targets, uint64_t count);
/* head: null or empty for the base's own tensors. */
PARETOFUSE_C_API paretofuse_status paretofuse_write(const paretofuse_engine* engine, const char* path,
                                                    const char* head);

/* Release every replica after use, in any thread. The first waits for one as long as it takes, the second
 * for `timeout` seconds at most. */
PARETOFUSE_C_API paretofuse_status paretofuse_acquire(const paretofuse_engine* engine,
                                                      const double* preference, uint64_t length,
                                                      paretofuse_replica** replica);
PARETOFUSE_C_API paretofuse_status paretofuse_acquire_within(const paretofuse_engine* engine,
                                                             const double* preference, uint64_t length,
                                                             double timeout, paretofuse_replica** replica);
PARETOFUSE_C_API paretofuse_status paretofuse_replica_tensor(const paretofuse_replica* replica,
                                                             const char* name, paretofuse_view* view);
PARETOFUSE_C_API void paretofuse_release(paretofuse_replica* replica);

/* Merged weights on a CUDA device; see cuda.h, and what it says about GPUs. Streams are CUstream or
 * cudaStream_t, null for the default one. Views hold device addresses. Close after use; it outlives the
 * engine. */
typedef struct paretofuse_cuda paretofuse_cuda;

typedef struct {
  const char* kernels; /* folder written by python -m paretofuse.kernels.aot */
  int32_t device;      /* as the driver counts them */
  const char* driver;  /* what dlopen is given; null: libcuda.so.1 */
} paretofuse_cuda_options;

PARETOFUSE_C_API paretofuse_status paretofuse_cuda_open(const paretofuse_engine* engine,
                                                        const paretofuse_cuda_options* options,
                                                        paretofuse_cuda** cuda);
PARETOFUSE_C_API void paretofuse_cuda_close(paretofuse_cuda* cuda);
PARETOFUSE_C_API paretofuse_status paretofuse_cuda_switch(paretofuse_cuda* cuda, const double* preference,
                                                          uint64_t length, void* stream);
PARETOFUSE_C_API paretofuse_status paretofuse_cuda_switch_weights(paretofuse_cuda* cuda, const float* weights,
                                                                  uint64_t count, void* stream);
PARETOFUSE_C_API paretofuse_status paretofuse_cuda_tensor(const paretofuse_cuda* cuda, const char* name,
                                                          paretofuse_view* view);
PARETOFUSE_C_API paretofuse_status paretofuse_cuda_read(const paretofuse_cuda* cuda, const char* name,
                                                        void* data, uint64_t nbytes, void* stream);

#ifdef __cplusplus
}
#endif

#endif
