from __future__ import annotations

import pytest

from compressor.errors import ConfigError
from compressor.registry import Registry


def make_class(name: str, module: str = "here") -> type:
    return type(name.title(), (), {"name": name, "__module__": module})


def test_classes_are_found_by_name_in_order_of_registration() -> None:
    registry: Registry[type] = Registry("technique")
    classes = [registry.register(make_class(name)) for name in ("low_rank", "block_removal")]
    assert registry.names() == ("low_rank", "block_removal")
    assert list(registry) == classes
    assert registry.get("low_rank") is classes[0]
    assert "low_rank" in registry
    assert len(registry) == 2


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    registry: Registry[type] = Registry("technique")
    registry.register(make_class("low_rank"))
    with pytest.raises(ConfigError, match=r"no technique 'lowrank'. Did you mean 'low_rank'\?"):
        registry.get("lowrank")


def test_a_name_is_taken_once() -> None:
    registry: Registry[type] = Registry("technique")
    registry.register(make_class("low_rank", "mine"))
    with pytest.raises(ConfigError, match=r"already mine.Low_Rank. Give yours.Low_Rank another"):
        registry.register(make_class("low_rank", "yours"))


def test_a_reloaded_module_replaces_its_class() -> None:
    registry: Registry[type] = Registry("technique")
    registry.register(make_class("low_rank"))
    again = registry.register(make_class("low_rank"))
    assert registry.get("low_rank") is again
