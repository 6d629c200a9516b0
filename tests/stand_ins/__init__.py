"""
What the tests put in place of what is not here: `from tests.stand_ins.detector import mini_detector`.

- detector: small detectors as ONNX, with their contracts and sidecars
- tensorrt: TensorRT's Python API of any version, on ONNX Runtime; `write_module` is for child processes
- cuda: cuda-python's runtime API, on host memory
"""
