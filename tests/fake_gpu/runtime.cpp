// CUDA's runtime and driver without a GPU: device memory is the host's, kernels do nothing, and what CUDA forbids while
// a stream is captured is refused as CUDA refuses it. See README.md.
#include "fake_gpu.h"

#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <vector>

#undef cudaGetDeviceProperties

using std::string;

// ---- state ----------------------------------------------------------------------------------------------------------

struct Graph {
  size_t num_nodes = 0;
};

struct Stream;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  pthread_t thread;
  Graph* graph = new Graph;
  std::set<Stream*> streams;
  bool invalid = false;
};

// What has been put on each stream of a capture; a stream has joined another once that one has seen all of it.
using Clock = std::map<Stream*, long>;

struct Stream {
  Capture* capture = nullptr;
  Clock seen;
  int priority = 0;
};

struct Event {
  bool recorded = false;
  unsigned long long capture_id = 0;  // of the capture in which it was recorded last
  Clock seen;
  double time_ms = 0;
};

static long long setting(const char* name, long long otherwise) {
  const char* given = getenv(name);
  return given ? atoll(given) : otherwise;
}

static std::recursive_mutex mutex;
#define LOCKED std::lock_guard<std::recursive_mutex> lock(mutex)

static Stream legacy_stream;
static std::map<unsigned long long, Capture*> captures;  // those that are not finished
static unsigned long long num_captures = 0;
static std::map<char*, size_t> device_memory, pinned_memory;
static size_t memory_used = 0, memory_total = setting("FAKE_GPU_MEMORY", 141ll << 30);
static std::unordered_map<const void*, string> kernel_names;
static thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
static thread_local cudaError_t last_error = cudaSuccess;
static thread_local int current_device = 0;
static int num_devices = setting("FAKE_GPU_DEVICES", 1), capability = setting("FAKE_GPU_CAPABILITY", 90);

enum Counter { SYNCHRONISATIONS, LAUNCHES, PAGEABLE_COPIES, GRAPH_LAUNCHES, ILLEGAL_CALLS, GRAPH_NODES, NUM_COUNTERS };
static long counters[NUM_COUNTERS];
static const int MAX_DEVICES = 16;
static long uses[MAX_DEVICES];  // calls for which a device needs a context
static bool is_logging = false;
static std::vector<string> log_lines;

static void note(const string& line) {
  if (is_logging) log_lines.push_back(line);
}

static void use_device() { uses[current_device % MAX_DEVICES]++; }

// ---- for the tests: fake_gpu.py -------------------------------------------------------------------------------------

extern "C" {
void fake_gpu_counts(long* out) {
  LOCKED;
  memcpy(out, counters, sizeof(counters));
}
long fake_gpu_uses(int device) { return uses[device]; }
size_t fake_gpu_set_memory(size_t bytes) {
  std::swap(memory_total, bytes);
  return bytes;
}
size_t fake_gpu_memory_used() { return memory_used; }
void fake_gpu_log(int on) {
  LOCKED;
  is_logging = on;
  if (on) log_lines.clear();
}
void fake_gpu_write_log(const char* path) {
  LOCKED;
  FILE* file = fopen(path, "w");
  for (auto& line : log_lines) fprintf(file, "%s\n", line.c_str());
  fclose(file);
}
}

// ---- the rules of captures ------------------------------------------------------------------------------------------

static Stream* stream_of(const void* handle) {
  bool is_default = handle == nullptr || handle == (void*)1 || handle == (void*)2;
  return is_default ? &legacy_stream : (Stream*)handle;
}

static cudaError_t illegal(cudaError_t error, const string& what) {
  last_error = error;
  counters[ILLEGAL_CALLS]++;
  note("ILLEGAL " + what);
  return error;
}

static cudaError_t illegal_in(Capture* capture, cudaError_t error, const string& what) {
  if (capture) capture->invalid = true;
  return illegal(error, what);
}

// A call that may synchronise invalidates captures of its thread, and of others if both sides are in mode `global`.
static bool is_prohibited() {
  bool prohibited = false;
  if (thread_mode == cudaStreamCaptureModeRelaxed) return false;
  for (auto& [id, capture] : captures) {
    bool both_global = thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (capture->mode != cudaStreamCaptureModeRelaxed && (capture->thread == pthread_self() || both_global))
      prohibited = capture->invalid = true;
  }
  return prohibited;
}
#define NOT_IN_A_CAPTURE \
  if (is_prohibited()) return illegal(cudaErrorStreamCaptureUnsupported, string(__func__) + " during a capture")

