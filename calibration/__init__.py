"""
From a float ONNX to an INT8 ONNX. Imports neither torch nor mmdet.

Commands: quantize, choose, sensitivity, audit, statistics. Then the files, each of which imports only those of the
lines that follow its own:

- from_images: INT8 with ranges of calibration images, step by step
- search, given_ranges: the blocks to keep in float for a budget of AP; INT8 with ranges that a file has
- quantizer: all that decides how a model is quantised
- correction, blocks: biases; convolutions and matrix products that belong together
- qdq, collect, float_model: the Q/DQ pairs written; statistics over images; the float model read and checked
- affine, matrix_products: affine nodes folded into convolutions; matrix products in the form that has integer kernels
- placement, ranges, images, measure: where pairs go; range methods; the choice of images; AP and error of a model
- activation_statistics, messages: histograms and their file; what commands tell people
"""
