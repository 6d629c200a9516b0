"""OpenVINO: ONNX files run on a CPU, also those with Q/DQ. Imports openvino only inside the functions that need it."""