static void put(Stream* stream, const string& what) {
  use_device();
  if (stream->capture) {
    stream->seen[stream]++;
    stream->capture->graph->num_nodes++;
  }
  note((stream->capture ? "captured " : "ran ") + what);
}

void fake_launch(const void* stream, const char* name) {
  LOCKED;
  counters[LAUNCHES]++;
  put(stream_of(stream), name);
}

static cudaError_t synchronised(const char* what) {
  counters[SYNCHRONISATIONS]++;
  note(string("SYNC ") + what);
  return cudaSuccess;
}

// ---- device ---------------------------------------------------------------------------------------------------------

static bool is_a100() { return capability < 90; }

static int attribute(int number) {
  switch (number) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMultiProcessorCount: return is_a100() ? 108 : 132;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrL2CacheSize: return is_a100() ? 40 << 20 : 60 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrComputeCapabilityMajor: return capability / 10;
    case cudaDevAttrComputeCapabilityMinor: return capability % 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return is_a100() ? 164 << 10 : 228 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return is_a100() ? 163 << 10 : 227 << 10;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCooperativeLaunch: return 1;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return !is_a100();
    default: return 0;
  }
}

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) { return *count = num_devices, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return current_device = device, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof(*p));
  strcpy(p->name, is_a100() ? "NVIDIA A100-SXM4-80GB" : "NVIDIA H200");
  p->totalGlobalMem = memory_total;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->reservedSharedMemPerBlock = 1024;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->warpSize = 32;
  p->memPitch = p->maxGridSize[0] = 2147483647;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536;
  p->textureAlignment = 512;
  p->major = capability / 10;
  p->minor = capability % 10;
  p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->memoryBusWidth = 6144;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->canMapHostMemory = p->concurrentKernels = p->unifiedAddressing = p->streamPrioritiesSupported = 1;
  p->managedMemory = p->cooperativeLaunch = p->hostRegisterSupported = p->pciBusID = 1;
  p->asyncEngineCount = 3;
  for (int i = 0; i < 16; i++) ((char*)&p->uuid)[i] = i;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr number, int) {
  return *value = attribute(number), cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  return snprintf(text, size, "0000:01:00.0"), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = 13020, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13020, cudaSuccess; }
cudaError_t cudaDeviceSynchronize() {
  LOCKED;
  NOT_IN_A_CAPTURE;
  return synchronised("device");
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorOfTheFakeGpu";
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorCapturedEvent: return "operation not permitted on an event last recorded in a capturing stream";
    default: return "another error of the fake GPU";
  }
}
cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
}

// ---- memory ---------------------------------------------------------------------------------------------------------

static bool lies_in(const std::map<char*, size_t>& blocks, const void* pointer) {
  auto next = blocks.upper_bound((char*)pointer);
  if (next == blocks.begin()) return false;
  auto block = std::prev(next);
  return (char*)pointer < block->first + block->second;
}

static cudaError_t allocate(void** pointer, size_t size) {
  use_device();
  size_t rounded = size ? (size + 4095) / 4096 * 4096 : 4096;
  void* block = memory_used + rounded > memory_total ? MAP_FAILED
                                                      : mmap(nullptr, rounded, PROT_READ | PROT_WRITE,
                                                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block == MAP_FAILED) return last_error = cudaErrorMemoryAllocation;
  device_memory[(char*)block] = rounded;
  memory_used += rounded;
  return *pointer = block, cudaSuccess;
}

static void release(void* pointer) {
  auto block = device_memory.find((char*)pointer);
  if (block == device_memory.end()) return;
  munmap(pointer, block->second);
  memory_used -= block->second;
  device_memory.erase(block);
}

// What comes from the device is zero: kernels wrote nothing there, and stale bytes could be any number.
static void copy(void* to, const void* from, size_t size) {
  bool from_device = lies_in(device_memory, from);
  if (from_device && !lies_in(device_memory, to))
    memset(to, 0, size);
  else if (!from_device || size <= 1 << 20)
    memmove(to, from, size);
}

static const char* kind_of(const void* pointer) {
  return lies_in(device_memory, pointer) ? "device" : lies_in(pinned_memory, pointer) ? "pinned" : "pageable";
}

