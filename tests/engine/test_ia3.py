"""IA3 on the engine against PEFT's forward: factors of keys, values and the MLP's activation, on every family."""

import pytest

from engine_models import CONFIGS, compare, make, make_rows
from fitune.data.batches import pack, pad
from fitune.engine.path import EnginePath
from fitune.plan.saves import LEVELS

IA3 = {"name": "ia3"}
SPLIT = [kind for kind in CONFIGS if kind not in ("bloom", "chatglm")]


def check(model, engine, bound=1e-5):
    rows = make_rows([17, 5, 30, 2])
    compare(model, engine, pack(rows), bound)
    compare(model, engine, pad(rows, 0), bound)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_equal_to_the_plain_path(kind, level):
    model, model_type = make(kind, **IA3)
    check(model, EnginePath(model, model_type, level, 64, 128))


@pytest.mark.parametrize("level", ["none", "attention"])
@pytest.mark.parametrize("targets", [["v_proj"], ["q_proj", "v_proj"], ["k_proj", "down_proj"], ["down_proj"]])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_some_of_them(kind, targets, level):
    model, model_type = make(kind, target_modules=targets, **IA3)
    check(model, EnginePath(model, model_type, level, 64, 128))
