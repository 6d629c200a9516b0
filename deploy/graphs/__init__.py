"""ONNX graphs: read, checked, searched and typed; TensorRT's operators and calibration caches. Needs onnx."""
