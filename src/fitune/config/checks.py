"""What a method's settings must agree on, among themselves and with the rest: small functions, one sentence each.

Each gets the configuration and answers with what is wrong and what to do, or None. Those that need the model's
config.json stand in plan/checks.py.
"""

from __future__ import annotations

from collections.abc import Callable

from fitune.config.methods import FreezeConfig, Ia3Config, LoraConfig, PrefixConfig, PromptConfig, PtuningConfig
from fitune.config.schema import RunConfig


def _init_text_belongs_to_init(config: RunConfig) -> str | None:
    method = config.method
    if not isinstance(method, PromptConfig | PrefixConfig):
        return None
    if method.init == "text" and method.init_text is None:
        return "method.init is text, but method.init_text is not set; give the text, or set method.init=vocab"
    if method.init != "text" and method.init_text is not None:
        return f"method.init_text has no effect with method.init={method.init or 'none'}; set method.init=text"
    return None


def _a_projection_starts_at_random(config: RunConfig) -> str | None:
    method = config.method
    if not isinstance(method, PrefixConfig):
        return None
    if method.projection and method.init not in (None, "random"):
        return (
            f"method.init is {method.init}, but method.projection is true: no input of the network is known that would "
            "give those keys and values; set method.init=random or method.projection=false"
        )
    if not method.projection and method.encoder_hidden_size is not None:
        return (
            "method.encoder_hidden_size is the width of the projection, and method.projection is false; remove it or "
            "set method.projection=true"
        )
    return None


def _only_the_lstm_has_dropout(config: RunConfig) -> str | None:
    method = config.method
    if isinstance(method, PtuningConfig) and method.dropout and method.encoder == "mlp":
        return "method.dropout is between the layers of the LSTM; set method.encoder=lstm or method.dropout=0"
    return None


def _init_takes_weights_apart(config: RunConfig) -> str | None:
    method = config.method
    if not isinstance(method, LoraConfig) or method.init == "default":
        return None
    if method.dora:
        return (
            f"method.init={method.init} is published as a sum of two adapters, and method.dora=true does not add up; "
            "set one of them back"
        )
    if config.model.quantization != "none":
        return (
            f"method.init={method.init} takes a part out of the weights, and what is left of them would be rounded "
            f"again by model.quantization={config.model.quantization}: the adapter would no longer fit the model. Set "
            "method.init=default or model.quantization=none"
        )
    return None


def _an_adapter_is_a_start(config: RunConfig) -> str | None:
    adapter, method = getattr(config.method, "adapter", None), config.method
    if adapter is None:
        return None
    if isinstance(method, LoraConfig) and method.init != "default":
        return f"method.init={method.init} has no effect with method.adapter: the adapter is the start; remove one"
    if isinstance(method, PromptConfig | PrefixConfig) and method.init_text is not None:
        return "method.init_text has no effect with method.adapter: the adapter is the start; remove one of them"
    return None


def _freeze_trains_something(config: RunConfig) -> str | None:
    method = config.method
    if not isinstance(method, FreezeConfig):
        return None
    if method.num_blocks == 0 and not method.patterns and not method.also:
        return (
            "method.num_layers is 0 and neither method.patterns nor method.also is set: nothing would be trained; "
            "raise it, or give one of the others"
        )
    if method.num_blocks and config.model.quantization != "none":
        return (
            f"model.quantization is {config.model.quantization}, but method.name=freeze with method.num_layers="
            f"{method.num_blocks} trains the weights of blocks, and quantized weights are frozen. Set "
            "method.num_layers=0 and method.patterns to parameters that stay in full precision, or "
            "model.quantization=none"
        )
    return None


def _scaled_inputs_are_targets(config: RunConfig) -> str | None:
    method = config.method
    if (
        not isinstance(method, Ia3Config)
        or method.feedforward_modules is None
        or isinstance(method.target_modules, str)
    ):
        return None
    others = [name for name in method.feedforward_modules if name not in method.target_modules]
    if others:
        return (
            f"method.feedforward_modules: {', '.join(others):.200} is not among method.target_modules; they say which "
            "of the targets are scaled at their inputs"
        )
    return None


METHOD_CHECKS: tuple[Callable[[RunConfig], str | None], ...] = (
    _init_text_belongs_to_init,
    _a_projection_starts_at_random,
    _only_the_lstm_has_dropout,
    _init_takes_weights_apart,
    _an_adapter_is_a_start,
    _freeze_trains_something,
    _scaled_inputs_are_targets,
)
