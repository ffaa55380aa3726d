"""Custom operators, a folder each: wrapper, PyTorch reference, autograd Function, binding and kernel."""
