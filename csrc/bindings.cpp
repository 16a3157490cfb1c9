// The schema of every op. `cpu_built` and `cuda_built` say which kernels the library was built with.
#include "common.h"

STABLE_TORCH_LIBRARY(sysdag_C, m) {
  m.def("cpu_built() -> ()");
#ifdef SYSDAG_WITH_CUDA
  m.def("cuda_built() -> ()");
#endif
}
