"""The tests, a folder of them for each package; `stand_ins` and `tensorrt_api` are imported by name."""
