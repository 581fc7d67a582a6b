"""The compiled operators seen from Python: one file for each, with its arguments, wrapper, fake and autograd.

Nothing else in the package touches ``torch.ops``. Schemas are in csrc/ops.cpp.
"""
