"""Several processes that train one model."""

from compressor.distributed.alone import alone, run_on_main
from compressor.distributed.context import Context, Replica, SingleProcess, current_context

__all__ = ["Context", "Replica", "SingleProcess", "alone", "current_context", "run_on_main"]
