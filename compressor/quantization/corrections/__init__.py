"""Weights changed so that few bits harm the model less: pure functions of tensors."""
