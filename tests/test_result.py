"""The values of a run, and their JSON."""

from __future__ import annotations

import json

import pytest

from compressor.errors import StudyError
from compressor.result import (
    Agreement,
    Certificate,
    Choice,
    Cost,
    LatencyErrors,
    Parity,
    Plan,
    Result,
    VariantRecord,
    digest,
)

NARROW = Choice("channel_pruning", "conv1", {"kept": [0, 2]}, "2 of 4 channels", ("conv1", "bn1"))
REMOVE = Choice("block_removal", "layer1.0", {"removed": True}, "removed")
CERTIFICATE = Certificate(
    metric_name="accuracy",
    metric=90.5,
    reference_metric=91.0,
    delta=1.0,
    within_delta=True,
    latency_ratio=2.0,
    size_ratio=4.0,
    macs_ratio=1.5,
    params_ratio=1.2,
    latency_ms=0.5,
    reference_latency_ms=1.0,
    size_bytes=250,
    reference_size_bytes=1000,
    macs=100,
    reference_macs=150,
    params=50,
    reference_params=60,
    parity=Parity(1e-6, 1e-7, 32),
    agreement=Agreement(0.01, 0.02, 200),
    target={"runtime": "onnxruntime"},
    looks=7,
    notes=("a note",),
)


def through_json(value: object) -> object:
    return json.loads(json.dumps(value))


def test_plans_are_equal_whatever_the_order_of_their_choices() -> None:
    assert Plan((NARROW, REMOVE)) == Plan((REMOVE, NARROW))
    assert Plan((NARROW, REMOVE)).digest == Plan((REMOVE, NARROW)).digest
    assert Plan((NARROW,)).digest != Plan((REMOVE,)).digest


def test_a_label_does_not_make_another_plan() -> None:
    other = Choice("block_removal", "layer1.0", {"removed": True}, "left out")
    assert Plan((REMOVE,)).digest == Plan((other,)).digest
    assert REMOVE.key == other.key


def test_a_plan_survives_json() -> None:
    plan = Plan((NARROW, REMOVE))
    assert Plan.from_json(through_json(plan.to_json())) == plan


def test_parts_of_a_plan_are_taken_by_technique() -> None:
    plan = Plan((NARROW, REMOVE))
    assert plan.of("block_removal") == Plan((REMOVE,))
    assert plan.describe() == "1 block_removal, 1 channel_pruning"
    assert Plan().describe() == "nothing changed"


def test_a_record_survives_json_and_keys_of_a_newer_version_are_left_out() -> None:
    record = VariantRecord("a", Plan((NARROW,)), "done", {"accuracy": 1.0}, Cost(1, 2, 3, 4.0, 5))
    values = through_json(record.to_json())
    assert isinstance(values, dict)
    assert VariantRecord.from_json({**values, "of_a_newer_version": 1}) == record


def test_a_certificate_survives_json() -> None:
    assert Certificate.from_json(through_json(CERTIFICATE.to_json())) == CERTIFICATE  # type: ignore


def test_a_result_of_a_newer_schema_is_refused() -> None:
    result = Result(None, CERTIFICATE, [], [], {}, Plan())
    values = {**result.to_json(), "schema_version": 99}
    with pytest.raises(StudyError, match="schema version 99"):
        Result.from_json(values, None, lambda: None)


def test_a_result_is_printed_in_a_line() -> None:
    text = str(Result(None, CERTIFICATE, [], [], {}, Plan((REMOVE,))))
    assert text == (
        "accuracy 91 -> 90.5 (within delta 1), 2.00x faster, 4.00x smaller, 1.50x fewer MACs: "
        "1 block_removal"
    )


def test_the_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, 3]}) == digest({"b": [2, 3], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})


def predicted(latency_ms: float | None, measured_ms: float, *choices: Choice) -> VariantRecord:
    promise = {} if latency_ms is None else {"latency_ms": latency_ms}
    cost = Cost(1, 1, 1, measured_ms)
    return VariantRecord("id", Plan(choices), "done", {"accuracy": 1.0}, cost, promise)


def test_the_error_of_predicted_latencies_is_a_median_fraction_of_the_measured() -> None:
    records = [
        predicted(1.1, 1.0, NARROW),
        predicted(0.5, 1.0, NARROW),
        predicted(1.0, 1.25, REMOVE),
        predicted(None, 9.0, REMOVE),  # another objective
        predicted(1.0, 1.0),  # the reference itself: nothing was predicted
        VariantRecord("id", Plan((NARROW,)), "failed", predicted={"latency_ms": 1.0}),
    ]
    errors = LatencyErrors.of(records)
    assert errors is not None
    assert errors.variants == 3
    assert errors.median_error_fraction == pytest.approx(0.2)
    assert "median error of 20 %" in str(errors)
    assert LatencyErrors.of(records[3:]) is None


def test_the_result_states_the_error_of_its_predictions() -> None:
    result = Result(None, CERTIFICATE, [predicted(1.5, 1.0, NARROW)], [], {}, Plan())
    stated = result.to_json()["latency_errors"]
    assert stated == {"variants": 1, "median_error_fraction": 0.5}
    assert Result(None, CERTIFICATE, [], [], {}, Plan()).to_json()["latency_errors"] is None
