// What the stand-ins share.
#pragma once
#include <cuda_runtime_api.h>

// A kernel, under a name, on a stream: counted, and a node of the graph if the stream is captured.
void fake_launch(const void* stream, const char* name);