extern "C" {
cudaError_t cudaMalloc(void** pointer, size_t size) {
  LOCKED;
  NOT_IN_A_CAPTURE;
  return allocate(pointer, size);
}
cudaError_t cudaMallocAsync(void** pointer, size_t size, cudaStream_t) {
  LOCKED;
  return allocate(pointer, size);
}
cudaError_t cudaFree(void* pointer) {
  LOCKED;
  if (pointer) NOT_IN_A_CAPTURE;
  return release(pointer), cudaSuccess;
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  LOCKED;
  return release(pointer), cudaSuccess;
}
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) {
  LOCKED;
  NOT_IN_A_CAPTURE;
  use_device();
  if (posix_memalign(pointer, 4096, size ? size : 1)) return cudaErrorMemoryAllocation;
  return pinned_memory[(char*)*pointer] = size ? size : 1, cudaSuccess;
}
cudaError_t cudaMallocHost(void** pointer, size_t size) { return cudaHostAlloc(pointer, size, 0); }
cudaError_t cudaFreeHost(void* pointer) {
  LOCKED;
  NOT_IN_A_CAPTURE;
  pinned_memory.erase((char*)pointer);
  return free(pointer), cudaSuccess;
}
cudaError_t cudaHostRegister(void* pointer, size_t size, unsigned) {
  LOCKED;
  return pinned_memory[(char*)pointer] = size, cudaSuccess;
}
cudaError_t cudaHostUnregister(void* pointer) {
  LOCKED;
  return pinned_memory.erase((char*)pointer), cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  LOCKED;
  return *free_bytes = memory_total - memory_used, *total = memory_total, cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  LOCKED;
  memset(attributes, 0, sizeof(*attributes));
  bool on_device = lies_in(device_memory, pointer), pinned = lies_in(pinned_memory, pointer);
  attributes->type = on_device ? cudaMemoryTypeDevice : pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  if (on_device || pinned) attributes->devicePointer = (void*)pointer;
  if (pinned) attributes->hostPointer = (void*)pointer;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  LOCKED;
  NOT_IN_A_CAPTURE;
  copy(to, from, size);
  return synchronised("copy");
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t handle) {
  LOCKED;
  Stream* stream = stream_of(handle);
  string kinds = string(kind_of(from)) + " to " + kind_of(to);
  if (kinds.find("pageable") != string::npos) counters[PAGEABLE_COPIES]++;
  put(stream, "copy of " + std::to_string(size) + " bytes, " + kinds);
  if (!stream->capture) copy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t width,
                              size_t height, cudaMemcpyKind, cudaStream_t handle) {
  LOCKED;
  Stream* stream = stream_of(handle);
  put(stream, "copy of rows");
  for (size_t row = 0; !stream->capture && row < height; row++)
    copy((char*)to + row * to_pitch, (char*)from + row * from_pitch, width);
  return cudaSuccess;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, size, cudaMemcpyDefault, stream);
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t size, cudaStream_t handle) {
  LOCKED;
  Stream* stream = stream_of(handle);
  put(stream, "set " + std::to_string(size) + " bytes");
  if (!stream->capture && size < 64 << 20) memset(pointer, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* pointer, int value, size_t size) { return cudaMemsetAsync(pointer, value, size, nullptr); }
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbols[1 << 20];
  return *pointer = symbols, cudaSuccess;
}
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { return *pool = (cudaMemPool_t)1, cudaSuccess; }
}

// ---- streams, captures, events, graphs ------------------------------------------------------------------------------

static Capture* capture_of(const Event* event) {  // null if that capture has ended
  auto found = captures.find(event->capture_id);
  return found == captures.end() ? nullptr : found->second;
}

static void see(Clock& clock, const Clock& other) {
  for (auto& [stream, count] : other) clock[stream] = std::max(clock[stream], count);
}

