"""Custom operators: per operator one folder with wrapper, PyTorch reference, autograd Function, binding and kernel."""
