"""Running a model: image to input, one interface to every session, outputs to detections. numpy and OpenCV."""
