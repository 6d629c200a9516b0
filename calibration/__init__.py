"""From a float ONNX to an INT8 ONNX. Imports neither torch nor mmdet."""
