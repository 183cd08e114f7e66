"""The method sections: what is resolved, what does not go together, what a wrong key is told."""

import pytest

from fitune.config import build
from fitune.errors import ConfigError


def method(name, quantization="none", **keys):
    tree = {"model": {"path": "embedded", "quantization": quantization}, "method": {"name": name, **keys}}
    return build(tree).method


def test_what_depends_on_other_settings_is_resolved():
    assert method("freeze").num_blocks == 2
    assert method("freeze", patterns=["*.mlp.*"]).num_blocks == 0
    assert method("freeze", num_layers=1).num_blocks == 1
    assert method("freeze", num_layers=1, patterns="*.mlp.*").patterns == ("*.mlp.*",)
    assert method("prefix").start == "vocab"
    assert method("prefix", projection=True).start == "random"
    assert method("prefix", init="random").start == "random"


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_a_text_may_start_virtual_tokens(name):
    assert method(name, init="text", init_text="say it in verse").init_text == "say it in verse"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "prompt", "init": "text"}, "method.init_text is not set; give the text"),
        ({"name": "prompt", "init_text": "a"}, r"no effect with method.init=vocab; set method.init=text"),
        ({"name": "prefix", "init_text": "a"}, r"no effect with method.init=none; set method.init=text"),
        ({"name": "prompt", "init": "text", "init_text": ""}, "at least 1 character"),
        ({"name": "prompt", "num_virtual_tokens": 0}, "greater than 0"),
        ({"name": "prompt", "num_virtual_tokens": True}, "not true or false"),
        ({"name": "prefix", "projection": True, "init": "vocab"}, "set method.init=random or method.projection=false"),
        ({"name": "prefix", "encoder_hidden_size": 8}, "method.projection is false; remove it"),
        ({"name": "ptuning", "dropout": 0.1}, "set method.encoder=lstm or method.dropout=0"),
        ({"name": "lora", "init": "pissa", "dora": True}, "does not add up"),
        ({"name": "lora", "init": "pissa", "adapter": "runs/a"}, "the adapter is the start"),
        ({"name": "prompt", "init": "text", "init_text": "a", "adapter": "runs/a"}, "the adapter is the start"),
        ({"name": "lora", "adapter": " "}, "a path cannot be empty"),
        ({"name": "lora", "modules_to_save": ["norm", "norm"]}, "stands there twice"),
        ({"name": "lora", "lora_plus_ratio": 0}, "greater than 0"),
        ({"name": "lora", "target_modules": "all"}, "give `attention`, `linear` or a list"),
        ({"name": "lora", "target_modules": "default"}, "give `attention`, `linear` or a list"),
        ({"name": "ia3", "target_modules": "all"}, "give `default`, `attention`, `linear` or a list"),
        (
            {"name": "ia3", "target_modules": ["a"], "feedforward_modules": ["b"]},
            "b is not among method.target_modules",
        ),
        ({"name": "freeze", "num_layers": 0}, "nothing would be trained"),
        ({"name": "freeze", "also": ["nor"]}, "'embedding', 'norm' or 'head'"),
        ({"name": "prompt", "r": 8}, "it belongs to method.name=lora; prompt has name, num_virtual_tokens"),
        ({"name": "prompt", "num_virtual_token": 8}, "did you mean `method.num_virtual_tokens`"),
    ],
)
def test_what_does_not_go_together_is_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        method(**keys)


@pytest.mark.parametrize("quantization", ["int8", "nf4", "fp4", "fp8"])
def test_quantized_weights_are_not_trained(quantization):
    with pytest.raises(ConfigError, match="num_layers=2 trains the weights of blocks"):
        method("freeze", quantization)
    assert method("freeze", quantization, patterns=["*norm*"]).num_blocks == 0
    for init in ("pissa", "olora"):
        with pytest.raises(ConfigError, match=f"init={init} takes a part out of the weights"):
            method("lora", quantization, init=init)
