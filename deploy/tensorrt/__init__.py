"""TensorRT: engines are built and run. Imports TensorRT and CUDA only inside the functions that need them."""
