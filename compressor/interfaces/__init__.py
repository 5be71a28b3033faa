"""What a user may supply: forward pass, loss, evaluation, optimizers, data, training loop."""

from compressor.interfaces.data import DataLoaderView, check_data, move, sample_count, take
from compressor.interfaces.device import Device
from compressor.interfaces.evaluation import (
    Accuracy,
    EvalLossFunction,
    EvaluationFunction,
    Missclass,
    TopK,
    TorchEvaluationFunction,
    evaluate,
    get_accuracy,
    get_missclass,
    get_topk,
)
from compressor.interfaces.forward_pass import ForwardPass, TorchForwardPass
from compressor.interfaces.inputs import ModelInputs, output_tensors, record_inputs
from compressor.interfaces.loss import LossFunction, call_loss, make_loss
from compressor.interfaces.optimizers import (
    DefaultTorchNativeSchedulerFactory,
    NativeOptimizerFactory,
    NativeSchedulerFactory,
    Schedule,
    SchedulerConfig,
    make_optimizer,
    make_scheduler,
)
from compressor.interfaces.task import Task
from compressor.interfaces.training_loop import ExternalTrainingLoop

__all__ = [
    "Accuracy",
    "DataLoaderView",
    "DefaultTorchNativeSchedulerFactory",
    "Device",
    "EvalLossFunction",
    "EvaluationFunction",
    "ExternalTrainingLoop",
    "ForwardPass",
    "LossFunction",
    "Missclass",
    "ModelInputs",
    "NativeOptimizerFactory",
    "NativeSchedulerFactory",
    "Schedule",
    "SchedulerConfig",
    "Task",
    "TopK",
    "TorchEvaluationFunction",
    "TorchForwardPass",
    "call_loss",
    "check_data",
    "evaluate",
    "get_accuracy",
    "get_missclass",
    "get_topk",
    "make_loss",
    "make_optimizer",
    "make_scheduler",
    "move",
    "output_tensors",
    "record_inputs",
    "sample_count",
    "take",
]
