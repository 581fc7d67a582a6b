// The CPU kernels for any processor.

#define NCE_SIMD_LEVEL 0
#define NCE_SIMD_NAMESPACE generic
#include "kernels_table.h"

const nce::Kernels nce::kKernelsGeneric = nce::generic::kTable;
