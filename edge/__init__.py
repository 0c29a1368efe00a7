"""On the device: the ONNX Runtime draft model, the modes, and the remote end of the wire."""
