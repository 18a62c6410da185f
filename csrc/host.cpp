// Everything that needs PyTorch's headers, as one unit of compilation.
//
// Reading those headers takes 10 of the 15 s of CPU time that a file with operators needs (GCC 12), so the files that
// include them are compiled together.
#include "library.cpp"
//
#include "cpu/asymmetric_attention.cpp"
#include "cpu/batch_norm.cpp"
#include "cpu/bn_relu_pool.cpp"
#include "cpu/pyramid_plan.cpp"
#include "cpu/pyramid_pool.cpp"
#include "cpu/upsampled_logits.cpp"