extern "C" {
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  use_device();
  auto* made = new Stream;
  made->priority = priority;
  return *stream = (cudaStream_t)made, cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  return cudaStreamCreateWithPriority(stream, flags, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return *priority = stream_of(stream)->priority, cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  LOCKED;
  Capture* capture = stream_of(handle)->capture;
  if (capture) return illegal_in(capture, cudaErrorStreamCaptureUnsupported, "wait for a capturing stream");
  NOT_IN_A_CAPTURE;
  return synchronised("stream");
}
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  LOCKED;
  Capture* capture = stream_of(handle)->capture;
  if (capture) return illegal_in(capture, cudaErrorStreamCaptureUnsupported, "query of a capturing stream");
  NOT_IN_A_CAPTURE;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  LOCKED;
  Capture* capture = stream_of(handle)->capture;
  *status = !capture             ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* num_dependencies) {
  LOCKED;
  Capture* capture = stream_of(handle)->capture;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? (cudaGraph_t)capture->graph : nullptr;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (num_dependencies) *num_dependencies = 0;
  return cudaStreamIsCapturing(handle, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  LOCKED;
  Stream* stream = stream_of(handle);
  if (stream == &legacy_stream) return illegal(cudaErrorStreamCaptureUnsupported, "capture of the legacy stream");
  if (stream->capture) return illegal(cudaErrorIllegalState, "capture of a capturing stream");
  stream->capture = new Capture{++num_captures, mode, pthread_self()};
  stream->capture->streams.insert(stream);
  stream->seen.clear();
  captures[stream->capture->id] = stream->capture;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t stream, cudaGraph_t, const cudaGraphNode_t*,
                                          const cudaGraphEdgeData*, size_t, cudaStreamCaptureMode mode) {
  return cudaStreamBeginCapture(stream, mode);
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  LOCKED;
  Stream* stream = stream_of(handle);
  Capture* capture = stream->capture;
  *graph = nullptr;
  if (!capture) return illegal(cudaErrorIllegalState, "end of no capture");
  if (capture->thread != pthread_self() && capture->mode != cudaStreamCaptureModeRelaxed)
    illegal_in(capture, cudaErrorStreamCaptureWrongThread, "end of a capture in another thread");
  for (Stream* other : capture->streams)
    if (stream->seen[other] < other->seen[other])
      illegal_in(capture, cudaErrorStreamCaptureUnjoined, "end of a capture with unjoined work");
  for (Stream* other : capture->streams) {
    other->seen.clear();
    other->capture = nullptr;
  }
  captures.erase(capture->id);
  if (capture->invalid) return last_error = cudaErrorStreamCaptureInvalidated;
  counters[GRAPH_NODES] = capture->graph->num_nodes;
  return *graph = (cudaGraph_t)capture->graph, cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(thread_mode, *mode), cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  LOCKED;
  Stream* stream = stream_of(handle);
  Event* event = (Event*)event_handle;
  Capture* capture = capture_of(event);
  if (!capture) {
    if (stream->capture && event->recorded)
      return illegal_in(stream->capture, cudaErrorStreamCaptureIsolation, "wait for an event from outside a capture");
    return cudaSuccess;
  }
  if (stream == &legacy_stream)
    return illegal_in(capture, cudaErrorStreamCaptureImplicit, "the legacy stream waits for a captured event");
  if (stream->capture && stream->capture != capture)
    return illegal_in(capture, cudaErrorStreamCaptureMerge, "a wait that merges two captures");
  if (!stream->capture) {
    stream->capture = capture;
    stream->seen.clear();
    capture->streams.insert(stream);
  }
  return see(stream->seen, event->seen), cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  LOCKED;
  put(stream_of(handle), "host function");
  if (!stream_of(handle)->capture) function(data);
  return cudaSuccess;
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  if (!stream_of(stream)->capture) callback(stream, cudaSuccess, data);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  use_device();
  return *event = (cudaEvent_t) new Event, cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
  LOCKED;
  Event* event = (Event*)handle;
  Stream* stream = stream_of(stream_handle);
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  event->recorded = true;
  event->time_ms = now.tv_sec * 1e3 + now.tv_nsec * 1e-6;
  event->capture_id = stream->capture ? stream->capture->id : 0;
  event->seen = stream->seen;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return cudaEventRecordWithFlags(event, stream, 0); }
cudaError_t cudaEventQuery(cudaEvent_t event) {
  LOCKED;
  if (((Event*)event)->capture_id) return illegal(cudaErrorCapturedEvent, "query of a captured event");
  NOT_IN_A_CAPTURE;
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  LOCKED;
  if (((Event*)event)->capture_id) return illegal(cudaErrorCapturedEvent, "wait for a captured event");
  NOT_IN_A_CAPTURE;
  return synchronised("event");
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  return *ms = std::max(1e-3, ((Event*)end)->time_ms - ((Event*)start)->time_ms), cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return *executable = (cudaGraphExec_t)graph, cudaSuccess;
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return *executable = (cudaGraphExec_t)graph, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  LOCKED;
  counters[GRAPH_LAUNCHES]++;
  put(stream_of(stream), "graph of " + std::to_string(((Graph*)graph)->num_nodes) + " nodes");
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!nodes) *count = ((Graph*)graph)->num_nodes;
  for (size_t i = 0; nodes && i < *count; i++) nodes[i] = (cudaGraphNode_t)(i + 1);
  return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  return *count = 0, cudaSuccess;
}
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  return *object = (cudaUserObject_t)1, cudaSuccess;
}
}

