"""A model as a file for a runtime: ONNX in float and in int8, torch.export, TorchScript."""
