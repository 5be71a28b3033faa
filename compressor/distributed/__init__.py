"""Several processes that train one model."""

from compressor.distributed.context import Context, SingleProcess, TorchDistributed, current_context

__all__ = ["Context", "SingleProcess", "TorchDistributed", "current_context"]
