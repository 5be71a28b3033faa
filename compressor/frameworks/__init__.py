"""What the engine sees of a deep learning framework, and PyTorch behind it."""
