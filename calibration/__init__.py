"""
From a float ONNX to an INT8 ONNX. Imports neither torch nor mmdet.

Each file imports only those of the lines below its own:

- quantize, sensitivity, audit, statistics: the commands
- search: the blocks to keep in float for a budget of AP
- quantizer, given_ranges: what decides how a model is quantised; ranges that come from a file
- correction, blocks: biases; convolutions that belong together
- qdq, collect, float_model: the Q/DQ pairs written; statistics over images; the float model read and checked
- placement, ranges, images, measure: where pairs go; range methods; the choice of images; AP and error of a model
- activation_statistics, messages: histograms and their file; what commands tell people
"""
