"""The recorded Python API of TensorRT 8.5 to 11.4, and what compares this project with it or with real bindings."""