// ---- kernels --------------------------------------------------------------------------------------------------------

struct LaunchConfiguration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};
static thread_local std::vector<LaunchConfiguration> pushed;

static cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const void* stream) {
  LOCKED;
  size_t threads = (size_t)block.x * block.y * block.z;
  bool grid_fits = grid.x && grid.x <= 2147483647u && grid.y && grid.y <= 65535 && grid.z && grid.z <= 65535;
  string name = kernel_names[kernel];
  if (!grid_fits || !threads || threads > 1024 || (int)shared_bytes > attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return illegal(cudaErrorInvalidConfiguration, "launch of " + name);
  return fake_launch(stream, name.c_str()), cudaSuccess;
}

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFunction(void**, const char* kernel, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  LOCKED;
  kernel_names[kernel] = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, struct CUstream_st* stream) {
  return pushed.push_back({grid, block, shared_bytes, stream}), 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  auto last = pushed.back();
  pushed.pop_back();
  *grid = last.grid, *block = last.block, *shared_bytes = last.shared_bytes, *(void**)stream = last.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* kernel, void**) {
  return launch(kernel, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared,
                                        cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof(*attributes));
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 49152;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t) {
  return *blocks = std::min(32, 2048 / std::max(1, threads)), cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* kernel, int threads,
                                                                    size_t shared, unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, threads, shared);
}

// ---- driver: Triton's way -------------------------------------------------------------------------------------------

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13020, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int number) { return *device = number, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = num_devices, CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute number, CUdevice) {
  return *value = attribute(number), CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  return snprintf(name, size, is_a100() ? "NVIDIA A100-SXM4-80GB" : "NVIDIA H200"), CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* total, CUdevice) { return *total = memory_total, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = current_device, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void*) { return *module = (CUmodule)1, CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  LOCKED;
  char* key = strdup(name);
  kernel_names[key] = string("Triton's ") + name;
  return *function = (CUfunction)key, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute number, CUfunction) {
  bool registers = number == CU_FUNC_ATTRIBUTE_NUM_REGS, threads = number == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
  return *value = registers ? 64 : threads ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void**, void**) {
  return (CUresult)launch(kernel, dim3(x, y, z), dim3(block_x, block_y, block_z), shared, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction kernel, void**, void**) {
  dim3 grid(c->gridDimX, c->gridDimY, c->gridDimZ), block(c->blockDimX, c->blockDimY, c->blockDimZ);
  return (CUresult)launch(kernel, grid, block, c->sharedMemBytes, c->hStream);
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute number, CUdeviceptr pointer) {
  LOCKED;
  bool known = lies_in(device_memory, (void*)pointer) || lies_in(pinned_memory, (void*)pointer);
  if (number != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || !known) return CUDA_ERROR_INVALID_VALUE;
  return *(CUdeviceptr*)value = pointer, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int threads, size_t) {
  return *blocks = 2048 / threads, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  return *clusters = 66, CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult, const char** text) { return *text = "an error of the fake GPU", CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult, const char** text) { return *text = "FAKE", CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return (CUresult)cudaStreamIsCapturing(stream, (cudaStreamCaptureStatus*)status);
}
static int unsupported() { return cudaErrorNotSupported; }
static void* symbol(const char* name) {
  void* found = dlsym(RTLD_DEFAULT, name);
  return found ? found : (void*)unsupported;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** pointer, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (result) *result = cudaDriverEntryPointSuccess;
  return *pointer = symbol(name), cudaSuccess;
}
CUresult cuGetProcAddress_v2(const char* name, void** pointer, int, cuuint64_t,
                             CUdriverProcAddressQueryResult* result) {
  if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  return *pointer = symbol(name), CUDA_SUCCESS;
}
}
