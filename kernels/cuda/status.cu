// Names of the status codes of the C interface, and what a device offers.
#include "gemm.cuh"

extern "C" char const* fairway_status_text(int status) {
  if (status >= fairway::kCudaErrorOffset) {
    return cudaGetErrorString(static_cast<cudaError_t>(status - fairway::kCudaErrorOffset));
  }
  return cutlass::cutlassGetStatusString(static_cast<cutlass::Status>(status));
}

extern "C" int fairway_sm_count(int device, int* sm_count) {
  cudaError_t error =
      cudaDeviceGetAttribute(sm_count, cudaDevAttrMultiProcessorCount, device);
  return error == cudaSuccess ? 0 : fairway::kCudaErrorOffset + static_cast<int>(error);
}
