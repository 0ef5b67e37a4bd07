"""Every op as plain PyTorch that reads like its formula, in any float dtype: the gold of the tests.

Gradients come from autograd. Narrow inputs are widened to fp32 first, which is each op's contract.
"""
