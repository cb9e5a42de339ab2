// All kernels.
#include "attention.cu"
#include "norm.cu"
#include "gemm.cu"
