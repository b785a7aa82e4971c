// cuBLAS, cuBLASLt, cuDNN and NCCL: every call succeeds, and one that computes launches a kernel of its own name on the
// stream that it was given. Their types are replaced by pointers and ints, which are passed alike.
#include "fake_gpu.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

struct Handle {
  void* stream = nullptr;
};
struct Ranks {
  int size, rank;
};
struct UniqueId {
  char bytes[128];
};
static int make_handle(void** handle) { return *handle = new Handle, 0; }
static int make_descriptor(void** descriptor) { return *descriptor = malloc(256), 0; }

extern "C" {
int cublasCreate_v2(void** handle) { return make_handle(handle); }
int cublasSetStream_v2(Handle* handle, void* stream) { return handle->stream = stream, 0; }
int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
int cublasGetVersion_v2(void*, int* version) { return *version = 130300, 0; }
const char* cublasGetStatusString(int) { return "an error of the fake GPU"; }
#define COMPUTES(name) \
  int name(Handle* handle, ...) { return fake_launch(handle->stream, #name), 0; }
COMPUTES(cublasGemmEx) COMPUTES(cublasSgemm_v2) COMPUTES(cublasSgemmEx) COMPUTES(cublasDgemm_v2)
COMPUTES(cublasSgemmStridedBatched) COMPUTES(cublasDgemmStridedBatched) COMPUTES(cublasGemmStridedBatchedEx)
COMPUTES(cublasSgemv_v2)

int cublasLtCreate(void** handle) { return make_handle(handle); }
size_t cublasLtGetVersion() { return 130300; }
int cublasLtMatmulDescCreate(void** made, int, int) { return make_descriptor(made); }
int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) { return make_descriptor(made); }
int cublasLtMatmulPreferenceCreate(void** made) { return make_descriptor(made); }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* found, int* count) {
  return memset(found, 0, 96), *count = 1, 0;
}
int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                   size_t, void* stream) {
  return fake_launch(stream, "cublasLtMatmul"), 0;
}

int cudnnCreate(void** handle) { return make_handle(handle); }
int cudnnSetStream(Handle* handle, void* stream) { return handle->stream = stream, 0; }
int cudnnGetStream(Handle* handle, void** stream) { return *stream = handle->stream, 0; }
size_t cudnnGetVersion() { return 92600; }
size_t cudnnGetCudartVersion() { return 13020; }
const char* cudnnGetErrorString(int) { return "an error of the fake GPU"; }
void cudnnGetLastErrorString(char* text, size_t size) { snprintf(text, size, "an error of the fake GPU"); }
int cudnnGetProperty(int which, int* value) { return *value = which == 0 ? 9 : which == 1 ? 26 : 0, 0; }
int cudnnBackendCreateDescriptor(int, void** made) { return make_descriptor(made); }
int cudnnBackendGetAttribute(void*, int, int type, int64_t wanted, int64_t* count, void* out) {
  const int int64 = 3, descriptor = 15;
  int64_t none = 0;
  *(count ? count : &none) = type == int64 || type == descriptor;
  if (type == int64 && wanted > 0 && out) *(int64_t*)out = 1 << 20;  // bytes of a workspace
  return 0;
}
COMPUTES(cudnnBackendExecute) COMPUTES(cudnnBatchNormalizationForwardTrainingEx)
COMPUTES(cudnnBatchNormalizationBackwardEx) COMPUTES(cudnnBatchNormalizationForwardInference)
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*,
                                                             size_t* size) {
  return *size = 1 << 20, 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*,
                                                      size_t* size) {
  return *size = 1 << 20, 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* size) {
  return *size = 1 << 20, 0;
}
#define MAKES(name) \
  int name(void** made) { return make_descriptor(made); }
MAKES(cudnnCreateTensorDescriptor) MAKES(cudnnCreateFilterDescriptor) MAKES(cudnnCreateConvolutionDescriptor)
MAKES(cudnnCreateActivationDescriptor) MAKES(cudnnCreateDropoutDescriptor) MAKES(cudnnCreatePoolingDescriptor)

int ncclGetVersion(int* version) { return *version = 22907, 0; }
int ncclGetUniqueId(void* id) { return memset(id, 1, 128), 0; }
const char* ncclGetErrorString(int) { return "an error of the fake GPU"; }
const char* ncclGetLastError(void*) { return "an error of the fake GPU"; }
int ncclCommInitRank(Ranks** made, int size, UniqueId, int rank) { return *made = new Ranks{size, rank}, 0; }
int ncclCommInitRankConfig(Ranks** made, int size, UniqueId, int rank, void*) {
  return *made = new Ranks{size, rank}, 0;
}
int ncclCommInitRankScalable(Ranks** made, int size, int rank, int, void*, void*) {
  return *made = new Ranks{size, rank}, 0;
}
int ncclCommCount(Ranks* ranks, int* size) { return *size = ranks->size, 0; }
int ncclCommUserRank(Ranks* ranks, int* rank) { return *rank = ranks->rank, 0; }
int ncclCommGetAsyncError(void*, int* error) { return *error = 0, 0; }
int ncclAllReduce(void*, void*, size_t, int, int, void*, void* s) { return fake_launch(s, "ncclAllReduce"), 0; }
int ncclAllGather(void*, void*, size_t, int, void*, void* s) { return fake_launch(s, "ncclAllGather"), 0; }
int ncclReduceScatter(void*, void*, size_t, int, int, void*, void* s) { return fake_launch(s, "ncclReduceScatter"), 0; }
int ncclBroadcast(void*, void*, size_t, int, int, void*, void* s) { return fake_launch(s, "ncclBroadcast"), 0; }
int ncclReduce(void*, void*, size_t, int, int, int, void*, void* s) { return fake_launch(s, "ncclReduce"), 0; }
int ncclSend(void*, size_t, int, int, void*, void* s) { return fake_launch(s, "ncclSend"), 0; }
int ncclRecv(void*, size_t, int, int, void*, void* s) { return fake_launch(s, "ncclRecv"), 0; }
}
