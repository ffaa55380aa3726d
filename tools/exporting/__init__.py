"""The network as files for other runtimes: its two parts, operators that ONNX can say, and checks of the result."""
